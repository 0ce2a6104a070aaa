//! The real binary as a process: commands, exit codes, signals, and being killed.

mod support;

use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::http::{call, try_call};
use support::postgres::{copy_template, test_dir};
use support::served::{PATIENCE, Served, millrace};

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
