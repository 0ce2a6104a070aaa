//! P7, first part: whether it writes more slowly into a table that is full already.

use tokio_postgres::Client;

use crate::fixture::compare::alternate;
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine;
use crate::fixture::{Finding, Lab, Scratch, Target};

/// Orders that are there.
const THERE: i64 = 20_000_000;
const THERE_QUICK: i64 = 2_000_000;
/// Rows that each side writes in a round.
const ROWS: u64 = 400_000;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let (full_url, empty_url) = (
        postgres.database("full_table").await?,
        postgres.database("empty_table").await?,
    );
    let there = lab.pick(THERE, THERE_QUICK);
    // Once for its tables and its SKU.
    engine::start(&full_url, &scratch.dir("full")?, |_| {})
        .await?
        .drain()
        .await;
    let client = database::connect(&full_url).await?;
    fill(&client, there).await?;
    let full = engine::start(&full_url, &scratch.dir("full")?, |_| {}).await?;
    let empty = engine::start(&empty_url, &scratch.dir("empty")?, |_| {}).await?;
    let mut first = 0;
    for side in [&full, &empty] {
        engine::persist(side, first, ROWS / 4).await?;
    }
    let emptied = database::connect(&empty_url).await?;
    let names = ["into the full table, rows/s", "into an empty one, rows/s"];
    let rounds = alternate(lab.rounds(), names, async |side| {
        first += ROWS;
        match side {
            0 => {
                database::settle(&client).await?;
                engine::persist(&full, first, ROWS).await
            }
            _ => {
                emptied.batch_execute("TRUNCATE orders").await?;
                database::settle(&emptied).await?;
                engine::persist(&empty, first, ROWS).await
            }
        }
    })
    .await?;
    full.drain().await;
    empty.drain().await;
    postgres.stop().await?;
    Ok(vec![
        Finding::spread(
            format!(
                "rate into a table of {} million rows / into an empty one",
                there / 1_000_000
            ),
            rounds.ratio(0, 1),
        )
        .against("P7", Target::AtLeast(0.9)),
    ])
}

/// Cancelled orders, so that they hold nothing, with ids below all that Millrace gives out.
async fn fill(client: &Client, count: i64) -> anyhow::Result<()> {
    let part = 1_000_000;
    for first in (1..=count).step_by(part as usize) {
        client
            .execute(
                "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at,
                                     expires_at, key_hash, payload_hash)
                 SELECT id, 'u-' || id, 1, 1, 0, 100, 'EUR', 3, now() - interval '30 days', now() - interval '30 days',
                        md5(id::text)::uuid, id
                   FROM generate_series($1::int8, $2::int8) AS id",
                &[&first, &(first + part - 1).min(count)],
            )
            .await?;
    }
    client
        .batch_execute("VACUUM (FREEZE, ANALYZE) orders")
        .await?;
    // On its own: statements that are sent together are one transaction, in which there is no VACUUM.
    client.batch_execute("CHECKPOINT").await?;
    Ok(())
}
