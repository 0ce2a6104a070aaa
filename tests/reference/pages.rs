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
    let file = "deploy/kubernetes-nodes/millrace.toml";
    let text = std::fs::read_to_string(root().join(file)).expect(file);
    let from_secrets = [
        ("CLUSTER__SECRET", "0123456789abcdef0123456789abcdef"),
        ("CLUSTER__ADVERTISE", "millrace-0.millrace-nodes:8082"),
        ("QUEUE__REDIS__URL", "redis://broker/"),
        ("RECEIPT__KEY", "0123456789abcdef"),
        ("DATABASE__URL", "postgresql://db/shop"),
    ]
    .map(|(name, value)| (format!("MILLRACE_{name}"), value.to_owned()));
    if let Err(error) = Config::parse(&text, file, from_secrets) {
        panic!("{error}");
    }
}
