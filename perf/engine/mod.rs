//! T6: the engine without HTTP beside raw COPY, with one connection and with as many as by default.

use millrace::config::Config;

use crate::fixture::compare::alternate;
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::{self, BATCH_ROWS, RawCopy};
use crate::fixture::{Finding, Lab, Scratch, Target};

/// Rows that each side writes in a round.
const ROWS: u64 = 600_000;
const ROWS_QUICK: u64 = 300_000;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let by_default = Config::default().worker_count();
    let mut findings = beside_raw_copy(lab, 1).await?;
    if let Some(ratio) = findings.first_mut() {
        *ratio = ratio.clone().against("T6", Target::AtLeast(0.95));
    }
    findings.extend(beside_raw_copy(lab, by_default).await?);
    Ok(findings)
}

async fn beside_raw_copy(lab: &Lab, workers: usize) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("engine").await?;
    let count_workers = |config: &mut Config| config.workers.count = workers;
    let millrace = engine::start(&url, &scratch.dir("engine")?, count_workers).await?;
    let raw = RawCopy::connect(&url, workers).await?;
    let client = database::connect(&url).await?;
    let rows = lab.pick(ROWS, ROWS_QUICK);
    let mut first = 0;
    // The first of each finds cold files and an empty map.
    engine::persist(&millrace, first, rows / 4).await?;
    raw.write(first, rows / 4).await?;
    let names = ["engine rows/s", "raw COPY rows/s"];
    let rounds = alternate(lab.rounds(), names, async |side| {
        database::settle(&client).await?;
        first += rows;
        match side {
            0 => engine::persist(&millrace, first, rows).await,
            _ => raw.write(first, rows).await,
        }
    })
    .await?;
    millrace.drain().await;
    postgres.stop().await?;
    let connections = format!(
        "{workers} connection{}",
        if workers == 1 { "" } else { "s" }
    );
    Ok(vec![
        Finding::spread(
            format!("engine without HTTP / raw COPY, {connections}, commits of {BATCH_ROWS} rows"),
            rounds.ratio(0, 1),
        ),
        Finding::spread(
            format!("engine without HTTP, rows a second, {connections}"),
            rounds.side(0),
        ),
        Finding::spread(
            format!("raw COPY, rows a second, {connections}"),
            rounds.side(1),
        ),
    ])
}
