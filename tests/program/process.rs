//! The real binary as a process: commands, exit codes, signals, and being killed.

use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::support::block_on;
use crate::support::http::{call, try_call};
use crate::support::postgres::{TestDatabase, connect, copy_template, test_dir};
use crate::support::served::{Ended, OwnPostgres, PATIENCE, Served, millrace};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Sends orders from several threads until `stop`; returns the ids that were told `201`.
fn rush(data: SocketAddr, round: usize, stop: &AtomicBool) -> Vec<String> {
    std::thread::scope(|scope| {
        let buyers: Vec<_> = (0..4)
            .map(|thread| {
                scope.spawn(move || {
                    let mut told = Vec::new();
                    for number in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let body = json!({ "user_id": format!("u-{round}-{thread}-{number}"), "sku_id": "A" });
                        let fields = [("Content-Type", "application/json"), ("Idempotency-Key", "k")];
                        match try_call(data, "POST", "/v1/orders", &fields, &body.to_string()) {
                            Ok(answer) if answer.status == 201 => {
                                told.extend(answer.json()["order_id"].as_str().map(str::to_owned));
                            }
                            Ok(answer) if answer.status == 503 => break,
                            Ok(answer) => panic!("{answer:?}"),
                            // The server is gone.
                            Err(_) => break,
                        }
                    }
                    told
                })
            })
            .collect();
        buyers
            .into_iter()
            .flat_map(|buyer| buyer.join().expect("a buyer"))
            .collect()
    })
}

fn assert_all_there(served: &Served, told: &[String]) {
    for id in told {
        let answer = call(served.data, "GET", &format!("/v1/orders/{id}"), &[], "");
        assert_eq!(answer.status, 200, "order {id} was told 201 and is lost");
    }
    let audit = call(served.control, "GET", "/admin/v1/audit", &[], "").json();
    assert_eq!(audit["ok"], true, "{audit:#}");
}

#[test]
fn sigterm_drains_and_nothing_told_is_lost() {
    drains(Signal::TERM);
}

/// A terminal that is closed, or a supervisor's HUP.
#[test]
fn sighup_drains_and_nothing_told_is_lost() {
    drains(Signal::HUP);
}

fn drains(signal: Signal) {
    let data_dir = test_dir();
    tokio::runtime::Runtime::new()
        .expect("a runtime")
        .block_on(copy_template(data_dir.path()));
    let served = Served::start(data_dir.path());
    served.put_sku("A", 100_000);
    let stop = AtomicBool::new(false);
    let told = std::thread::scope(|scope| {
        let rush = scope.spawn(|| rush(served.data, 0, &stop));
        wait_for_orders(&served, 50);
        served.signal(signal);
        // A second signal changes nothing.
        served.signal(signal);
        rush.join().expect("the rush")
    });
    assert_eq!(served.wait(), Some(0));
    assert!(told.len() >= 50);
    let served = Served::start(data_dir.path());
    assert_all_there(&served, &told);
    served.terminate();
    assert_eq!(served.wait(), Some(0));
}

#[test]
fn kill_9_loses_nothing_that_was_told_and_the_next_start_recovers_the_same_cluster() {
    let data_dir = test_dir();
    tokio::runtime::Runtime::new()
        .expect("a runtime")
        .block_on(copy_template(data_dir.path()));
    let mut told = Vec::new();
    let rounds: usize = std::env::var("MILLRACE_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2);
    for round in 0..rounds {
        let mut served = Served::start(data_dir.path());
        assert_all_there(&served, &told);
        served.put_sku("A", 100_000);
        let stop = AtomicBool::new(false);
        let before = told.len();
        let child = &mut served.child;
        let (data, control) = (served.data, served.control);
        told.extend(std::thread::scope(|scope| {
            let rush = scope.spawn(|| rush(data, round, &stop));
            wait_for_rows(control, before + 50);
            child.kill().expect("kill -9");
            rush.join().expect("the rush")
        }));
        assert!(
            told.len() >= before + 40,
            "the rush was told of {} orders",
            told.len() - before
        );
    }
    let served = Served::start(data_dir.path());
    assert_all_there(&served, &told);
    served.terminate();
    assert_eq!(served.wait(), Some(0));
}

/// A process whose clock is off by so many milliseconds.
fn start_off(
    data_dir: &Path,
    url: Option<&str>,
    off_ms: i64,
    more: &[(&str, &str)],
) -> Result<Served, Ended> {
    let owned = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let mut settings: Vec<_> = more
        .iter()
        .map(|(name, value)| owned(name, value))
        .collect();
    settings.push(owned("MILLRACE_FAULT", &format!("clock@{off_ms}")));
    settings.extend(url.map(|url| owned("MILLRACE_DATABASE__URL", url)));
    Served::try_start(data_dir, &settings, &data_dir.join("serve.log"))
}

const DAY_MS: i64 = 86_400_000;
const ALLOW_A_WEEK: (&str, &str) = ("MILLRACE_DATABASE__CLOCK_DIFFERENCE_MAX_MS", "604800000");

#[test]
fn a_start_by_a_clock_that_is_days_off_is_refused_and_leaves_no_trace() {
    block_on(async {
        let database = TestDatabase::create().await;
        let url = database.url();
        let data_dir = test_dir();
        // A clock that is a little off is nobody's fault.
        let served = start_off(data_dir.path(), Some(&url), 60_000, &[]).expect("it starts");
        served.put_sku("A", 10);
        let order = |served: &Served| {
            let body = json!({ "user_id": "u", "sku_id": "A" }).to_string();
            let fields = [
                ("Content-Type", "application/json"),
                ("Idempotency-Key", "k"),
            ];
            call(served.data, "POST", "/v1/orders", &fields, &body)
        };
        let placed = order(&served);
        assert_eq!(placed.status, 201, "{placed:?}");
        served.terminate();
        assert_eq!(served.wait(), Some(0));
        let admin = database.connect().await;
        let state = async || -> (i64, i64, i64) {
            let state = "SELECT epoch, ids_leased_until_ms,
                                (SELECT count(*) FROM millrace.orders WHERE status = 1)
                           FROM millrace.node";
            let row = admin.query_one(state, &[]).await.unwrap();
            (row.get(0), row.get(1), row.get(2))
        };
        let before = state().await;
        let two_days = 2 * DAY_MS + 3_600_000;
        for (off_ms, days) in [
            (two_days, "2 days"),
            (-two_days, "2 days"),
            (365 * DAY_MS, "days"),
        ] {
            let refused = start_off(data_dir.path(), Some(&url), off_ms, &[]);
            let refused = refused.err().expect("its clock is wrong");
            let says = [
                "this machine's clock says",
                days,
                "database.clock_difference_max_ms",
            ];
            for part in says {
                assert!(refused.log.contains(part), "{part}: {refused:?}");
            }
            assert_eq!(state().await, before, "{off_ms} ms off");
        }
        // One key has one order.
        let served = start_off(data_dir.path(), Some(&url), 0, &[]).expect("it starts");
        let again = order(&served);
        assert_eq!(again.status, 200, "{again:?}");
        assert_eq!(again.json()["order_id"], placed.json()["order_id"]);
        served.terminate();
        assert_eq!(served.wait(), Some(0));
        // An operator who knows better has the last word.
        let served = start_off(data_dir.path(), Some(&url), -2 * DAY_MS, &[ALLOW_A_WEEK]);
        let served = served.expect("it was allowed");
        served.terminate();
        assert_eq!(served.wait(), Some(0));
    });
}

/// Our own PostgreSQL has the same clock, so only what was noted before can be held against it.
#[test]
fn a_clock_that_is_behind_the_last_use_of_our_own_database_is_refused_until_it_is_allowed_once() {
    block_on(async {
        let data_dir = test_dir();
        copy_template(data_dir.path()).await;
        let start = |more: &[(&str, &str)]| start_off(data_dir.path(), None, 0, more);
        let served = start(&[]).expect("it starts");
        // As if the clock had been three days ahead until now.
        served.kill();
        let config = OwnPostgres::of(data_dir.path())
            .config()
            .expect("it goes on");
        let admin = connect(&config).await;
        let ahead = "UPDATE millrace.node SET started_at = started_at + interval '3 days'";
        admin.execute(ahead, &[]).await.unwrap();
        let refused = start(&[]).err().expect("its clock has gone back");
        let says = [
            "was in use at",
            "2 days later",
            "database.clock_difference_max_ms",
        ];
        for part in says {
            assert!(refused.log.contains(part), "{part}: {refused:?}");
        }
        let served = start(&[ALLOW_A_WEEK]).expect("it was allowed");
        served.terminate();
        assert_eq!(served.wait(), Some(0));
        let served = start(&[]).expect("the earlier clock is forgotten");
        served.terminate();
        assert_eq!(served.wait(), Some(0));
    });
}

fn wait_for_orders(served: &Served, orders: usize) {
    wait_for_rows(served.control, orders);
}

fn wait_for_rows(control: SocketAddr, orders: usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let audit = call(control, "GET", "/admin/v1/audit", &[], "").json();
        if audit["orders"].as_u64() >= Some(orders as u64) {
            return;
        }
        assert!(Instant::now() < deadline, "no orders: {audit:#}");
    }
}

#[test]
fn the_demo_keeps_every_promise_and_prints_its_figures() {
    let dir = test_dir();
    let page = dir.path().join("page.html");
    let output = millrace(&[
        "demo",
        "--json",
        "--stock",
        "200",
        "--rate",
        "1000",
        "--duration",
        "2",
        "--page",
    ])
    .arg(&page)
    .output()
    .expect("run the demo");
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}\n{:#}", figures["promises"]);
    // Its progress and no line of the server's, although hundreds of false callbacks were refused.
    let first: Vec<&str> = log
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(first[..2], ["Starting", "On"], "{log}");
    assert!(first.len() < 12 && first.ends_with(&["Auditing:"]), "{log}");
    let control = |c: char| c.is_control() && c != '\n';
    assert!(!log.contains(control) && !log.contains('{'), "{log}");
    assert_eq!(figures["ok"], true);
    let placed = figures["load"]["placed"].as_u64();
    assert!(
        placed > Some(100) && placed <= Some(200),
        "{placed:?} of 200"
    );
    let mut html = String::new();
    std::fs::File::open(page)
        .expect("the page")
        .read_to_string(&mut html)
        .expect("text");
    assert!(html.contains("Every unit that was wanted was ordered, and none twice at once"));
}

#[test]
fn the_demo_takes_the_configuration_or_says_why_it_does_not() {
    let dir = test_dir();
    let demo = |name: &str, value: &std::ffi::OsStr| {
        let output = millrace(&["demo"]).env(name, value).output();
        let output = output.expect("run the demo");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        said
    };
    // There is no PostgreSQL in it, and none is looked for elsewhere.
    let said = demo(
        "MILLRACE_DATABASE__EMBEDDED_BIN_DIR",
        dir.path().as_os_str(),
    );
    assert!(said.contains("database.embedded_bin_dir"), "{said}");
    assert_eq!(said.lines().count(), 2, "{said}");
    for (name, remedy) in [
        ("MILLRACE_DATABASE__URL", "--database-url"),
        ("MILLRACE_DATA_DIR", "--data-dir"),
        ("MILLRACE_ORDERS__PAYMENT_TTL_MS", "10 s"),
    ] {
        let said = demo(name, "5000".as_ref());
        assert!(said.contains(name) && said.contains(remedy), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let said = demo("MILLRACE_QUEUE__CAPACITY", "0".as_ref());
    assert!(said.contains("queue.capacity"), "{said}");
}

#[test]
fn a_missing_prerequisite_is_one_sentence_with_its_remedy() {
    let dir = test_dir();
    let output = millrace(&["serve"])
        .env("MILLRACE_DATA_DIR", dir.path())
        .env("MILLRACE_DATABASE__EMBEDDED_BIN_DIR", dir.path())
        .env("MILLRACE_DATA_PLANE__LISTEN", "127.0.0.1:0")
        .env("MILLRACE_CONTROL_PLANE__LISTEN", "127.0.0.1:0")
        .env("MILLRACE_LOG__LEVEL", "off")
        .output()
        .expect("run millrace");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("millrace: "), "{said}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let output = millrace(&["serve"])
        .env("MILLRACE_DATA_DIR", dir.path())
        .env(
            "MILLRACE_DATA_PLANE__LISTEN",
            taken.local_addr().expect("its address").to_string(),
        )
        .env("MILLRACE_LOG__LEVEL", "off")
        .output()
        .expect("run millrace");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        (output.status.code(), said.lines().count()),
        (Some(1), 1),
        "{said}"
    );
    assert!(said.contains("data_plane.listen"), "{said}");

    // A command that only looks makes no PostgreSQL to look at.
    let empty = test_dir();
    for (args, code) in [(["audit"], 1), (["preflight"], 2)] {
        let output = millrace(&args)
            .env("MILLRACE_DATA_DIR", empty.path())
            .output()
            .expect("run millrace");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains("no database to look at"), "{said}");
        assert!(said.contains("has not made a PostgreSQL in "), "{said}");
        assert_eq!(empty.path().read_dir().expect("a directory").count(), 0);
    }
    // A home in which nothing was made is no database either.
    std::fs::create_dir(empty.path().join("postgres")).expect("a home");
    let output = millrace(&["audit"])
        .env("MILLRACE_DATA_DIR", empty.path())
        .output()
        .expect("run millrace");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!empty.path().join("postgres/data").exists(), "{said}");
}

#[test]
fn usage_and_configuration_mistakes_have_their_exit_codes() {
    let code = |args: &[&str]| millrace(args).output().expect("run millrace").status.code();
    assert_eq!(code(&["--help"]), Some(0));
    assert_eq!(code(&["serve", "--nonsense"]), Some(2));
    assert_eq!(code(&[]), Some(2));
    assert_eq!(code(&["serve", "--config", "/nonexistent.toml"]), Some(1));
    for command in ["serve", "demo", "load", "audit", "migrate"] {
        assert_eq!(code(&[command, "--help"]), Some(0));
    }
    let dir = test_dir();
    let file = dir.path().join("m.toml");
    std::fs::write(&file, "[queue]\ncapasity = 5\n").expect("write");
    let output = millrace(&["config", "check", "--config"])
        .arg(&file)
        .output()
        .expect("run");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("capasity"));
    let output = millrace(&["migrate", "--print"]).output().expect("run");
    assert!(String::from_utf8_lossy(&output.stdout).contains("CREATE TABLE orders"));
}
