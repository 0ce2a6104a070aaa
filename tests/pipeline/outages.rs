//! A database that is slow around the order timeout, or away.

use std::sync::Arc;
use std::time::{Duration, Instant};

use millrace::order::Refusal;
use millrace::state::pending::{PendingOrder, SlotState};
use millrace::store::embedded::{DATABASE, Embedded};
use rand::Rng;

use crate::line::{Line, outcome, outcomes, tally};
use crate::support::postgres::{copy_template, options, test_dir};
use crate::support::proxy::Proxy;
use crate::support::sale::{STEP, Sale, count};

const WAIT: Duration = Duration::from_millis(300);

/// Places orders, a few every few milliseconds, until `stop`.
async fn buy(
    line: &Line,
    name: &str,
    skus: &[&str],
    until: impl Fn() -> bool,
) -> Vec<Arc<PendingOrder>> {
    let mut placed = Vec::new();
    let mut at = 0;
    while !until() {
        for sku in skus {
            at += 1;
            match line.place(&format!("{name}-{at}"), sku, 1, WAIT) {
                Ok(pending) => placed.push(pending),
                Err(Refusal::SoldOut { .. } | Refusal::Backlogged { .. } | Refusal::Overloaded) => {
                }
                Err(refusal) => panic!("{refusal:?}"),
            }
        }
        let wait = rand::rng().random_range(2..12);
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
    placed
}

fn after(duration: Duration) -> impl Fn() -> bool {
    let end = Instant::now() + duration;
    move || Instant::now() >= end
}

/// Random delays of the database around [`WAIT`], the first surely longer.
fn delays() -> impl FnMut() -> Duration {
    let mut first = Some(2 * WAIT);
    move || {
        let random = || Duration::from_millis(rand::rng().random_range(50..550));
        first.take().unwrap_or_else(random)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_locked_around_the_timeout_make_no_order_refused_and_written() {
    let sale = Sale::open(2).await;
    // A is bought up, so that units that come back are taken again.
    sale.sku("A", 150).await;
    sale.sku("B", 100_000).await;
    let database = sale.database.clone();
    let mut line = Line::open(sale, 4_096).await;
    for _ in 0..2 {
        line.start_worker(database.clone(), 20);
    }
    let length = Duration::from_secs(4 * count("MILLRACE_ROUNDS", 1));
    let end = after(length);
    let mut delay = delays();
    let disturb = async {
        let mut holder = line.sale.session().await;
        while !end() {
            let held = holder.transaction().await.unwrap();
            held.batch_execute("SELECT FROM sku FOR UPDATE")
                .await
                .unwrap();
            tokio::time::sleep(delay()).await;
            held.rollback().await.unwrap();
            tokio::time::sleep(delay() / 10).await;
        }
    };
    let (placed, ()) = tokio::join!(buy(&line, "u", &["A", "B"], after(length)), disturb);
    let states = outcomes(&placed).await;
    println!(
        "{} written, {} abandoned",
        tally(&states, SlotState::Persisted),
        tally(&states, SlotState::Abandoned)
    );
    assert!(tally(&states, SlotState::Persisted) > 0);
    assert!(
        tally(&states, SlotState::Abandoned) > 0,
        "the delays were too short to prove anything"
    );
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_stalls_around_the_timeout_makes_no_order_refused_and_written() {
    let sale = Sale::open(2).await;
    sale.sku("A", 150).await;
    sale.sku("B", 100_000).await;
    let proxy = Proxy::start(&sale.config).await;
    let database = sale.through(&proxy, Duration::from_millis(200));
    let mut line = Line::open(sale, 4_096).await;
    for _ in 0..2 {
        line.start_worker(database.clone(), 20);
    }
    let length = Duration::from_secs(4 * count("MILLRACE_ROUNDS", 1));
    let end = after(length);
    let mut delay = delays();
    let disturb = async {
        while !end() {
            proxy.freeze(true);
            tokio::time::sleep(delay()).await;
            proxy.freeze(false);
            tokio::time::sleep(delay()).await;
        }
    };
    let (placed, ()) = tokio::join!(buy(&line, "u", &["A", "B"], after(length)), disturb);
    let states = outcomes(&placed).await;
    println!(
        "{} written, {} abandoned",
        tally(&states, SlotState::Persisted),
        tally(&states, SlotState::Abandoned)
    );
    assert!(tally(&states, SlotState::Persisted) > 0);
    assert!(tally(&states, SlotState::Abandoned) > 0);
    line.check(&placed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_away_under_load_loses_and_doubles_nothing() {
    let away = Duration::from_secs(count("MILLRACE_OUTAGE_S", 2));
    let dir = test_dir();
    copy_template(dir.path()).await;
    let mut embedded = Embedded::start(options(dir.path())).await.unwrap();
    let sale = Sale::open_at(embedded.config(DATABASE), 2).await;
    sale.sku("A", 500).await;
    sale.sku("B", 1_000_000).await;
    let database = sale.with_step(STEP);
    let mut line = Line::open(sale, 4_096).await;
    for _ in 0..2 {
        line.start_worker(database.clone(), 100);
    }
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    let outage = async {
        crate::line::until("orders are written", || {
            line.metrics.rows_written.get() > 100
        })
        .await;
        embedded.stop_immediate().await.unwrap();
        let went = Instant::now();
        tokio::time::sleep(away).await;
        embedded.start_again().await.unwrap();
        let back = Instant::now();
        let written = line.metrics.rows_written.get();
        let last = crate::line::until("orders are written again", || {
            line.metrics.rows_written.get() > written + 100
        });
        last.await;
        println!(
            "away for {:?}, writing again {:?} after it was back",
            back - went,
            back.elapsed()
        );
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
    };
    let stopped = || flag.load(std::sync::atomic::Ordering::SeqCst);
    let (mut placed, more, ()) = tokio::join!(
        buy(&line, "u", &["A", "B"], stopped),
        buy(&line, "v", &["B", "B", "B"], stopped),
        outage
    );
    placed.extend(more);
    let states = outcomes(&placed).await;
    println!(
        "{} written, {} abandoned, {} batches tried again",
        tally(&states, SlotState::Persisted),
        tally(&states, SlotState::Abandoned),
        line.metrics.batch_retries.totals()["transient"]
    );
    assert!(tally(&states, SlotState::Abandoned) > 0);
    assert_eq!(line.metrics.commits_lost.get(), 0);
    line.sale.reconnect().await;
    let late = line.place("late", "B", 1, WAIT).unwrap();
    assert_eq!(outcome(&late).await, SlotState::Persisted);
    placed.push(late);
    line.check(&placed).await;
    drop(line);
    embedded.stop_and_erase().await.unwrap();
}
