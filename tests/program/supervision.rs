//! Whatever runs as long as the process does: where it ends by itself, the process takes no more orders,
//! drains and exits with 1. Each by its name, through the real binary, with a deliberate fault.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::support::postgres::{TestDatabase, copy_template, test_dir};
use crate::support::served::{PATIENCE, Served, spawn, tail};
use millrace::faults::SUPERVISED;

/// Settings without which something of this name does not run.
fn needs(name: &str) -> Vec<(&'static str, &'static str)> {
    match name {
        "the retention of the order log" => {
            vec![("MILLRACE_QUEUE__JOURNAL__RETAIN_FOR_SLOTS", "standby")]
        }
        "the deletion of old rows" => vec![("MILLRACE_RETENTION__STOCK_LOG_DAYS", "7")],
        "the delivery of events" => vec![
            ("MILLRACE_EVENTS__SINKS__SHOP__URL", "http://127.0.0.1:1/"),
            (
                "MILLRACE_EVENTS__SINKS__SHOP__SECRET",
                "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            ),
        ],
        "minihttp" => vec![("MILLRACE_DATA_PLANE__ENGINE", "minihttp")],
        _ => Vec::new(),
    }
}

fn start(data_dir: &Path, url: Option<&str>, name: &str, fault: &str) -> (Option<i32>, String) {
    let mut settings = vec![
        ("MILLRACE_FAULT".to_owned(), fault.to_owned()),
        ("MILLRACE_ORDERS__TIMEOUT_MS".to_owned(), "500".to_owned()),
    ];
    let needed = needs(name).into_iter();
    settings.extend(needed.map(|(name, value)| (name.to_owned(), value.to_owned())));
    settings.extend(url.map(|url| ("MILLRACE_DATABASE__URL".to_owned(), url.to_owned())));
    let log = data_dir.join("serve.log");
    let nowhere = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let mut served = Served {
        child: spawn(data_dir, &settings, &log),
        data: nowhere,
        control: nowhere,
    };
    let ended = served.ended_by(Instant::now() + PATIENCE);
    let ended = ended.unwrap_or_else(|| panic!("{fault}: it goes on: {}", tail(&log)));
    let text = std::fs::read(&log).unwrap_or_default();
    (ended.code(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn whatever_ends_by_itself_stops_the_process() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let faults: Vec<(&str, String, String)> = SUPERVISED
        .into_iter()
        .flat_map(|name| {
            ["end", "panic"].map(|how| {
                let said = if how == "end" {
                    format!("{name} ended without being asked to")
                } else {
                    format!("{name} panicked")
                };
                (name, format!("{how}@{name}"), said)
            })
        })
        .collect();
    // A few at a time: each is a process that starts and drains.
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while let Some((name, fault, said)) =
                    faults.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let dir = test_dir();
                    let own = *name == "the supervision of the embedded PostgreSQL";
                    let database = if own {
                        runtime.block_on(copy_template(dir.path()));
                        None
                    } else {
                        Some(runtime.block_on(TestDatabase::create()))
                    };
                    let url = database.as_ref().map(TestDatabase::url);
                    let (code, log) = start(dir.path(), url.as_deref(), name, fault);
                    assert_eq!(code, Some(1), "{fault}: {log}");
                    assert!(log.contains("taking orders"), "{fault}: {log}");
                    assert!(log.contains(said), "{fault}: {log}");
                    assert!(log.contains("stopped"), "{fault}: it drained: {log}");
                }
            });
        }
    });
}
