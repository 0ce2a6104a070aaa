//! The reference pages say what the code says.

use millrace::config::reference;
use millrace::metrics::Metrics;

fn compare(page: &str, current: &str, remedy: &str) {
    let path = format!("{}/docs/{page}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        std::fs::write(&path, current).expect("write the page");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == current, "docs/{page} is out of date: {remedy}");
}

#[test]
fn the_configuration_page_is_that_of_the_types() {
    let remedy = "millrace config reference > docs/CONFIGURATION.md";
    compare("CONFIGURATION.md", &reference::page(), remedy);
}

#[test]
fn the_metrics_page_is_that_of_the_registry() {
    let metrics = Metrics::new().expect("metrics");
    let remedy = "UPDATE_REFERENCE=1 cargo test --test reference";
    compare("METRICS.md", &metrics.reference(), remedy);
}
