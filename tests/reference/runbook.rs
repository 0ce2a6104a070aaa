//! `docs/RUNBOOK.md` has a heading for whatever an operator may be told, and `deploy/prometheus/alerts.yml` and
//! `deploy/grafana/millrace.json` name metrics and headings that exist.

use std::collections::BTreeSet;
use std::fs;

use millrace::metrics::Metrics;
use millrace::order::payment::RefundReason;
use serde_json::Value;

use super::links::{anchor, prose};
use super::root;

const RUNBOOK: &str = "docs/RUNBOOK.md";
const ALERTS: &str = "deploy/prometheus/alerts.yml";
const ALERTS_TEST: &str = "deploy/prometheus/alerts_test.yml";
const DASHBOARD: &str = "deploy/grafana/millrace.json";

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

// --- The runbook ------------------------------------------------------------------------------

/// A heading of the runbook and the text below it, up to the next heading of any level.
struct Section {
    heading: String,
    text: String,
}

impl Section {
    /// Whether the heading has this name as a word.
    fn is_of(&self, name: &str) -> bool {
        words(&self.heading).any(|word| word == name)
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|one: char| !one.is_ascii_alphanumeric() && one != '_')
}

fn sections() -> Vec<Section> {
    let mut sections = Vec::new();
    for line in prose(&read(RUNBOOK)).lines() {
        if line.starts_with('#') {
            let heading = line.trim_start_matches('#').trim().to_owned();
            let text = String::new();
            sections.push(Section { heading, text });
        } else if let Some(section) = sections.last_mut() {
            section.text.push_str(line);
            section.text.push('\n');
        }
    }
    sections
}

/// The names without a heading that tells what they mean, what to look at, and what to do.
fn without_help(names: &BTreeSet<String>) -> Vec<String> {
    let sections = sections();
    let helps = |section: &Section| {
        let parts = ["Meaning:", "\nLook at:", "\n1. "];
        parts.iter().all(|part| section.text.contains(part))
    };
    let is_explained = |name: &String| {
        sections
            .iter()
            .any(|section| section.is_of(name) && helps(section))
    };
    let missing = names.iter().filter(|name| !is_explained(name));
    missing.cloned().collect()
}

/// The texts between `before` and `after` in a source file: the names in calls or tuples of one form.
fn names_between(path: &str, before: &str, after: &str) -> BTreeSet<String> {
    let source = read(path);
    let is_name = |text: &&str| {
        !text.is_empty()
            && text
                .chars()
                .all(|one| one.is_ascii_lowercase() || one == '_')
    };
    let rests = source.split(before).skip(1);
    let names = rests.filter_map(|rest| rest.split_once(after).map(|(name, _)| name));
    names.filter(is_name).map(str::to_owned).collect()
}

#[test]
fn every_check_and_warning_of_readyz_has_its_heading() {
    let checks = names_between("src/http/control_plane/health.rs", "check(\"", "\",");
    assert!(checks.len() >= 5, "found only {checks:?}");
    assert_eq!(without_help(&checks), Vec::<String>::new());

    let mut warnings = BTreeSet::new();
    for path in [
        "src/http/control_plane/health.rs",
        "src/http/control_plane/preflight.rs",
        "src/http/data_plane/payments/providers/standard.rs",
        "src/pipeline/failover/health.rs",
        "src/pipeline/events/status.rs",
    ] {
        warnings.extend(names_between(path, "(\"", "\", detail)"));
    }
    assert!(warnings.len() >= 8, "found only {warnings:?}");
    assert_eq!(without_help(&warnings), Vec::<String>::new());
}

#[test]
fn every_refund_reason_has_its_heading() {
    let reasons = RefundReason::ALL.iter();
    let reasons: BTreeSet<String> = reasons.map(|reason| reason.as_str().to_owned()).collect();
    assert_eq!(without_help(&reasons), Vec::<String>::new());
}

/// The words that the head of the dashboard may say, but for the one that all is well.
#[test]
fn the_runbook_has_every_word_of_the_dashboards_head() {
    let source = read("src/http/control_plane/dashboard/scripts/state.js");
    let (head, _) = source
        .split_once("\n}\n\n// ")
        .expect("the end of headline");
    let starts = ["return [\"", ": [\"", "return [\n      \""];
    let words: BTreeSet<&str> = starts
        .iter()
        .flat_map(|start| head.split(start).skip(1))
        .filter_map(|rest| rest.split_once('"').map(|(word, _)| word))
        .collect();
    assert!(words.len() >= 11, "found only {words:?}");
    let runbook = read(RUNBOOK);
    let missing: Vec<_> = words
        .iter()
        .filter(|word| !runbook.contains(&format!("*{word}*")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

// --- Alerts -----------------------------------------------------------------------------------

#[derive(Default)]
struct Rule {
    name: String,
    expr: String,
    severity: String,
    runbook: String,
}

/// The rules of the file, read line by line. An expression may go on over the lines up to the next key.
fn rules(text: &str) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    let mut in_expr = false;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("- alert: ") {
            rules.push(Rule {
                name: name.to_owned(),
                ..Rule::default()
            });
            in_expr = false;
            continue;
        }
        let Some(rule) = rules.last_mut() else {
            continue;
        };
        if let Some(begin) = line.strip_prefix("expr: ") {
            rule.expr.push_str(begin);
            in_expr = true;
        } else if line == "labels:" || line.starts_with("for: ") {
            in_expr = false;
        } else if let Some(severity) = line.strip_prefix("severity: ") {
            rule.severity = severity.to_owned();
        } else if let Some(runbook) = line.strip_prefix("runbook: ") {
            rule.runbook = runbook.to_owned();
        } else if in_expr {
            rule.expr.push('\n');
            rule.expr.push_str(line);
        }
    }
    rules
}

#[test]
fn every_alert_has_a_severity_a_heading_that_names_it_and_a_test() {
    let rules = rules(&read(ALERTS));
    assert!(rules.len() > 10, "found only {}", rules.len());
    let tests = read(ALERTS_TEST);
    let sections = sections();
    for rule in &rules {
        let name = &rule.name;
        assert!(
            matches!(rule.severity.as_str(), "page" | "ticket"),
            "{name}: severity {:?}",
            rule.severity
        );
        let linked = rule.runbook.split_once('#');
        assert!(
            linked.is_some_and(|(page, heading)| page == RUNBOOK
                && sections
                    .iter()
                    .any(|section| anchor(&section.heading) == heading && section.is_of(name))),
            "{name}: runbook {:?}",
            rule.runbook
        );
        let case = format!("- alertname: {name}\n");
        assert!(tests.contains(&case), "{name} has no case in {ALERTS_TEST}");
    }
    let names: BTreeSet<String> = rules.into_iter().map(|rule| rule.name).collect();
    assert_eq!(without_help(&names), Vec::<String>::new());
}

// --- Metrics ----------------------------------------------------------------------------------

/// The names that `/metrics` may have: those of the reference page with the suffixes of histograms, and on Linux those
/// of the process.
fn known_metrics() -> BTreeSet<String> {
    let page = read("docs/METRICS.md");
    let mut known = BTreeSet::new();
    for row in page.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = row.split('|').map(str::trim).skip(1);
        let name = cells.next().unwrap_or_default().trim_matches('`');
        if cells.next() == Some("histogram") {
            for suffix in ["_bucket", "_sum", "_count"] {
                known.insert(format!("{name}{suffix}"));
            }
        } else {
            known.insert(name.to_owned());
        }
    }
    let rendered = Metrics::new().expect("metrics").render();
    let types = rendered
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE process_"));
    for rest in types {
        let name = rest.split(' ').next().unwrap_or_default();
        known.insert(format!("process_{name}"));
    }
    known
}

/// The metrics that an expression names and that do not exist.
fn unknown_metrics(expr: &str, known: &BTreeSet<String>) -> Vec<String> {
    let is_checked = |word: &&str| {
        word.starts_with("millrace_") || (cfg!(target_os = "linux") && word.starts_with("process_"))
    };
    let named = words(expr).filter(is_checked);
    let unknown = named.filter(|word| !known.contains(*word));
    unknown.map(str::to_owned).collect()
}

/// Every text under a key `expr` or `query`, at any depth.
fn queries(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                match member {
                    Value::String(text) if key == "expr" || key == "query" => {
                        found.push(text.clone());
                    }
                    other => queries(other, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| queries(item, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_exist() {
    let known = known_metrics();
    for rule in rules(&read(ALERTS)) {
        assert!(rule.expr.contains("millrace_"), "{}: no metric", rule.name);
        let unknown = unknown_metrics(&rule.expr, &known);
        assert!(unknown.is_empty(), "{}: {unknown:?}", rule.name);
    }
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    assert!(dashboard["schemaVersion"].is_u64(), "no schemaVersion");
    let mut asked = Vec::new();
    queries(&dashboard, &mut asked);
    assert!(asked.len() > 20, "found only {}", asked.len());
    for query in asked {
        let unknown = unknown_metrics(&query, &known);
        assert!(unknown.is_empty(), "{query}: {unknown:?}");
    }
}

#[test]
fn a_metric_or_a_heading_that_is_gone_is_found() {
    let known = known_metrics();
    let fine = "rate(millrace_batch_seconds_bucket[1m]) / millrace_queue_depth{sku=\"a\"}";
    assert_eq!(unknown_metrics(fine, &known), Vec::<String>::new());
    for gone in ["millrace_gone > 1", "sum(millrace_batch_seconds)"] {
        assert_eq!(unknown_metrics(gone, &known).len(), 1, "{gone}");
    }
    let names = BTreeSet::from(["progress".to_owned(), "no_such_check".to_owned()]);
    assert_eq!(without_help(&names), ["no_such_check"]);
    let text = "- alert: A\n  expr: >-\n    millrace_a\n    > 1\n  for: 1m\n  labels:\n    severity: page\n";
    let rules = rules(text);
    assert_eq!(rules.len(), 1);
    assert_eq!(rules[0].expr, ">-\nmillrace_a\n> 1");
    assert_eq!(rules[0].severity, "page");
}
