//! The floors of the house: what may name what. A module names only floors below its own;
//! siblings on one floor never name each other, but for the few exceptions below.
//!
//! The checker reads the source as text, cut into code, comments and string literals, so it needs
//! no parser and sees doctests and macros for what they are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Floor by module; the table of ARCHITECTURE.md.
const FLOORS: &[(&str, u8)] = &[
    ("order", 0),
    ("backoff", 0),
    ("config", 0),
    ("metrics", 0),
    ("faults", 0),
    ("sync", 0),
    ("supervise", 0),
    ("profile", 0),
    ("logging", 0),
    ("state", 1),
    ("queue", 1),
    ("store", 1),
    ("pipeline", 2),
    ("http", 3),
    ("app", 4),
    ("cli", 5),
    ("main", 5),
    ("loadgen", 5),
];

/// What would break a rule and is meant: file (or folder, with a slash at its end), the path that
/// it names, why.
const SIBLINGS: &[(&str, &str, &str)] = &[
    (
        "src/queue/",
        "state::pending",
        "what a queue carries is the order with its slot, so that a claim is one pointer away",
    ),
    (
        "src/store/postgres/recovery.rs",
        "state::",
        "start-up fills the state from rows, and a copy of its types would only be translated",
    ),
    (
        "src/store/postgres/window.rs",
        "state::",
        "start-up fills the state from rows, and a copy of its types would only be translated",
    ),
    (
        "src/store/postgres/skus.rs",
        "state::stock",
        "a row of `sku` is a `Sku`, for start-up and for an operator alike",
    ),
    (
        "src/supervise.rs",
        "faults",
        "a test build ends by name what should never end",
    ),
    (
        "src/config/",
        "faults",
        "a test build does not take the deliberate fault in its environment for a setting",
    ),
    (
        "src/metrics/payments.rs",
        "order::payment",
        "each reason of a refund is a value of a label, and is named once",
    ),
    (
        "src/order/mod.rs",
        "faults",
        "the wall clock is read in one place, where a test can set it off",
    ),
    ("src/main.rs", "cli", "the program is its command line"),
    (
        "src/cli/",
        "loadgen",
        "the commands `load` and `demo` start the load generator",
    ),
];

/// Files that may hold `unsafe`; each says why in its header.
const UNSAFE: &[&str] = &[];

/// What starts a task, thread or coroutine.
const STARTS: &[&str] = &["tokio::spawn(", "thread::spawn(", ".spawn(", "go!("];

/// Files (or folders) that start something without supervision: how often, and why that may end in
/// silence.
const UNSUPERVISED: &[(&str, usize, &str)] = &[
    ("src/supervise.rs", 3, "supervision itself"),
    (
        "src/loadgen/",
        usize::MAX,
        "another process, whose end is its exit code",
    ),
    (
        "src/cli/",
        usize::MAX,
        "commands, whose end is their exit code",
    ),
    (
        "src/logging/mod.rs",
        1,
        "the log's writer: whatever becomes of it, the log is outside of the failure domain",
    ),
    (
        "src/queue/journal/queue.rs",
        1,
        "the journal's threads report by themselves, so that shuttle can run them",
    ),
    (
        "src/http/server/dispatcher.rs",
        1,
        "the coroutine runs under supervision from its first line on",
    ),
    (
        "src/http/server/hardened/acceptor.rs",
        1,
        "a connection, which its guard ends",
    ),
    (
        "src/http/server/runtime.rs",
        1,
        "one wake-up, which may come early or by others",
    ),
    (
        "src/http/server/tokio_bridge.rs",
        1,
        "a part of a request, which is told that its task is lost",
    ),
    (
        "src/http/data_plane/context.rs",
        1,
        "a part of a request, which waits for it",
    ),
    (
        "src/http/control_plane/router.rs",
        1,
        "a request, which answers that it failed",
    ),
    (
        "src/pipeline/admin/lost_answers.rs",
        1,
        "the search for what came of operators' changes; what is open stays as safe as it was meanwhile",
    ),
    (
        "src/store/postgres/connector.rs",
        1,
        "a connection, whose end its user sees",
    ),
    (
        "src/store/embedded/mod.rs",
        3,
        "a connection; the bound on a log file, which is begun anew with the server; a test's tool",
    ),
    (
        "src/store/embedded/server.rs",
        1,
        "the process of PostgreSQL, which is looked after by its keeper",
    ),
];

const CODE_LINES_MAX: usize = 500;

/// Files that have outgrown [`CODE_LINES_MAX`], with the reason why they stay whole.
const LONG: &[(&str, &str)] = &[];

// --- Reading --------------------------------------------------------------------------------

/// A source file, cut apart. Each text keeps its line breaks, so that positions agree.
struct Source {
    /// Relative to the repository, with `/`.
    path: String,
    /// Without comments, the insides of literals and the tests module.
    code: String,
    /// The insides of string literals outside tests, one after the other.
    strings: Vec<String>,
    /// The `//!` lines at the top.
    header: String,
    /// Lines that hold code, without those of the tests module.
    code_lines: usize,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let tests = ["\n#[cfg(test)]\nmod ", "\n#[cfg(test)]\n#[allow"]
            .iter()
            .filter_map(|start| text.find(start))
            .min();
        let text = text.get(..tests.unwrap_or(text.len())).expect("a boundary");
        let (code, strings) = cut(text);
        let header = text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .collect::<Vec<_>>()
            .join("\n");
        let code_lines = code.lines().filter(|line| !line.trim().is_empty()).count();
        Source {
            path: path.to_owned(),
            code,
            strings,
            header,
            code_lines,
        }
    }

    /// The module on the first floor below `src`.
    fn module(&self) -> &str {
        let inside = self.path.trim_start_matches("src/");
        inside
            .split('/')
            .next()
            .unwrap_or(inside)
            .trim_end_matches(".rs")
    }

    fn is_in(&self, folder: &str) -> bool {
        self.path.starts_with(folder)
    }
}

/// Cuts `text` into code and the insides of string literals; comments vanish.
fn cut(text: &str) -> (String, Vec<String>) {
    let bytes = text.as_bytes();
    let (mut code, mut strings) = (Vec::new(), Vec::new());
    let mut at = 0;
    let newlines = |part: &[u8]| part.iter().filter(|byte| **byte == b'\n').count();
    while at < bytes.len() {
        let rest = &bytes[at..];
        let after_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
        let end = if rest.starts_with(b"//") {
            rest.iter()
                .position(|byte| *byte == b'\n')
                .unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            let mut depth = 0;
            let mut end = 0;
            while end < rest.len() {
                match rest[end..] {
                    [b'/', b'*', ..] => (depth, end) = (depth + 1, end + 2),
                    [b'*', b'/', ..] => (depth, end) = (depth - 1, end + 2),
                    _ => end += 1,
                }
                if depth == 0 {
                    break;
                }
            }
            end
        } else if let Some((open, hashes)) =
            raw_string(rest).filter(|_| !after_word || rest[0] == b'"')
        {
            let (inside, end) = match hashes {
                // An ordinary string.
                None => {
                    let mut end = open;
                    while end < rest.len() && rest[end] != b'"' {
                        end += if rest[end] == b'\\' { 2 } else { 1 };
                    }
                    (&rest[open..end.min(rest.len())], (end + 1).min(rest.len()))
                }
                Some(hashes) => {
                    let close = format!("\"{}", "#".repeat(hashes));
                    let end = rest[open..]
                        .windows(close.len())
                        .position(|part| part == close.as_bytes())
                        .map_or(rest.len(), |found| open + found);
                    (&rest[open..end], (end + close.len()).min(rest.len()))
                }
            };
            strings.push(String::from_utf8_lossy(inside).into_owned());
            code.extend_from_slice(b"\"\"");
            end
        } else if rest[0] == b'\'' && char_literal(rest) > 0 {
            code.extend_from_slice(b"' '");
            char_literal(rest)
        } else {
            code.push(rest[0]);
            at += 1;
            continue;
        };
        code.resize(code.len() + newlines(&rest[..end]), b'\n');
        at += end;
    }
    (String::from_utf8_lossy(&code).into_owned(), strings)
}

/// Where the inside of a string literal begins, and its number of `#` if it is a raw one.
fn raw_string(rest: &[u8]) -> Option<(usize, Option<usize>)> {
    let prefix = rest
        .iter()
        .take_while(|byte| matches!(byte, b'b' | b'c' | b'r'))
        .count();
    let hashes = rest[prefix..]
        .iter()
        .take_while(|byte| **byte == b'#')
        .count();
    if prefix > 2 || rest.get(prefix + hashes) != Some(&b'"') {
        return None;
    }
    let raw = rest[..prefix].contains(&b'r');
    (raw || hashes == 0).then_some((prefix + hashes + 1, raw.then_some(hashes)))
}

/// The length of a character literal, 0 for a lifetime.
fn char_literal(rest: &[u8]) -> usize {
    match rest {
        [b'\'', b'\\', ..] => rest
            .iter()
            .skip(3)
            .position(|byte| *byte == b'\'')
            .map_or(0, |found| found + 4),
        _ => rest
            .iter()
            .skip(2)
            .take(4)
            .position(|byte| *byte == b'\'')
            .filter(|found| *found == 0 || rest[1] >= 0x80)
            .map_or(0, |found| found + 3),
    }
}

/// Every path that begins with `crate::`, groups spelled out: `crate::{a, b::{c, d}}` names `a`,
/// `b::c` and `b::d`. Paths that begin with `millrace::` count as well: `main` is another crate.
fn crate_paths(code: &str) -> Vec<String> {
    let dense: String = {
        let mut dense = String::new();
        for word in code.split_whitespace() {
            if dense.ends_with(is_word) && word.starts_with(is_word) {
                dense.push(' ');
            }
            dense.push_str(word);
        }
        dense
    };
    let mut paths = Vec::new();
    for root in ["crate::", "millrace::"] {
        for (at, _) in dense.match_indices(root) {
            if !dense[..at].ends_with(is_word) {
                expand(&dense[at + root.len()..], "", &mut paths);
            }
        }
    }
    paths
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Reads one path or group at the start of `text` and returns what follows it.
fn expand<'t>(text: &'t str, prefix: &str, paths: &mut Vec<String>) -> &'t str {
    if let Some(mut rest) = text.strip_prefix('{') {
        while !rest.starts_with('}') && !rest.is_empty() {
            rest = expand(rest, prefix, paths);
            // `as name`, commas.
            rest = rest.trim_start_matches(|character| character != ',' && character != '}');
            rest = rest.trim_start_matches(',');
        }
        return rest.strip_prefix('}').unwrap_or(rest);
    }
    let end = text
        .find(|character| !is_word(character))
        .unwrap_or(text.len());
    let path = format!("{prefix}{}", &text[..end]);
    match text[end..].strip_prefix("::") {
        Some(rest) if rest.starts_with(|next| is_word(next) || next == '{') => {
            expand(rest, &format!("{path}::"), paths)
        }
        _ => {
            paths.push(path);
            &text[end..]
        }
    }
}

/// The crates, and first modules, that code names in paths: every `name::`.
fn names(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let (before, after) = (&code[..at], &code[at + name.len()..]);
        let alone = !before.ends_with(|c| is_word(c) || c == ':' || c == '.');
        alone && (after.starts_with("::") || (after.starts_with(';') && before.ends_with("use ")))
    })
}

// --- Rules ----------------------------------------------------------------------------------

fn floor(module: &str) -> Option<u8> {
    FLOORS
        .iter()
        .find(|(name, _)| *name == module)
        .map(|(_, floor)| *floor)
}

fn floors(source: &Source, broken: &mut Vec<String>) {
    let module = source.module();
    if module == "lib" {
        return;
    }
    let Some(own) = floor(module) else {
        broken.push(format!(
            "{}: `{module}` has no floor; give it one in FLOORS",
            source.path
        ));
        return;
    };
    for path in crate_paths(&source.code) {
        let named = path.split("::").next().unwrap_or(&path);
        if named == module && module != "loadgen" {
            continue;
        }
        let excepted = SIBLINGS
            .iter()
            .any(|(file, excepted, _)| source.is_in(file) && path.starts_with(excepted));
        let below = floor(named).is_some_and(|floor| floor < own);
        if module == "loadgen" && named != "loadgen" {
            broken.push(format!(
                "{}: loadgen speaks only HTTP, and names crate::{path}",
                source.path
            ));
        } else if !below && !excepted && named != module {
            broken.push(format!("{}: floor {own} names crate::{path}", source.path));
        }
    }
}

fn crates(source: &Source, broken: &mut Vec<String>) {
    let mut deny = |crates: &[&str], why: &str| {
        for name in crates.iter().filter(|name| names(&source.code, name)) {
            broken.push(format!("{}: names `{name}`: {why}", source.path));
        }
    };
    if source.is_in("src/state/") {
        deny(
            &["tokio", "tokio_postgres"],
            "state is plain memory, usable from any thread",
        );
    }
    if !source.is_in("src/http/server/") && !source.is_in("src/http/data_plane/") {
        deny(
            &["may", "may_minihttp"],
            "coroutines stay in the server and the data plane",
        );
    }
    if floor(source.module()).is_some_and(|floor| floor < 3) {
        let http = [
            "axum",
            "hyper",
            "hyper_util",
            "http_body_util",
            "httparse",
            "http",
        ];
        deny(&http, "HTTP begins at floor 3");
    }
    if !source.is_in("src/store/") {
        let postgres = ["tokio_postgres", "deadpool_postgres", "refinery"];
        deny(&postgres, "the database is spoken to in store");
    }
}

fn sql(source: &Source, broken: &mut Vec<String>) {
    if source.is_in("src/store/") {
        return;
    }
    for text in &source.strings {
        let words: Vec<&str> = text
            .split(|c: char| !is_word(c))
            .filter(|word| !word.is_empty())
            .collect();
        let has = |word: &str| words.contains(&word);
        let pair = |a: &str, b: &str| words.windows(2).any(|pair| pair == [a, b]);
        if has("SELECT")
            || pair("INSERT", "INTO")
            || pair("DELETE", "FROM")
            || (has("UPDATE") && has("SET"))
            || pair("CREATE", "TABLE")
        {
            broken.push(format!("{}: SQL outside store: {text:?}", source.path));
        }
    }
}

/// Bodies are decoded in one place: `serde_json` by itself takes an array for any struct.
fn json(source: &Source, broken: &mut Vec<String>) {
    if !source.is_in("src/http/") || source.path == "src/http/wire/json.rs" {
        return;
    }
    let words = [
        "serde_json::from_",
        "serde_json::Deserializer",
        "axum::extract::Json",
    ];
    for word in words.iter().filter(|word| source.code.contains(**word)) {
        broken.push(format!(
            "{}: {word}: JSON is read by http::wire::json::from_object and from_callback",
            source.path
        ));
    }
}

/// Printing panics where standard error or output cannot be written, and waits where nobody reads.
fn printing(source: &Source, broken: &mut Vec<String>) {
    if source.path.ends_with("/tests.rs") {
        return;
    }
    for name in ["print!", "println!", "eprint!", "eprintln!", "dbg!"] {
        let mut found = source.code.match_indices(name);
        if found.any(|(at, _)| !source.code[..at].ends_with(is_word)) {
            broken.push(format!(
                "{}: `{name}`: give the text to `logging::say` or `cli::output`",
                source.path
            ));
        }
    }
}

fn unsafe_code(source: &Source, broken: &mut Vec<String>) {
    let has = source.code.match_indices("unsafe").any(|(at, word)| {
        let (before, after) = (&source.code[..at], &source.code[at + word.len()..]);
        !before.ends_with(is_word) && !after.starts_with(is_word)
    });
    let listed = UNSAFE.contains(&source.path.as_str());
    if has && !(listed && source.header.to_lowercase().contains("unsafe")) {
        broken.push(format!(
            "{}: `unsafe` in a file that is not listed in UNSAFE or whose header does not say why",
            source.path
        ));
    }
}

/// How many tasks, threads and coroutines a file starts by itself.
fn starts(source: &Source) -> usize {
    STARTS
        .iter()
        .map(|start| source.code.matches(start).count())
        .sum()
}

fn supervision(source: &Source, broken: &mut Vec<String>) {
    let excepted = UNSUPERVISED
        .iter()
        .find(|(path, _, _)| source.is_in(path))
        .map_or(0, |(_, count, _)| *count);
    let found = starts(source);
    if found > excepted {
        broken.push(format!(
            "{}: starts {found} tasks, threads or coroutines without supervision; see src/supervise.rs",
            source.path
        ));
    }
}

fn length(source: &Source, broken: &mut Vec<String>) {
    let long = LONG.iter().any(|(path, _)| *path == source.path);
    if source.code_lines > CODE_LINES_MAX && !long {
        broken.push(format!(
            "{}: {} lines of code; make it a folder of nouns",
            source.path, source.code_lines
        ));
    }
}

fn check(source: &Source) -> Vec<String> {
    let mut broken = Vec::new();
    floors(source, &mut broken);
    crates(source, &mut broken);
    sql(source, &mut broken);
    printing(source, &mut broken);
    json(source, &mut broken);
    unsafe_code(source, &mut broken);
    supervision(source, &mut broken);
    length(source, &mut broken);
    broken
}

// --- Tests ----------------------------------------------------------------------------------

fn sources() -> Vec<Source> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    walk(&root.join("src"), &mut files);
    files.sort();
    files
        .iter()
        .map(|file| {
            let path = file
                .strip_prefix(root)
                .unwrap()
                .to_str()
                .unwrap()
                .replace('\\', "/");
            Source::new(&path, &fs::read_to_string(file).unwrap())
        })
        .collect()
}

#[test]
fn the_house_stands_as_it_is_drawn() {
    let sources = sources();
    assert!(sources.len() > 20, "found only {} files", sources.len());
    let broken: Vec<_> = sources.iter().flat_map(check).collect();
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn every_module_has_a_floor_and_every_floor_its_module() {
    let modules: BTreeSet<_> = sources()
        .iter()
        .map(|source| source.module().to_owned())
        .collect();
    let floors: BTreeSet<_> = FLOORS
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .chain(["lib".to_owned()])
        .collect();
    assert_eq!(modules, floors);
}

#[test]
fn no_exception_outlives_its_reason() {
    let sources = sources();
    for (file, path, why) in SIBLINGS {
        let used = sources
            .iter()
            .filter(|source| source.is_in(file))
            .any(|source| {
                crate_paths(&source.code)
                    .iter()
                    .any(|named| named.starts_with(path))
            });
        // The load generator's commands come after its floor.
        assert!(
            used || *path == "loadgen",
            "{file} names {path} no more ({why})"
        );
    }
    for path in UNSAFE {
        assert!(
            sources
                .iter()
                .any(|source| source.path == *path && source.code.contains("unsafe"))
        );
    }
    for (path, count, why) in UNSUPERVISED {
        let found: usize = sources
            .iter()
            .filter(|source| source.is_in(path))
            .map(starts)
            .sum();
        assert!(
            found == *count || *count == usize::MAX,
            "{path} starts {found} by itself, not {count} ({why})"
        );
    }
    for (path, _) in LONG {
        assert!(
            sources
                .iter()
                .any(|s| s.path == *path && s.code_lines > CODE_LINES_MAX),
            "{path}"
        );
    }
}

#[test]
fn the_checker_finds_every_kind_of_violation() {
    let cases = [
        (
            "src/order/a.rs",
            "use crate::state::buyers::Buyers;",
            "floor 0 names crate::state::buyers::Buyers",
        ),
        (
            "src/order/a.rs",
            "use crate::{order::Order, queue};",
            "floor 0 names crate::queue",
        ),
        (
            "src/pipeline/a.rs",
            "fn f() { crate::http::wire::json::from_object(b\"\"); }",
            "floor 2 names crate::http",
        ),
        (
            "src/pipeline/a.rs",
            "use crate::{\n    order::{Order as O, Quantity},\n    app::{self as a},\n};",
            "floor 2 names crate::app::self",
        ),
        (
            "src/store/a.rs",
            "use crate::state::stock::Sku;",
            "floor 1 names crate::state::stock::Sku",
        ),
        (
            "src/state/a.rs",
            "use crate :: queue :: RingQueue;",
            "floor 1 names crate::queue",
        ),
        (
            "src/queue/a.rs",
            "use crate::state::buyers::Buyers;",
            "floor 1 names crate::state::buyers",
        ),
        (
            "src/loadgen/a.rs",
            "use crate::order::OrderId;",
            "loadgen speaks only HTTP",
        ),
        ("src/payments.rs", "", "has no floor"),
        (
            "src/cli/a.rs",
            "fn f() { eprintln!(\"done\") }",
            "`eprintln!`: give the text to `logging::say`",
        ),
        (
            "src/state/a.rs",
            "use tokio::sync::Notify;",
            "names `tokio`",
        ),
        (
            "src/state/a.rs",
            "fn f(n: &::tokio::sync::Notify) {}\nuse tokio;",
            "names `tokio`",
        ),
        (
            "src/pipeline/a.rs",
            "fn f() { may::coroutine::yield_now() }",
            "names `may`",
        ),
        (
            "src/http/control_plane/a.rs",
            "use may_minihttp::HttpServer;",
            "names `may_minihttp`",
        ),
        ("src/store/a.rs", "use hyper::Request;", "names `hyper`"),
        ("src/pipeline/a.rs", "use axum::Router;", "names `axum`"),
        (
            "src/order/a.rs",
            "use httparse::Header;",
            "names `httparse`",
        ),
        (
            "src/app/mod.rs",
            "use tokio_postgres::Client;",
            "names `tokio_postgres`",
        ),
        (
            "src/pipeline/a.rs",
            "const Q: &str = \"SELECT 1\";",
            "SQL outside store",
        ),
        (
            "src/http/a.rs",
            "const Q: &str = r#\"with x as (INSERT\n INTO y)\"#;",
            "SQL outside store",
        ),
        (
            "src/http/a.rs",
            "const Q: &str = \"UPDATE sku SET held = 0\";",
            "SQL outside store",
        ),
        (
            "src/http/a.rs",
            "const Q: &str = \"CREATE TABLE x\";",
            "SQL outside store",
        ),
        (
            "src/http/a.rs",
            "fn f(b: &[u8]) { serde_json::from_slice::<B>(b); }",
            "JSON is read by",
        ),
        (
            "src/http/a.rs",
            "fn f() { unsafe { g() } }",
            "`unsafe` in a file",
        ),
        (
            "src/pipeline/a.rs",
            "fn f() { tokio::spawn(g()); }",
            "without supervision",
        ),
        (
            "src/app/mod.rs",
            "fn f() { std::thread::Builder::new().spawn(|| g()); }",
            "without supervision",
        ),
        (
            "src/http/data_plane/a.rs",
            "fn f() { may::go!(|| g()); }",
            "without supervision",
        ),
    ];
    for (path, text, expected) in cases {
        let broken = check(&Source::new(path, text));
        assert!(
            broken.len() == 1 && broken[0].contains(expected),
            "{path}: {text}\n  expected: {expected}\n  found: {broken:?}"
        );
    }
    let long = Source::new("src/order/a.rs", &"fn f() {}\n".repeat(CODE_LINES_MAX + 1));
    assert!(check(&long)[0].contains("lines of code"));
}

#[test]
fn the_checker_lets_pass_what_is_allowed() {
    let cases = [
        (
            "src/order/a.rs",
            "use super::UnixMillis; // as crate::http does\n/* unsafe, tokio:: */",
        ),
        (
            "src/order/a.rs",
            "/// Not [`crate::http`], nor SELECT.\nconst A: &str = \"crate::http tokio::\";",
        ),
        (
            "src/state/a.rs",
            "use crate::order::Order;\n\n#[cfg(test)]\nmod tests {\n    use crate::http::wire;\n}\n",
        ),
        (
            "src/queue/a.rs",
            "use crate::state::pending::PendingOrder;\nuse tokio::sync::Notify;",
        ),
        (
            "src/http/data_plane/a.rs",
            "use may::sync::Mutex; use crate::pipeline::WakeAll;",
        ),
        (
            "src/http/a.rs",
            "const A: &str = \"an update may set it; select one\"; fn f<'a>(c: &'a char) { let _ = (b'\"', '\"', '\\'', \"\\\"\"); }",
        ),
        (
            "src/store/a.rs",
            "const A: &str = \"SELECT 1\"; use crate::store::postgres; fn dismay() { unsafe_looking(); }",
        ),
        (
            "src/cli/a.rs",
            "use crate::loadgen; use hyper::Request; pub(in crate::cli) fn f() {}",
        ),
        (
            "src/loadgen/a.rs",
            "use hyper::Request; use crate::loadgen::plan;",
        ),
        ("src/main.rs", "fn main() { millrace::cli::main() }"),
        ("src/lib.rs", "pub mod app;"),
    ];
    for (path, text) in cases {
        assert_eq!(
            check(&Source::new(path, text)),
            Vec::<String>::new(),
            "{path}: {text}"
        );
    }
    let commented = "// no code\n\n".repeat(CODE_LINES_MAX + 1);
    assert_eq!(
        check(&Source::new("src/order/a.rs", &commented)),
        Vec::<String>::new()
    );
}

#[test]
fn a_source_is_cut_where_rust_cuts_it() {
    let (code, strings) =
        cut("a /* b /* c */ \" */ d // \"e\n\"f\\\"\" r#\"g\"h\"# b'\"' 'i' '\\'' &'j k");
    assert_eq!(
        code.replace('\n', " ")
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "),
        "a d \"\" \"\" b' ' ' ' ' ' &'j k"
    );
    assert_eq!(strings, ["f\\\"", "g\"h"]);
}
