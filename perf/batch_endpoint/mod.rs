//! T5: `POST /v1/orders:batch`, persisted, beside the engine without HTTP and a row an order.

use std::time::Duration;

use crate::fixture::child::{Server, Service};
use crate::fixture::compare::{Rounds, Spread, alternate};
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::{self, HOT};
use crate::fixture::flood::{Template, flood, rate};
use crate::fixture::{Finding, Lab, Scratch, Target, blocking};

/// Orders of a batch, the most that one may have.
const LINES: usize = 1_000;
/// Connections with a batch each: enough that the next is there when one is written.
const CONNECTIONS: usize = 24;
/// Rows that the engine without HTTP writes in a round.
const ROWS: u64 = 400_000;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("batch").await?;
    let engine_url = postgres.database("batch_engine").await?;
    let shop = postgres.database("batch_rows").await?;
    let server = Server::start(&scratch.dir("millrace")?, &[("DATABASE__URL", &url)])?;
    server.put_sku(HOT, u32::MAX)?;
    let row = Service::start("row", Some(&shop), None)?;
    let engine = engine::start(&engine_url, &scratch.dir("engine")?, |_| {}).await?;
    let client = database::connect(&url).await?;

    let line = format!(
        "{{\"user_id\":\"u-0000000000\",\"sku_id\":\"{HOT}\",\"idempotency_key\":\"key-0000000000\"}}\n"
    );
    let mut batch = Template::counting(
        "POST",
        "/v1/orders:batch",
        "Content-Type: application/x-ndjson\r\n",
        &line.repeat(LINES),
    );
    let mut order = Template::order(HOT, "");
    let window = lab.window();
    let mut micros = Vec::new();
    let mut placed = async |length: Duration| -> anyhow::Result<f64> {
        let before = held(&client).await?;
        let cpu_before = server.process.usage()?.cpu_seconds;
        let flooded = blocking(|| flood(server.data, CONNECTIONS, length, &mut batch)?.only(200))?;
        // Every line was placed, and its row is there: that is what the answer says.
        let after = held(&client).await?;
        let answered = flooded.count(200) * LINES as u64;
        anyhow::ensure!(
            after - before >= answered as i64,
            "{answered} orders were answered, but only {} rows were written",
            after - before
        );
        micros.push((server.process.usage()?.cpu_seconds - cpu_before) * 1e6 / answered as f64);
        Ok(answered as f64 / flooded.took.as_secs_f64())
    };
    placed(window / 2).await?;
    let mut first = 0;
    let names = ["batched orders/s", "engine rows/s", "a row an order/s"];
    let rounds: Rounds<3> = alternate(lab.rounds(), names, async |side| match side {
        0 => placed(window).await,
        1 => {
            first += ROWS;
            engine::persist(&engine, first, ROWS).await
        }
        _ => rate(row.address, 64, window, &mut order, 201),
    })
    .await?;
    server.audit()?;
    engine.drain().await;
    drop((server, row));
    postgres.stop().await?;
    Ok(vec![
        Finding::spread(
            "batch endpoint, persisted / engine without HTTP",
            rounds.ratio(0, 1),
        )
        .against("T5a", Target::AtLeast(0.8)),
        Finding::spread(
            "batch endpoint, persisted / a row an order",
            rounds.ratio(0, 2),
        )
        .against("T5", Target::AtLeast(100.0)),
        Finding::spread(
            "processor time of the service for an order in a batch, µs",
            Spread::of(&micros),
        )
        .against("T5b", Target::AtMost(4.0)),
        Finding::spread("batch endpoint, orders a second", rounds.side(0)),
    ])
}

async fn held(client: &tokio_postgres::Client) -> anyhow::Result<i64> {
    let row = client
        .query_one("SELECT held FROM sku WHERE sku_id = $1", &[&HOT])
        .await?;
    Ok(row.get(0))
}
