//! Every link, path, module and test that the documents name exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::root;

/// The repository's folders whose paths are written in backticks.
const FOLDERS: [&str; 7] = [
    "src/", "tests/", "perf/", "docs/", "benches/", "fuzz/", ".ci/",
];

/// Lower-case words joined by this many underscores or more name a test, a setting, a metric or a column.
const UNDERSCORES: usize = 3;

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("read a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() && name != "target" && name != "corpus" {
            files(&path, found);
        } else if path.is_file() {
            found.push(path);
        }
    }
}

/// The documents for people, relative to the repository. The changelog speaks of the past.
fn documents() -> Vec<PathBuf> {
    let at_the_root = [
        "README.md",
        "README.zh-CN.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
    ];
    let mut found: Vec<_> = at_the_root.iter().map(|name| root().join(name)).collect();
    for folder in ["deploy", "docs", "perf"] {
        files(&root().join(folder), &mut found);
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found
        .iter()
        .map(|path| path.strip_prefix(root()).expect("inside").to_owned())
        .collect()
}

/// A document without its fenced blocks.
pub(super) fn prose(text: &str) -> String {
    let outside = text.split("\n```").step_by(2);
    // The rest of the closing line of a fence is empty.
    outside.collect::<Vec<_>>().join("\n")
}

/// The anchor that GitHub gives a heading.
pub(super) fn anchor(heading: &str) -> String {
    heading
        .chars()
        .filter(|one| one.is_alphanumeric() || matches!(one, ' ' | '-' | '_'))
        .map(|one| if one == ' ' { '-' } else { one })
        .flat_map(char::to_lowercase)
        .collect()
}

fn check_links(document: &Path, text: &str, broken: &mut Vec<String>) {
    for (at, _) in text.match_indices("](") {
        let rest = &text[at + 2..];
        let target = rest.split(')').next().unwrap_or_default();
        if target.contains("://") {
            continue;
        }
        let (path, heading) = target.split_once('#').unwrap_or((target, ""));
        let linked = match path {
            "" => root().join(document),
            path => root().join(document.with_file_name("")).join(path),
        };
        let headings = || {
            let text = fs::read_to_string(&linked).unwrap_or_default();
            let lines = prose(&text);
            let headings = lines.lines().filter(|line| line.starts_with('#'));
            headings
                .map(|line| anchor(line.trim_start_matches('#').trim()))
                .collect::<Vec<_>>()
        };
        if !linked.exists() || (!heading.is_empty() && !headings().contains(&heading.to_owned())) {
            broken.push(format!("{}: link to {target}", document.display()));
        }
    }
}

/// Whether a path of the repository exists; `*` stands for any part of the last name.
fn path_exists(path: &str) -> bool {
    let Some((before, after)) = path.split_once('*') else {
        return root().join(path).exists();
    };
    let (folder, start) = before.rsplit_once('/').unwrap_or(("", before));
    let entries = fs::read_dir(root().join(folder)).into_iter().flatten();
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with(start) && name.ends_with(after)
    })
}

/// `a::{b, c}` as `a::b` and `a::c`; anything else as it is.
fn spelled_out(path: &str) -> Vec<String> {
    match path.split_once("::{") {
        Some((before, group)) => group
            .trim_end_matches('}')
            .split(',')
            .map(|last| format!("{before}::{}", last.trim()))
            .collect(),
        None => vec![path.to_owned()],
    }
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Whether `a::b::C` leads to a module, or to a word in the deepest module on the way.
fn module_exists(path: &str) -> bool {
    let mut folder = root().join("src");
    let mut text = String::new();
    for segment in path.split("::") {
        let (file, inner) = (folder.join(format!("{segment}.rs")), folder.join(segment));
        if file.is_file() {
            text = fs::read_to_string(&file).unwrap_or_default();
        } else if inner.is_dir() {
            text = fs::read_to_string(inner.join("mod.rs")).unwrap_or_default();
        } else {
            return text.split(|one| !is_word(one)).any(|word| word == segment);
        }
        folder = inner;
    }
    true
}

/// The texts that may define a name: sources, tests, SQL, settings.
fn corpus() -> String {
    let mut found = Vec::new();
    for folder in ["src", "tests", "perf", "benches", "fuzz"] {
        files(&root().join(folder), &mut found);
    }
    let is_source = |path: &&PathBuf| {
        let extension = path.extension().and_then(|one| one.to_str());
        matches!(extension, Some("rs" | "sql" | "py" | "toml" | "json"))
    };
    let texts = found.iter().filter(is_source);
    let texts = texts.map(|path| fs::read_to_string(path).unwrap_or_default());
    texts.collect::<Vec<_>>().join("\n")
}

fn check_names(document: &Path, text: &str, corpus: &str, broken: &mut Vec<String>) {
    let modules: BTreeSet<String> = fs::read_dir(root().join("src"))
        .expect("read src")
        .flatten()
        .map(|entry| entry.path().with_extension(""))
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    for name in text.split('`').skip(1).step_by(2) {
        let first = name.split_whitespace().next().unwrap_or_default();
        let first = first.trim_end_matches([',', ';', ':']);
        let is_name = name
            .chars()
            .all(|one| one.is_ascii_lowercase() || one.is_ascii_digit() || "_…".contains(one));
        let exists = if FOLDERS.iter().any(|folder| first.starts_with(folder)) {
            path_exists(first)
        } else if name
            .split_once("::")
            .is_some_and(|(module, _)| modules.contains(module))
        {
            spelled_out(name).iter().all(|path| module_exists(path))
        } else if is_name && name.matches('_').count() >= UNDERSCORES {
            name.split('…').all(|part| corpus.contains(part))
        } else {
            true
        };
        if !exists {
            broken.push(format!("{}: `{name}`", document.display()));
        }
    }
}

fn broken(document: &Path, text: &str, corpus: &str) -> Vec<String> {
    let mut broken = Vec::new();
    let text = prose(text);
    check_links(document, &text, &mut broken);
    check_names(document, &text, corpus, &mut broken);
    broken
}

#[test]
fn every_link_path_module_and_test_that_a_document_names_exists() {
    let corpus = corpus();
    let documents = documents();
    assert!(documents.len() > 10, "found only {}", documents.len());
    let broken: Vec<_> = documents
        .iter()
        .flat_map(|document| {
            let text = fs::read_to_string(root().join(document)).expect("read a document");
            broken(document, &text, &corpus)
        })
        .collect();
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn a_link_path_module_or_test_that_is_gone_is_found() {
    let at = Path::new("docs/FAULTS.md");
    let fine = "[a](../README.md) [b](../ARCHITECTURE.md#code-map) [c](https://x.y/z#t) `src/lib.rs` `tests/http_*.rs` \
                `perf/waiting_path/run.py --after x` `state::{stock, pending}` `order::OrderStatus` `std::task::Waker` \
                `a_link_path_module_or_test…`\n```sh\n`src/gone.rs`\n```\n`tests/reference`";
    assert_eq!(broken(at, fine, &corpus()), Vec::<String>::new());
    // Put together, because this file belongs to the texts that are searched.
    let test = ["a", "test", "of", "yesterday"].join("_");
    for gone in [
        "[a](GONE.md)",
        "[a](../ARCHITECTURE.md#no-such-heading)",
        "`src/gone.rs`",
        "`tests/gone_*.rs`",
        "`state::gone`",
        "`state::{stock, gone}`",
        "`order::payment::Gone`",
        &format!("`{test}`"),
    ] {
        assert_eq!(broken(at, gone, &corpus()).len(), 1, "{gone}");
    }
}

#[test]
fn every_dependency_has_its_reason_beside_it() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("read Cargo.toml");
    let (mut are_dependencies, mut before) = (false, "");
    for line in manifest.lines() {
        if line.starts_with('[') {
            are_dependencies = line.ends_with("dependencies]");
        } else if are_dependencies && line.contains(" = ") {
            assert!(
                before.starts_with('#'),
                "Cargo.toml: no reason before `{line}`"
            );
        }
        before = line;
    }
}
