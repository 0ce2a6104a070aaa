//! P7, third part: whether anything grows while a sale goes on and on.

use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::fixture::child::Server;
use crate::fixture::engine::HOT;
use crate::fixture::load::{Load, load};
use crate::fixture::machine::Usage;
use crate::fixture::{Finding, Lab, Scratch, Target, blocking};

/// Orders a second: a fraction of what it can do, so that nothing is refused for want of room.
const RATE: f64 = 4_000.0;
const CONNECTIONS: usize = 256;
/// What Millrace remembers of buyers is bounded by this window; it is reached early in the soak, so
/// that what grows afterwards should not.
const WINDOW_MS: &str = "10000";
/// Looks at the process.
const LOOKS: usize = 60;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let settings = [
        ("ORDERS__IDEMPOTENCY_WINDOW_MS", WINDOW_MS),
        ("ORDERS__PAYMENT_TTL_MS", "5000"),
    ];
    let server = Server::start(&scratch.dir("millrace")?, &settings)?;
    server.put_sku(HOT, 1_000_000)?;
    let length = Duration::from_secs_f64(lab.soak_minutes * 60.0);
    let plan = Load {
        rate: RATE,
        seconds: length.as_secs_f64(),
        mode: "mixed",
        connections: CONNECTIONS,
        seed: 1,
        // No key comes again after its window, when it might be used afresh: the audit knows no windows.
        more: [
            "--buyers",
            "4000000",
            "--one-order-per-buyer",
            "--duplicates",
            "0.1",
        ]
        .map(str::to_owned)
        .to_vec(),
    };
    let address = server.data;
    let loading = tokio::task::spawn_blocking(move || load(address, HOT, &plan));
    let started = Instant::now();
    let mut looks: Vec<Usage> = Vec::new();
    while started.elapsed() < length {
        tokio::time::sleep(length / LOOKS as u32).await;
        looks.push(server.process.usage()?);
    }
    let report = loading.await??;
    blocking(|| server.audit())?;
    let in_flight = server.metric("millrace_orders_in_flight")?;
    let stopped_clean = blocking(|| server.process.terminate())?;
    ensure!(stopped_clean, "it did not stop as it should");
    // After the first fifth everything that is bounded has reached its bound; the look at the very end
    // may see connections that are closing.
    let fifth = looks.len() / 5;
    let highest =
        |looks: &[Usage], of: fn(&Usage) -> u64| looks.iter().map(of).max().unwrap_or(0) as f64;
    let (early, late) = (
        &looks[fifth * 2..fifth * 3],
        &looks[fifth * 4 - 1..looks.len() - 1],
    );
    let growth = |of: fn(&Usage) -> u64| highest(late, of) / highest(early, of) * 100.0 - 100.0;
    Ok(vec![
        Finding::of(
            format!(
                "growth of resident memory in {:.1} minutes, last fifth over middle fifth, %",
                lab.soak_minutes
            ),
            growth(|usage| usage.resident_bytes),
        )
        .against("P7c", Target::AtMost(2.0)),
        Finding::of(
            "growth of open descriptors, likewise, %",
            growth(|usage| usage.descriptors),
        )
        .against("P7d", Target::AtMost(0.0)),
        Finding::of("orders in flight afterwards", in_flight).against("P7e", Target::AtMost(0.0)),
        Finding::of(
            "resident MiB at the end",
            highest(late, |usage| usage.resident_bytes) / 1_048_576.0,
        ),
        Finding::of("orders placed", report.number("placed")?),
        Finding::of("answers that were failures", report.number("errors")?),
    ])
}
