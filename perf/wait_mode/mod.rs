//! T3: waiting orders over HTTP for one hot SKU, beside what people reach for (stock in Redis and a stream), a row an
//! order, and a constant answer.

use std::time::Duration;

use crate::brokers::Kind;
use crate::fixture::child::{Server, Service, start_broker};
use crate::fixture::compare::{Rounds, alternate};
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, rate};
use crate::fixture::{Finding, Lab, Scratch, Target};

/// Connections, each with one request at a time. Fewer than this and the batches, not the service,
/// limit the rate; each side has the same.
pub const CONNECTIONS: usize = 512;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("wait_mode").await?;
    let stream_shop = postgres.database("wait_mode_stream").await?;
    let shop = postgres.database("wait_mode_rows").await?;
    let server = Server::start(&scratch.dir("millrace")?, &[("DATABASE__URL", &url)])?;
    server.put_sku(HOT, u32::MAX)?;
    let constant = Service::start("constant", None, None)?;
    let row = Service::start("row", Some(&shop), None)?;
    let redis = start_broker(Kind::Redis)?;
    let stream = Service::start("redis", Some(&stream_shop), Some(redis.address()))?;
    let client = database::connect(&url).await?;

    let mut order = Template::order(HOT, "");
    let window = lab.window();
    let names = [
        "201/s",
        "constant answers/s",
        "Redis and a stream/s",
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
                let rate = answer(stream.address, 202, window)?;
                // Its orders still have to be written; the next side shall not pay for it.
                database::drained(&stream_shop).await?;
                Ok(rate)
            }
            _ => answer(row.address, 201, window),
        }
    })
    .await?;
    server.audit()?;
    drop((server, constant, row, stream, redis));
    postgres.stop().await?;
    Ok(vec![
        Finding::spread(
            "waiting orders over HTTP / Redis with a stream (appendfsync always)",
            rounds.ratio(0, 2),
        )
        .against("T3", Target::AtLeast(3.0)),
        Finding::spread(
            "waiting orders over HTTP / a row an order",
            rounds.ratio(0, 3),
        )
        .against("T3a", Target::AtLeast(25.0)),
        Finding::spread(
            "waiting orders over HTTP / a constant answer",
            rounds.ratio(0, 1),
        ),
        Finding::spread("waiting orders over HTTP, a second", rounds.side(0)),
        Finding::spread("constant answers, a second", rounds.side(1)),
        Finding::spread("Redis with a stream, a second", rounds.side(2)),
        Finding::spread("a row an order, a second", rounds.side(3)),
    ])
}
