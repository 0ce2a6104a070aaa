//! The pages that are generated as a whole.

use millrace::config::{Config, reference};
use millrace::metrics::Metrics;

use super::{compare, root};

#[test]
fn the_configuration_page_is_that_of_the_types() {
    compare("CONFIGURATION.md", &reference::page());
}

#[test]
fn the_metrics_page_is_that_of_the_registry() {
    let metrics = Metrics::new().expect("metrics");
    compare("METRICS.md", &metrics.reference());
}

#[test]
fn the_kit_has_configurations_that_a_start_accepts() {
    for file in ["deploy/millrace.toml", "deploy/kubernetes/millrace.toml"] {
        let text = std::fs::read_to_string(root().join(file)).expect(file);
        if let Err(error) = Config::parse(&text, file, []) {
            panic!("{error}");
        }
    }
}
