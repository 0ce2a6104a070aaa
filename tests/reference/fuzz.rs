//! `docs/PROOF.md` tells which decoder has which fuzz target: every target has its row, its entry in `fuzz/Cargo.toml` and
//! seeds, and every row a target. That the sources in a row exist, `links` checks.

use std::collections::BTreeSet;
use std::fs;

use super::root;

const PAGE: &str = "docs/PROOF.md";
const HEADING: &str = "## Fuzz targets";

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn targets() -> BTreeSet<String> {
    let entries = fs::read_dir(root().join("fuzz/fuzz_targets")).expect("the targets");
    let names = entries.map(|entry| entry.expect("an entry").path().with_extension(""));
    names
        .map(|path| {
            path.file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

/// The cells of the table under the heading, row by row, without its two lines of head.
fn rows() -> Vec<Vec<String>> {
    let page = read(PAGE);
    let (_, section) = page.split_once(HEADING).expect("its heading");
    let section = section.split("\n## ").next().unwrap_or_default();
    let lines = section.lines().filter(|line| line.starts_with('|')).skip(2);
    lines
        .map(|line| {
            line.trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        })
        .collect()
}

#[test]
fn every_fuzz_target_has_its_decoders_its_entry_and_seeds() {
    let manifest = read("fuzz/Cargo.toml");
    let rows = rows();
    let named: BTreeSet<String> = rows
        .iter()
        .map(|row| row[0].trim_matches('`').to_owned())
        .collect();
    assert_eq!(
        named,
        targets(),
        "rows of {PAGE} and files of fuzz/fuzz_targets"
    );
    for row in rows {
        let target = row[0].trim_matches('`');
        assert!(row[1].contains("`src/"), "{PAGE}: {target} names no source");
        let entry = format!("path = \"fuzz_targets/{target}.rs\"");
        assert!(manifest.contains(&entry), "fuzz/Cargo.toml: {target}");
        let seeds = fs::read_dir(root().join("fuzz/seeds").join(target));
        assert!(
            seeds.is_ok_and(|mut seeds| seeds.next().is_some()),
            "no seeds: {target}"
        );
    }
}
