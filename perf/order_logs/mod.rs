//! Accepted orders over HTTP with each order log, beside the design that people reach for: stock in Redis and a
//! stream, on the same Redis.

use crate::brokers::Kind;
use crate::fixture::child::{Server, Service, log_settings, start_broker};
use crate::fixture::compare::{Spread, alternate};
use crate::fixture::database::{Postgres, drained};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, rate};
use crate::fixture::{Finding, Lab, Scratch, Target};

const CONNECTIONS: usize = 512;
/// Backends in the order of their sides, with the target of their rate.
const BACKENDS: [(&str, Option<Kind>); 4] = [
    ("journal", None),
    ("redis", Some(Kind::Redis)),
    ("kafka", Some(Kind::Kafka)),
    ("rocketmq", Some(Kind::RocketMq)),
];
/// Sides after those of the backends.
const STREAM: usize = 4;
const SIDES: usize = 6;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let mut brokers = Vec::new();
    let (mut servers, mut templates) = (Vec::new(), Vec::new());
    for (name, kind) in BACKENDS {
        let broker = kind.map(start_broker).transpose()?;
        let url = postgres.database(name).await?;
        let mut settings = vec![("DATABASE__URL", url.as_str())];
        settings.extend(broker.iter().flat_map(log_settings));
        let server = Server::start(&scratch.dir(name)?, &settings)?;
        server.put_sku(HOT, u32::MAX)?;
        servers.push(server);
        templates.push(Template::order(HOT, "Prefer: respond-async\r\n"));
        brokers.extend(broker);
    }
    let shop = postgres.database("shop").await?;
    let insert_shop = postgres.database("insert_shop").await?;
    // The first broker is Redis.
    let stream = Service::start("redis", Some(&shop), Some(brokers[0].address()))?;
    let insert = Service::start("insert", Some(&insert_shop), None)?;
    let mut theirs = Template::order(HOT, "");
    let window = lab.window();
    let names = ["journal", "redis", "kafka", "rocketmq", "stream", "insert"];
    let mut micros: [Vec<f64>; SIDES] = Default::default();
    let rounds = alternate(lab.rounds(), names, async |side| {
        let (address, process, status) = match (side, servers.get(side)) {
            (_, Some(server)) => (server.data, &server.process, 202),
            (STREAM, _) => (stream.address, &stream.process, 202),
            _ => (insert.address, &insert.process, 201),
        };
        let template = templates.get_mut(side).unwrap_or(&mut theirs);
        let before = process.usage()?.cpu_seconds;
        let rate = rate(address, CONNECTIONS, window, template, status)?;
        // Accepted orders still have to be written; the next side shall not pay for it.
        match servers.get(side) {
            Some(server) => drop(server.audit()?),
            None if side == STREAM => drained(&shop).await?,
            None => {}
        }
        let spent = process.usage()?.cpu_seconds - before;
        micros[side].push(spent * 1e6 / (rate * window.as_secs_f64()));
        Ok(rate)
    })
    .await?;
    drop((servers, stream, insert, brokers));
    postgres.stop().await?;
    let mut findings = Vec::new();
    for (side, (name, _)) in BACKENDS.iter().enumerate() {
        let against = Finding::spread(
            format!("accepted orders over HTTP, {name} / Redis with a stream (appendfsync always)"),
            rounds.ratio(side, STREAM),
        );
        findings.push(match *name {
            "journal" => against.against("T4", Target::AtLeast(3.0)),
            "redis" => against.against("L1", Target::AtLeast(3.0)),
            _ => against,
        });
    }
    for (side, name) in names.iter().enumerate() {
        let a_second = Finding::spread(format!("{name}, orders a second"), rounds.side(side));
        findings.push(match *name {
            "kafka" => a_second.against("L2", Target::AtLeast(20_000.0)),
            "rocketmq" => a_second.against("L3", Target::AtLeast(20_000.0)),
            _ => a_second,
        });
    }
    for (side, name) in names.iter().enumerate() {
        findings.push(Finding::spread(
            format!("{name}, processor time of the service an order, until it is a row, µs"),
            Spread::of(&micros[side]),
        ));
    }
    Ok(findings)
}
