//! The pages that are generated as a whole.

use millrace::config::reference;
use millrace::metrics::Metrics;

use super::compare;

#[test]
fn the_configuration_page_is_that_of_the_types() {
    compare("CONFIGURATION.md", &reference::page());
}

#[test]
fn the_metrics_page_is_that_of_the_registry() {
    let metrics = Metrics::new().expect("metrics");
    compare("METRICS.md", &metrics.reference());
}
