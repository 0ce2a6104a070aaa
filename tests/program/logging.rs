//! Whatever becomes of standard error, the service goes on: the real binary with a log on a full
//! disk, on nothing, and on pipes that nobody reads or whose reader is gone.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::http::{Answer, Connection, call};
use crate::support::pipe;
use crate::support::postgres::{copy_template, options, test_dir};
use crate::support::served::{PATIENCE, Served, command, millrace, tail};
use crate::support::waiting::until;
use crate::support::webhook::{SECRET, sign};
use millrace::logging;
use millrace::store::embedded::{DATABASE, Embedded};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// Callbacks of a stranger: each would be a line of some 250 bytes, all together more than a pipe
/// of 64 KiB takes.
const FLOOD: usize = 400;

/// A PostgreSQL of the test's own, that it can restart under the server.
struct Postgres {
    runtime: Runtime,
    embedded: Option<Embedded>,
}

impl Postgres {
    fn start(dir: &Path) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let embedded = runtime.block_on(async {
            copy_template(dir).await;
            let embedded = Embedded::start(options(dir)).await;
            embedded.expect("start PostgreSQL")
        });
        Postgres {
            runtime,
            embedded: Some(embedded),
        }
    }

    fn embedded(&mut self) -> (&Runtime, &mut Embedded) {
        (&self.runtime, self.embedded.as_mut().expect("it runs"))
    }

    fn url(&mut self) -> String {
        self.embedded().1.url(DATABASE)
    }

    fn end(&mut self) {
        let (runtime, embedded) = self.embedded();
        let ended = runtime.block_on(embedded.stop_immediate());
        ended.expect("end PostgreSQL");
    }

    fn start_again(&mut self) {
        let (runtime, embedded) = self.embedded();
        let started = runtime.block_on(embedded.start_again());
        started.expect("start PostgreSQL again");
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(embedded) = self.embedded.take() {
            let _ = self.runtime.block_on(embedded.stop());
        }
    }
}

/// A server on a PostgreSQL of the test's, with the standard error that the test gives it.
struct Sale {
    served: Served,
    postgres: Postgres,
    buyers: u32,
    _dir: tempfile::TempDir,
}

impl Sale {
    /// `log` is where the test can read the log, if it can.
    fn start(stderr: impl FnOnce(Command) -> Command, log: &str) -> Self {
        let dir = test_dir();
        let [database, data_dir] = ["database", "data"].map(|name| {
            let made = dir.path().join(name);
            std::fs::create_dir(&made).expect("make a directory");
            made
        });
        let mut postgres = Postgres::start(&database);
        let settings = [
            ("MILLRACE_DATABASE__URL", postgres.url()),
            ("MILLRACE_PAYMENTS__STANDARD__SECRET", SECRET.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value));
        let mut command = stderr(command(&data_dir, &settings));
        command.stdout(Stdio::null());
        let served = Served::try_start_as(&mut command, &data_dir, Path::new(log));
        let served = served.unwrap_or_else(|ended| panic!("{}: {}", ended.status, ended.log));
        served.put_sku("A", 10_000);
        Sale {
            served,
            postgres,
            buyers: 0,
            _dir: dir,
        }
    }

    fn order(&mut self, prefer: &str) -> Answer {
        self.buyers += 1;
        let body = json!({ "user_id": format!("u-{}", self.buyers), "sku_id": "A" });
        let fields = [("Content-Type", "application/json"), ("Prefer", prefer)];
        let data = self.served.data;
        call(data, "POST", "/v1/orders", &fields, &body.to_string())
    }

    /// Orders of both models, strangers, and an operator in an emergency.
    fn is_well(&mut self) {
        let placed = self.order("wait=7");
        assert_eq!(placed.status, 201, "{placed:?}");
        let accepted = self.order("respond-async");
        assert_eq!(accepted.status, 202, "{accepted:?}");
        self.is_written(&accepted);
        let mut stranger = Connection::open(self.served.data).expect("connect");
        for _ in 0..FLOOD {
            let refused = stranger.send("POST", "/v1/payments/standard/notify", &[], "{}");
            assert_eq!(refused.expect("an answer").status, 401);
        }
        for (act, then) in [("pause", 409), ("resume", 201)] {
            let target = format!("/admin/v1/skus/A/{act}");
            let answer = call(self.served.control, "POST", &target, &[], "");
            assert_eq!(answer.status, 200, "{act}: {answer:?}");
            let order = self.order("wait=7");
            assert_eq!(order.status, then, "after {act}: {order:?}");
        }
    }

    /// An authentic callback of the platform.
    fn callback(&self, provider: &str, body: &str) -> Answer {
        let (timestamp, signature) = sign("evt-1", body, SECRET);
        let fields = [
            ("webhook-id", "evt-1"),
            ("webhook-timestamp", &timestamp),
            ("webhook-signature", &signature),
        ];
        let target = format!("/v1/payments/{provider}/notify");
        call(self.served.data, "POST", &target, &fields, body)
    }

    fn is_written(&self, accepted: &Answer) {
        let id = accepted.json()["order_id"].as_str().map(str::to_owned);
        let target = format!("/v1/orders/{}", id.expect("an order"));
        let status = || {
            let order = call(self.served.data, "GET", &target, &[], "").json();
            order["status"].as_str().unwrap_or_default().to_owned()
        };
        until("the accepted order is written", PATIENCE, || {
            status() == "pending_payment"
        });
    }

    fn metric(&self, line: &str) -> u64 {
        let metrics = call(self.served.control, "GET", "/metrics", &[], "").body;
        let metrics = String::from_utf8_lossy(&metrics).into_owned();
        let value = metrics.lines().find_map(|found| found.strip_prefix(line));
        let value = value.unwrap_or_else(|| panic!("no {line} in {metrics}"));
        value.trim().parse().expect("a number")
    }

    /// Lines dropped for this reason.
    fn dropped(&self, reason: &str) -> u64 {
        self.metric(&format!(
            "millrace_log_lines_dropped_total{{reason=\"{reason}\"}}"
        ))
    }

    /// Well, also after a restart of PostgreSQL, and drained in the end.
    fn goes_on_and_drains(mut self, meanwhile: impl FnOnce(&Self)) {
        self.is_well();
        self.postgres.end();
        let accepted = self.order("respond-async");
        assert_eq!(
            accepted.status, 202,
            "while PostgreSQL is away: {accepted:?}"
        );
        self.postgres.start_again();
        self.is_written(&accepted);
        self.is_well();
        assert_eq!(self.metric("millrace_poisoned"), 0);
        assert_eq!(self.metric("millrace_orders_abandoned_total"), 0);
        // A stranger's flood is a few lines, whatever they are written to.
        assert!(self.dropped("limited") > FLOOD as u64);
        meanwhile(&self);
        self.served.terminate();
        assert_eq!(self.served.wait(), Some(0));
    }
}

/// A shell's command that becomes `$0`, the binary, with the environment of `served`.
fn in_shell(script: &str, served: &Command) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .arg(env!("CARGO_BIN_EXE_millrace"));
    for (name, value) in served.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

#[test]
fn a_log_on_a_full_disk_stops_nothing() {
    if !cfg!(target_os = "linux") {
        return;
    }
    let full = File::options().write(true).open("/dev/full");
    let full = full.expect("Linux has it");
    let sale = Sale::start(
        |mut command| {
            command.stderr(full);
            command
        },
        "",
    );
    sale.goes_on_and_drains(|sale| assert!(sale.dropped("sink") > 0));
}

#[test]
fn a_log_that_goes_nowhere_stops_nothing() {
    let sale = Sale::start(
        |served| {
            // What the shell does not have open, the process does not get.
            in_shell("exec \"$0\" serve 2>&-", &served)
        },
        "",
    );
    sale.goes_on_and_drains(|_| {});
}

#[test]
fn a_log_in_a_pipe_that_nobody_reads_stops_nothing() {
    let (reader, writer) = pipe::full();
    let sale = Sale::start(
        |mut command| {
            command.stderr(writer);
            command
        },
        "",
    );
    sale.goes_on_and_drains(|_| {});
    drop(reader);
}

#[test]
fn a_log_whose_reader_dies_stops_nothing() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut sale = Sale::start(
        |mut command| {
            command.stderr(writer);
            command
        },
        "",
    );
    sale.is_well();
    drop(reader);
    sale.goes_on_and_drains(|sale| assert!(sale.dropped("sink") > 0));
}

#[test]
fn a_log_in_a_file_has_the_addresses_first_and_of_a_flood_how_large_it_was() {
    let dir = test_dir();
    let path = dir.path().join("serve.log");
    let file = File::create(&path).expect("a file");
    let sale = Sale::start(
        |mut command| {
            command.stderr(file);
            command
        },
        path.to_str().expect("its name"),
    );
    let addresses = [sale.served.data, sale.served.control].map(|address| address.to_string());
    let held_back = std::cell::Cell::new(0);
    sale.goes_on_and_drains(|sale| {
        assert_eq!((sale.dropped("full"), sale.dropped("sink")), (0, 0));
        held_back.set(sale.dropped("limited"));
        let unknown = sale.callback("standard", r#"{"type": "payment.suceeded"}"#);
        assert_eq!(unknown.status, 200, "{unknown:?}");
        assert_eq!(sale.callback("stripe", "{}").status, 404);
    });
    let text = std::fs::read_to_string(&path).expect("the log");
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect();
    let first = lines.iter().take(2).map(|line| line["address"].clone());
    assert_eq!(first.collect::<Vec<_>>(), addresses, "{text}");
    let line = |message: &str| {
        let found = lines.iter().find(|line| line["message"] == message);
        found.unwrap_or_else(|| panic!("no {message:?} in {text}"))
    };
    let stored = line("a callback that reports no payment was stored");
    assert_eq!(
        (&stored["level"], &stored["kind"]),
        (&json!("INFO"), &json!("payment.suceeded"))
    );
    let unset = line("a payment callback was answered 404: its provider is not configured");
    assert_eq!(unset["setting"], "payments.stripe");
    let mut kinds: HashMap<&str, u64> = HashMap::new();
    for line in &lines {
        *kinds
            .entry(line["message"].as_str().unwrap_or_default())
            .or_default() += 1;
    }
    let refused = "a payment callback with a false signature was refused";
    assert!((1..=60).contains(&kinds[refused]), "{kinds:?}");
    let told: u64 = lines
        .iter()
        .filter(|line| line["level"] == "WARN")
        .filter(|line| {
            let message = line["message"].as_str().unwrap_or_default();
            message.contains(" more in ") && message.ends_with(refused)
        })
        .filter_map(|line| line["held_back"].as_u64())
        .sum();
    assert_eq!(told + kinds[refused], 2 * FLOOD as u64, "{text}");
    assert!(held_back.get() >= told);
    assert_eq!(kinds["stopped"], 1, "the end is written as well");
}

#[test]
fn a_server_below_nohup_outlives_its_terminal() {
    if !cfg!(target_os = "linux") {
        return;
    }
    let dir = test_dir();
    let log = dir.path().join("serve.log");
    let file = File::create(&log).expect("a file");
    let mut sale = Sale::start(
        |served| {
            let mut command = in_shell("trap '' HUP; exec \"$0\" serve", &served);
            command.stderr(file);
            command
        },
        log.to_str().expect("its name"),
    );
    sale.served.signal(Signal::HUP);
    for _ in 0..20 {
        let placed = sale.order("wait=7");
        assert_eq!(placed.status, 201, "{placed:?}\n{}", tail(&log));
    }
    sale.served.terminate();
    assert_eq!(sale.served.wait(), Some(0));
}

/// In a process of its own, because the hook is the process's.
#[test]
fn a_panic_ends_its_thread_also_where_nobody_reads_the_log() {
    const ROLE: &str = "MILLRACE_TEST_PANICS";
    if std::env::var_os(ROLE).is_some() {
        logging::take_panics();
        let joined = std::thread::spawn(|| panic!("of the test")).join();
        logging::flush(Duration::from_millis(10));
        std::process::exit(if joined.is_err() { 7 } else { 8 });
    }
    let (reader, writer) = pipe::full();
    let itself = std::env::current_exe().expect("this program");
    let mut again = Command::new(itself);
    again
        .args(["--exact", "--nocapture"])
        .arg("logging::a_panic_ends_its_thread_also_where_nobody_reads_the_log")
        .env(ROLE, "1");
    assert_eq!(ends_by_itself(again.stderr(writer)), Some(7));
    drop(reader);
}

#[test]
fn a_worker_that_panics_ends_the_process_also_where_nobody_reads_the_log() {
    let (reader, writer) = pipe::full();
    let dir = test_dir();
    let mut postgres = Postgres::start(dir.path());
    let settings = [
        ("MILLRACE_DATABASE__URL", postgres.url()),
        ("MILLRACE_FAULT", "panic@a worker".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value));
    let mut served = command(&dir.path().join("data"), &settings);
    assert_eq!(ends_by_itself(served.stderr(writer)), Some(1));
    drop(reader);
}

/// The exit code of a process that ends in time.
fn ends_by_itself(command: &mut Command) -> Option<i32> {
    let child = command.stdout(Stdio::null()).spawn();
    let mut child = child.expect("start a process");
    let mut status = None;
    let deadline = Instant::now() + PATIENCE;
    while status.is_none() && Instant::now() < deadline {
        status = child.try_wait().expect("its status");
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
    status.and_then(|status| status.code())
}

#[test]
fn a_level_with_a_typing_error_is_refused_by_the_check_and_at_start() {
    for args in [&["config", "check", "--offline"][..], &["serve"]] {
        let output = millrace(args)
            .env("MILLRACE_LOG__LEVEL", "warning")
            .output()
            .expect("run");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(
            said.contains("log.level") && said.contains("\"warning\""),
            "{said}"
        );
    }
}

#[test]
fn a_result_that_nobody_reads_is_no_failure_and_one_that_is_lost_is() {
    for args in [
        &["config", "reference"][..],
        &["config", "check", "--offline"],
        &["migrate", "--print"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = millrace(args).stdout(writer).output().expect("run");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
    }
    if cfg!(target_os = "linux") {
        let full = File::options().write(true).open("/dev/full");
        let output = millrace(&["config", "reference"])
            .stdout(full.expect("Linux has it"))
            .output()
            .expect("run");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("cannot write to standard output"), "{said}");
    }
}
