//! P1: waiting orders over HTTP for one hot SKU, beside a constant answer, the engine without HTTP and
//! a row an order.

use std::time::Duration;

use crate::fixture::child::{Server, Service};
use crate::fixture::compare::{Rounds, alternate};
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::{self, HOT};
use crate::fixture::flood::{Template, rate};
use crate::fixture::{Finding, Lab, Scratch, Target};

/// Connections, each with one request at a time. Fewer than this and the batches, not the service,
/// limit the rate; each side has the same.
pub const CONNECTIONS: usize = 512;
/// Rows that the engine without HTTP writes in a round.
const ROWS: u64 = 400_000;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("wait_mode").await?;
    let engine_url = postgres.database("wait_mode_engine").await?;
    let shop = postgres.database("wait_mode_rows").await?;
    let server = Server::start(&scratch.dir("millrace")?, &[("DATABASE__URL", &url)])?;
    server.put_sku(HOT, u32::MAX)?;
    let constant = Service::start("constant", None, None)?;
    let row = Service::start("row", Some(&shop), None)?;
    let engine = engine::start(&engine_url, &scratch.dir("engine")?, |_| {}).await?;
    let client = database::connect(&url).await?;

    let mut order = Template::order(HOT, "");
    let window = lab.window();
    let mut first = 0;
    let names = [
        "201/s",
        "constant answers/s",
        "engine rows/s",
        "a row an order/s",
    ];
    let mut answer =
        |address, status, length: Duration| rate(address, CONNECTIONS, length, &mut order, status);
    answer(server.data, 201, window)?;
    answer(constant.address, 200, window / 4)?;
    let rounds: Rounds<4> = alternate(lab.rounds(), names, async |side| {
        database::settle(&client).await?;
        match side {
            0 => answer(server.data, 201, window),
            1 => answer(constant.address, 200, window),
            2 => {
                first += ROWS;
                engine::persist(&engine, first, ROWS).await
            }
            _ => answer(row.address, 201, window),
        }
    })
    .await?;
    server.audit()?;
    engine.drain().await;
    drop((server, constant, row));
    postgres.stop().await?;
    Ok(vec![
        Finding::spread(
            "waiting orders over HTTP / the lower of a constant answer and the engine without HTTP",
            rounds.ratio_by(|[orders, constant, engine, _]| orders / constant.min(*engine)),
        )
        .against("P1", Target::AtLeast(0.65)),
        Finding::spread(
            "waiting orders over HTTP / a row an order",
            rounds.ratio(0, 3),
        )
        .against("P1a", Target::AtLeast(40.0)),
        Finding::spread("waiting orders over HTTP, a second", rounds.side(0)),
        Finding::spread("constant answers, a second", rounds.side(1)),
        Finding::spread("engine without HTTP, rows a second", rounds.side(2)),
        Finding::spread("a row an order, a second", rounds.side(3)),
    ])
}
