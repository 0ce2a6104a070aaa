//! The documents say what the code says: generated pages and tables are current (`pages`,
//! `states`), every path, link and name in them exists (`links`), and the runbook, the alert rules and the dashboard for
//! Grafana agree with the code (`runbook`), and the table of fuzz targets is complete (`fuzz`).
//!
//! `UPDATE_REFERENCE=1 cargo test --test reference` writes the generated parts anew.

mod fuzz;
mod links;
mod pages;
mod runbook;
mod states;

/// What brings a generated part up to date.
const REMEDY: &str = "UPDATE_REFERENCE=1 cargo test --test reference";

/// The repository.
fn root() -> &'static std::path::Path {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Holds a generated page against its file, or writes the file.
fn compare(page: &str, current: &str) {
    let path = root().join("docs").join(page);
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        std::fs::write(&path, current).expect("write the page");
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(written == current, "docs/{page} is out of date: {REMEDY}");
}
