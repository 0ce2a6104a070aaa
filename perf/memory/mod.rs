//! P7, second part: the memory of an order in the queue. Each figure is from a process of its own.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use millrace::order::SkuNumber;
use millrace::queue::{OrderQueue, RingQueue};
use millrace::state::buyers::{BuyerOrder, Buyers, Claimed, NothingSticky};
use millrace::state::pending::{Pending, PendingOrder};

use crate::fixture::machine::usage;
use crate::fixture::{Finding, Lab, Target, engine};

/// Orders that are counted.
const ORDERS: u64 = 1 << 20;

/// Runs the case.
pub async fn run(_: &Lab) -> anyhow::Result<Vec<Finding>> {
    Ok(vec![
        Finding::of("resident bytes of a queued order without attributes: record, map of orders in flight, ring", measure("queued")?)
            .against("P7b", Target::AtMost(256.0)),
        Finding::of("resident bytes of a remembered order, for the idempotency window", measure("remembered")?),
    ])
}

/// Has another process measure it.
fn measure(what: &str) -> anyhow::Result<f64> {
    let done = Command::new(std::env::current_exe()?)
        .args(["memory-of", what])
        .output()?;
    let text = String::from_utf8_lossy(&done.stdout);
    ensure!(
        done.status.success(),
        "measuring memory failed: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    text.trim()
        .parse()
        .with_context(|| format!("not a number: {text}"))
}

/// `lab memory-of`: prints the growth of this process by an order.
///
/// # Errors
/// If it is not known what is meant.
pub fn memory_of(what: &str) -> anyhow::Result<()> {
    let resident = || usage(std::process::id()).map(|usage| usage.resident_bytes);
    let deadline = Instant::now() + Duration::from_secs(600);
    let grown = match what {
        "queued" => {
            let before = resident()?;
            let (pending, ring) = (
                Pending::with_capacity(ORDERS as usize),
                RingQueue::new(ORDERS as usize),
            );
            for number in (0..ORDERS).step_by(1_024) {
                for order in engine::rows(number, 1_024, SkuNumber(1)) {
                    let order = Arc::new(PendingOrder::new(order, deadline, None));
                    pending.insert(&order);
                    ensure!(ring.push(order).is_ok(), "the ring is full");
                }
            }
            ensure!(
                pending.len() == ORDERS as usize && ring.depth() == ORDERS as usize,
                "not all are there"
            );
            resident()? - before
        }
        "remembered" => {
            let before = resident()?;
            let buyers = Buyers::new(usize::MAX, ORDERS as usize);
            for number in (0..ORDERS).step_by(1_024) {
                for order in engine::rows(number, 1_024, SkuNumber(1)) {
                    match buyers.claim(
                        &order.user_id,
                        BuyerOrder::of(&order),
                        None,
                        Ok(()),
                        &NothingSticky,
                    ) {
                        Ok(Claimed::Fresh(claim)) => claim.commit(),
                        other => anyhow::bail!("a buyer was there already: {other:?}"),
                    }
                }
            }
            ensure!(buyers.len() == ORDERS as usize, "not all are there");
            resident()? - before
        }
        other => anyhow::bail!("there is no `{other}` to measure"),
    };
    println!("{:.1}", grown as f64 / ORDERS as f64);
    Ok(())
}
