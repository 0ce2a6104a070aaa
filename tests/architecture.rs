//! The floors of the house: what may name what. A module names only floors below its own;
//! siblings on one floor never name each other, but for the few exceptions below.
//!
//! The methods of a type are in one file.
//!
//! The checks read tokens, bodies of macros included. Comments, docs and unit tests are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::{fs, path::Path, sync::LazyLock};

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use quote::ToTokens;
use walkdir::WalkDir;

/// Floor by module; the table of ARCHITECTURE.md.
const FLOORS: &[(&str, u8)] = &[
    ("order", 0),
    ("backoff", 0),
    ("config", 0),
    ("metrics", 0),
    ("clock", 0),
    ("faults", 0),
    ("simulated", 0),
    ("sync", 0),
    ("supervise", 0),
    ("profile", 0),
    ("logging", 0),
    ("spans", 0),
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
        "src/order/",
        "clock",
        "clocks are read in one place, which a simulation replaces",
    ),
    (
        "src/clock.rs",
        "faults",
        "the wall clock is read in one place, where a test can set it off",
    ),
    (
        "src/clock.rs",
        "simulated",
        "a simulation has clocks of its own",
    ),
    (
        "src/faults.rs",
        "simulated",
        "each simulation of a test has its own deliberate faults",
    ),
    (
        "src/backoff.rs",
        "simulated",
        "chance is a simulation's own, so that its seed repeats it",
    ),
    (
        "src/sync.rs",
        "simulated",
        "in a test build threads may be a simulation's",
    ),
    (
        "src/spans/",
        "order::OrderId",
        "a sampled order is known by its id, to whoever claims it",
    ),
    ("src/main.rs", "cli", "the program is its command line"),
    (
        "src/cli/",
        "loadgen",
        "the commands `load` and `demo` start the load generator",
    ),
];

/// What starts a task, thread or coroutine.
const STARTS: &[&str] = &["tokio::spawn(", "thread::spawn(", ".spawn(", "go!"];

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
        "src/queue/logged/queue.rs",
        1,
        "the durable queue's threads report by themselves, so that shuttle can run them",
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
        "src/http/peers/server.rs",
        3,
        "a connection, whose end its caller sees; its feeder, whose end ends the connection; a call, which its caller \
         waits for",
    ),
    (
        "src/http/peers/outbox.rs",
        1,
        "the gatherer, without which links time out and are opened again",
    ),
    (
        "src/http/otlp.rs",
        1,
        "a request of the exporter of spans, which waits for it",
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
        "src/pipeline/failover/log_replay.rs",
        1,
        "a look-up, which the replay waits for",
    ),
    (
        "src/store/postgres/connector.rs",
        1,
        "a connection, whose end its user sees",
    ),
    (
        "src/store/postgres/replication_stream.rs",
        1,
        "the relay of a stream of changes, which ends with it; whoever reads it sees the end",
    ),
    (
        "src/simulated.rs",
        4,
        "in test builds alone: what a simulation's process starts, whose end the simulation sees",
    ),
    (
        "src/store/embedded/mod.rs",
        2,
        "a connection; the bound on a log file, which is begun anew with the server",
    ),
    (
        "src/store/embedded/server.rs",
        1,
        "`pg_ctl`, whose end the start waits for",
    ),
];

const CODE_LINES_MAX: usize = 500;

/// Files that have outgrown [`CODE_LINES_MAX`], with the reason why they stay whole.
const LONG: &[(&str, &str)] = &[];

// --- Reading --------------------------------------------------------------------------------

/// A source file without comments, docs and the module of its unit tests.
#[derive(Default)]
struct Source {
    /// Relative to the repository, with `/`.
    path: String,
    /// Each path in full, groups of `use` spelled out: `crate::{a, b::{c, d}}` is `crate::a`,
    /// `crate::b::c` and `crate::b::d`. A call ends in `(`, a macro in `!`, a method begins with `.`.
    words: Vec<String>,
    /// The values of string literals.
    strings: Vec<String>,
    /// The lines that hold a token.
    lines: BTreeSet<usize>,
    /// The types that are defined here.
    types: BTreeSet<String>,
    /// The types that have methods of their own here, not of a trait.
    impls: BTreeSet<String>,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let mut file = syn::parse_file(text).unwrap_or_else(|error| panic!("{path}: {error}"));
        let is_test = |attribute: &syn::Attribute| {
            attribute.to_token_stream().to_string() == "# [cfg (test)]"
        };
        file.items.retain(
            |item| !matches!(item, syn::Item::Mod(module) if module.attrs.iter().any(is_test)),
        );
        let mut source = Source {
            path: path.to_owned(),
            ..Source::default()
        };
        source.note_types(&file.items);
        source.read(file.into_token_stream());
        source
    }

    fn note_types(&mut self, items: &[syn::Item]) {
        for item in items {
            let defined = match item {
                syn::Item::Enum(item) => &item.ident,
                syn::Item::Struct(item) => &item.ident,
                syn::Item::Union(item) => &item.ident,
                syn::Item::Impl(item) => {
                    if let syn::Type::Path(of) = &*item.self_ty
                        && let (None, Some(name)) = (&item.trait_, of.path.segments.last())
                    {
                        self.impls.insert(name.ident.to_string());
                    }
                    continue;
                }
                syn::Item::Mod(module) => {
                    let inside = module.content.as_ref().map(|(_, items)| items.as_slice());
                    self.note_types(inside.unwrap_or_default());
                    continue;
                }
                _ => continue,
            };
            self.types.insert(defined.to_string());
        }
    }

    fn read(&mut self, tokens: TokenStream) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut rest = &tokens[..];
        let mut before = String::new();
        while let Some((first, after)) = rest.split_first() {
            self.lines.insert(first.span().start().line);
            self.lines.insert(first.span().end().line);
            match first {
                TokenTree::Group(group) => {
                    let inside = group.stream();
                    let docs = before == "#" || before == "!";
                    if !(docs && inside.to_string().starts_with("doc =")) {
                        self.read(inside);
                    } else {
                        let (start, end) = (group.span().start().line, group.span().end().line);
                        (start..=end).for_each(|line| _ = self.lines.remove(&line));
                    }
                }
                TokenTree::Literal(literal) => match syn::Lit::new(literal.clone()) {
                    syn::Lit::Str(text) => self.strings.push(text.value()),
                    syn::Lit::ByteStr(text) => self
                        .strings
                        .push(String::from_utf8_lossy(&text.value()).into_owned()),
                    _ => {}
                },
                TokenTree::Ident(_) => {
                    let start = self.words.len();
                    let end = self.word(rest, "");
                    for word in &mut self.words[start..] {
                        match before.as_str() {
                            "." => word.insert(0, '.'),
                            "use" if !word.contains("::") => word.push_str("::self"),
                            _ => {}
                        }
                    }
                    before = first.to_string();
                    for token in &rest[..rest.len() - end.len()] {
                        let span = token.span();
                        self.lines.extend(span.start().line..=span.end().line);
                    }
                    rest = end;
                    continue;
                }
                TokenTree::Punct(_) => {}
            }
            before = match first {
                TokenTree::Group(_) => String::new(),
                other => other.to_string(),
            };
            rest = after;
        }
    }

    /// Reads the path at the start of `tokens` and returns what follows it.
    fn word<'t>(&mut self, tokens: &'t [TokenTree], prefix: &str) -> &'t [TokenTree] {
        let [TokenTree::Ident(name), after @ ..] = tokens else {
            return &tokens[1..];
        };
        let path = format!("{prefix}{name}");
        if is_sign(after.first(), ':') && is_sign(after.get(1), ':') {
            match after.get(2) {
                Some(TokenTree::Ident(_)) => return self.word(&after[2..], &format!("{path}::")),
                Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                    let names: Vec<_> = group.stream().into_iter().collect();
                    for name in names.split(|token| is_sign(Some(token), ',')) {
                        if !name.is_empty() {
                            self.word(name, &format!("{path}::"));
                        }
                    }
                    return &after[3..];
                }
                _ => {}
            }
        }
        let end = match after {
            [TokenTree::Group(group), ..] if group.delimiter() == Delimiter::Parenthesis => "(",
            [TokenTree::Punct(sign), TokenTree::Group(_), ..] if sign.as_char() == '!' => "!",
            _ => "",
        };
        self.words.push(path + end);
        after
    }

    /// The paths below the crate's root. `main` is another crate, so it names `millrace`.
    fn crate_paths(&self) -> impl Iterator<Item = &str> {
        self.words.iter().filter_map(|word| {
            let path = word
                .strip_prefix("crate::")
                .or_else(|| word.strip_prefix("millrace::"))?;
            Some(path.trim_end_matches(['(', '!']))
        })
    }

    /// How many tasks, threads and coroutines the file starts by itself.
    fn starts(&self) -> usize {
        let starts = |word: &&String| STARTS.iter().any(|start| word.ends_with(start));
        self.words.iter().filter(starts).count()
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

fn is_sign(token: Option<&TokenTree>, sign: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == sign)
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
    for path in source.crate_paths() {
        let named = path.split("::").next().unwrap_or(path);
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
        let named = |name: &&&str| {
            let inside = |word: &String| word.strip_prefix(**name)?.strip_prefix("::").map(|_| ());
            source.words.iter().any(|word| inside(word).is_some())
        };
        for name in crates.iter().filter(named) {
            broken.push(format!("{}: names `{name}`: {why}", source.path));
        }
    };
    if source.is_in("src/state/") {
        deny(
            &["tokio", "tokio_postgres"],
            "state is plain memory, usable from any thread",
        );
    }
    let on_coroutines = [
        "src/http/server/",
        "src/http/data_plane/",
        "src/http/peers/",
    ];
    if !on_coroutines.iter().any(|folder| source.is_in(folder)) {
        deny(
            &["may", "may_minihttp"],
            "coroutines stay in the server, the data plane and the link between nodes",
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
            .split(|c: char| !c.is_alphanumeric() && c != '_')
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
    let decoders = [
        "serde_json::from_",
        "serde_json::Deserializer",
        "axum::extract::Json",
    ];
    let decodes = |word: &&str| source.words.iter().any(|path| path.starts_with(*word));
    for word in decoders.iter().filter(|word| decodes(word)) {
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
        let prints = |word: &String| word.rsplit("::").next() == Some(name);
        if source.words.iter().any(prints) {
            broken.push(format!(
                "{}: `{name}`: give the text to `logging::say` or `cli::output`",
                source.path
            ));
        }
    }
}

fn unsafe_code(source: &Source, broken: &mut Vec<String>) {
    if source
        .words
        .iter()
        .any(|word| word.trim_end_matches('(') == "unsafe")
    {
        broken.push(format!(
            "{}: `unsafe`: Millrace has none of its own",
            source.path
        ));
    }
}

fn supervision(source: &Source, broken: &mut Vec<String>) {
    let excepted = UNSUPERVISED
        .iter()
        .find(|(path, _, _)| source.is_in(path))
        .map_or(0, |(_, count, _)| *count);
    let found = source.starts();
    if found > excepted {
        broken.push(format!(
            "{}: starts {found} tasks, threads or coroutines without supervision; see src/supervise.rs",
            source.path
        ));
    }
}

fn length(source: &Source, broken: &mut Vec<String>) {
    let long = LONG.iter().any(|(path, _)| *path == source.path);
    if source.lines.len() > CODE_LINES_MAX && !long {
        broken.push(format!(
            "{}: {} lines of code; make it a folder of nouns",
            source.path,
            source.lines.len()
        ));
    }
}

/// The file that defines the type `name` of `at`: `at` itself, or the nearest one.
fn definition<'s>(sources: &'s [Source], at: &Source, name: &str) -> Option<&'s str> {
    let nearness = |path: &&str| {
        let (own, other) = (at.path.split('/'), path.split('/'));
        let shared = own.zip(other).take_while(|(own, other)| own == other);
        (shared.count(), path.ends_with("/mod.rs"))
    };
    let definitions = sources.iter().filter(|source| source.types.contains(name));
    definitions
        .map(|source| source.path.as_str())
        .max_by_key(nearness)
}

/// The methods of a type are in one file. Another file of its module has functions that take the type.
fn spread(sources: &[Source]) -> Vec<String> {
    let mut files: BTreeMap<_, Vec<&str>> = BTreeMap::new();
    for source in sources {
        for name in &source.impls {
            let of = (definition(sources, source, name), name);
            files.entry(of).or_default().push(&source.path);
        }
    }
    files.retain(|_, files| files.len() > 1);
    let told = files.iter().map(|((_, name), files)| {
        format!("`impl {name}` is in several files: {}", files.join(", "))
    });
    told.collect()
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

static SOURCES: LazyLock<Vec<Source>> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    WalkDir::new(root.join("src"))
        .sort_by_file_name()
        .into_iter()
        .map(|entry| entry.unwrap().into_path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|file| {
            let path = file.strip_prefix(root).unwrap().to_str().unwrap();
            Source::new(path, &fs::read_to_string(&file).unwrap())
        })
        .collect()
});

#[test]
fn the_house_stands_as_it_is_drawn() {
    assert!(SOURCES.len() > 20, "found only {} files", SOURCES.len());
    let broken: Vec<_> = SOURCES.iter().flat_map(check).collect();
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn the_methods_of_a_type_are_in_one_file() {
    let spread = spread(&SOURCES);
    assert!(spread.is_empty(), "\n{}\n", spread.join("\n"));
}

#[test]
fn every_module_has_a_floor_and_every_floor_its_module() {
    let modules: BTreeSet<_> = SOURCES
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
    for (file, path, why) in SIBLINGS {
        let used = SOURCES
            .iter()
            .filter(|source| source.is_in(file))
            .any(|source| source.crate_paths().any(|named| named.starts_with(path)));
        // The load generator's commands come after its floor.
        assert!(
            used || *path == "loadgen",
            "{file} names {path} no more ({why})"
        );
    }
    for (path, count, why) in UNSUPERVISED {
        let found: usize = SOURCES
            .iter()
            .filter(|source| source.is_in(path))
            .map(Source::starts)
            .sum();
        assert!(
            found == *count || *count == usize::MAX,
            "{path} starts {found} by itself, not {count} ({why})"
        );
    }
    for (path, _) in LONG {
        assert!(
            SOURCES
                .iter()
                .any(|s| s.path == *path && s.lines.len() > CODE_LINES_MAX),
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
            "src/pipeline/a.rs",
            "fn f() { tokio::select! { _ = crate::http::wire::f() => {} } }",
            "floor 2 names crate::http::wire::f",
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
            "`unsafe`: Millrace has none",
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
fn the_checker_finds_methods_in_a_second_file() {
    let told = |files: &[(&str, &str)]| {
        let sources = files.iter().map(|(path, text)| Source::new(path, text));
        spread(&sources.collect::<Vec<_>>())
    };
    let own = ("src/store/mod.rs", "struct A<T>(T);\nimpl<T> A<T> {}");
    for second in [
        "use super::A;\nimpl A<u8> {}",
        "mod inner { impl crate::store::A<u8> {} }",
    ] {
        assert_eq!(
            told(&[own, ("src/store/b.rs", second)]),
            ["`impl A` is in several files: src/store/mod.rs, src/store/b.rs"]
        );
    }
    for allowed in [
        "impl Clone for super::A<u8> {}",
        "enum A {}\nimpl A {}\nimpl A {}",
        "#[cfg(test)]\nmod tests {\n    impl super::super::A<u8> {}\n}",
    ] {
        assert_eq!(
            told(&[own, ("src/store/b.rs", allowed)]),
            Vec::<String>::new()
        );
    }
    let apart = ("src/store/b.rs", "impl super::A {}");
    let defined = ("src/store/mod.rs", "enum A {}");
    assert_eq!(told(&[defined, apart]), Vec::<String>::new());
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
