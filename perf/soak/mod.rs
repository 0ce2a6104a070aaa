//! P7, third part: whether anything grows while a sale goes on and on, with payments, buyers who wait for units, and the
//! log of accepted orders on a broker.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::brokers::Kind;
use crate::fixture::child::{Server, call, log_settings, start_broker};
use crate::fixture::engine::HOT;
use crate::fixture::load::{Load, load};
use crate::fixture::machine::Usage;
use crate::fixture::{Finding, Lab, Scratch, Target, blocking};

/// Orders a second: a fraction of what it can do, so that nothing is refused for want of room.
const RATE: f64 = 2_000.0;
const CONNECTIONS: usize = 256;
/// What Millrace remembers of buyers is bounded by this window; it is reached early in the soak, so
/// that what grows afterwards should not.
const WINDOW_MS: &str = "10000";
/// An order that is not paid gives its units back to those who wait.
const PAYMENT_TTL_MS: &str = "5000";
/// The share of orders with units that are paid.
const PAID: &str = "0.3";
/// Units that are not paid: fewer than are asked for, so that buyers wait. What is paid is restocked each second.
const UNITS: u32 = 5_000;
const WAITLIST_MAX: u32 = 2_000;
const SECRET: &str = "whsec_c29hay1zZWNyZXQtb2YtMjQtYnl0ZXMh";
/// Looks at the process.
const LOOKS: u32 = 60;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let broker = start_broker(Kind::Redis)?;
    let mut settings = vec![
        ("ORDERS__IDEMPOTENCY_WINDOW_MS", WINDOW_MS),
        ("ORDERS__PAYMENT_TTL_MS", PAYMENT_TTL_MS),
        ("PAYMENTS__STANDARD__SECRET", SECRET),
    ];
    settings.extend(log_settings(&broker));
    let server = Server::start(&scratch.dir("millrace")?, &settings)?;
    server.put_sku_with(HOT, UNITS, json!({"waitlist_max": WAITLIST_MAX}))?;
    let length = Duration::from_secs_f64(lab.soak_minutes * 60.0);
    // No key comes again after its window, when it might be used afresh: the audit knows no windows.
    let buyers = (RATE * length.as_secs_f64()).ceil().to_string();
    let plan = Load {
        rate: RATE,
        seconds: length.as_secs_f64(),
        mode: "mixed",
        connections: CONNECTIONS,
        seed: 1,
        more: [
            ["--buyers", &buyers, "--one-order-per-buyer"].as_slice(),
            &["--duplicates", "0.1", "--waitlist"],
            &["--pay", PAID, "--payment-secret", SECRET],
        ]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect(),
    };
    let address = server.data;
    let loading = tokio::task::spawn_blocking(move || load(address, HOT, &plan));
    let started = Instant::now();
    let mut looks: Vec<Usage> = Vec::new();
    let mut seconds = tokio::time::interval(Duration::from_secs(1));
    let mut replaced = 0;
    while started.elapsed() < length {
        seconds.tick().await;
        replaced += blocking(|| replace_paid(&server, replaced))?;
        if started.elapsed() > length / LOOKS * (looks.len() as u32 + 1) {
            let mut look = server.process.usage()?;
            // How many connections a client opens is its own matter.
            let connections = blocking(|| server.metric("millrace_connections"))?;
            look.descriptors = look.descriptors.saturating_sub(connections as u64);
            looks.push(look);
        }
    }
    let report = loading.await??;
    let (payments, waitlist) = (&report.0["payments"], &report.0["waitlist"]);
    ensure!(
        payments["unacknowledged"] == 0 && payments["false_signatures"]["taken"] == 0,
        "payments: {payments:#}"
    );
    blocking(|| server.audit())?;
    let in_flight = server.metric("millrace_orders_in_flight")?;
    let stopped_clean = blocking(|| server.process.terminate())?;
    ensure!(stopped_clean, "it did not stop as it should");
    // After the first fifth everything that is bounded has reached its bound; the look at the very end
    // may see connections that are closing.
    let fifth = looks.len() / 5;
    let resident = |looks: &[Usage]| {
        let bytes = looks.iter().map(|look| look.resident_bytes);
        bytes.max().unwrap_or(0) as f64
    };
    // One more for a moment, as a connection that has just come, is no growth; one that stays is in every look.
    let descriptors = |looks: &[Usage]| {
        let open = looks.iter().map(|look| look.descriptors);
        open.min().unwrap_or(0) as f64
    };
    let (early, late) = (
        &looks[fifth * 2..fifth * 3],
        &looks[fifth * 4 - 1..looks.len() - 1],
    );
    let growth = |of: fn(&[Usage]) -> f64| of(late) / of(early) * 100.0 - 100.0;
    Ok(vec![
        Finding::of(
            format!(
                "growth of resident memory in {:.1} minutes, last fifth over middle fifth, %",
                lab.soak_minutes
            ),
            growth(resident),
        )
        .against("P7c", Target::AtMost(2.0)),
        Finding::of(
            "growth of open descriptors without connections, likewise, of the least, %",
            growth(descriptors),
        )
        .against("P7d", Target::AtMost(0.0)),
        Finding::of("orders in flight afterwards", in_flight).against("P7e", Target::AtMost(0.0)),
        Finding::of("resident MiB at the end", resident(late) / 1_048_576.0),
        Finding::of("orders placed", report.number("placed")?),
        Finding::of(
            "of which waited for units",
            waitlist["joined"].as_f64().unwrap_or(0.0),
        ),
        Finding::of(
            "of which were given some",
            waitlist["assigned"].as_f64().unwrap_or(0.0),
        ),
        Finding::of("payments", payments["acknowledged"].as_f64().unwrap_or(0.0)),
        Finding::of("answers that were failures", report.number("errors")?),
    ])
}

/// Restocks as many units as were paid beyond `replaced`. Returns their number.
fn replace_paid(server: &Server, replaced: u64) -> anyhow::Result<u64> {
    let (status, answer) = call(server.data, "GET", &format!("/v1/skus/{HOT}"), "")?;
    ensure!(status == 200, "a look at the SKU: {status} {answer}");
    let sku: Value = serde_json::from_str(&answer)?;
    let sold = sku["sold"].as_u64().context("a SKU without sold units")?;
    let paid = sold.saturating_sub(replaced);
    if paid > 0 {
        let body = json!({"quantity": paid}).to_string();
        let target = format!("/admin/v1/skus/{HOT}/restock");
        let (status, answer) = call(server.control, "POST", &target, &body)?;
        ensure!(status == 200, "a restock: {status} {answer}");
    }
    Ok(paid)
}
