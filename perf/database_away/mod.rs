//! Waiting orders while PostgreSQL is 0, 1 and 5 ms away: how long they take at 1,000 and 5,000 a second, and how many
//! there are in a closed loop.

use std::time::Duration;

use crate::fixture::child::Server;
use crate::fixture::compare::{Spread, alternate};
use crate::fixture::database::Postgres;
use crate::fixture::distance::Distance;
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, flood, offer};
use crate::fixture::{Finding, Lab, Scratch, blocking};

/// Round trips to PostgreSQL, in milliseconds.
const ROUND_TRIPS_MS: [u64; 3] = [0, 1, 5];
/// Orders offered a second.
const RATES: [f64; 2] = [1_000.0, 5_000.0];
const CONNECTIONS: usize = 512;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let mut servers = Vec::new();
    for ms in ROUND_TRIPS_MS {
        let name = format!("away_{ms}");
        postgres.database(&name).await?;
        // At 0 ms through the same threads, so that they are not taken for the distance.
        let distance = Distance::to(&postgres.socket()?, Duration::from_millis(ms))?;
        let url = postgres.url_through(distance.address, &name);
        let server = Server::start(&scratch.dir(&name)?, &[("DATABASE__URL", &url)])?;
        server.put_sku(HOT, u32::MAX)?;
        servers.push(server);
    }
    let length = Duration::from_secs(lab.pick(8, 4));
    let mut order = Template::order(HOT, "");
    let mut findings = Vec::new();
    let names = ROUND_TRIPS_MS.map(|ms| format!("PostgreSQL {ms} ms away"));
    let names = names.each_ref().map(String::as_str);
    for rate in RATES {
        let mut p50s: [Vec<f64>; 3] = Default::default();
        let rounds = alternate(lab.rounds(), names, async |side| {
            let answered =
                blocking(|| offer(servers[side].data, CONNECTIONS, rate, length, &mut order))?;
            let latency = answered.only(201)?.latency;
            p50s[side].push(latency.value_at_quantile(0.5) as f64);
            Ok(latency.value_at_quantile(0.99) as f64)
        })
        .await?;
        for (side, name) in names.iter().enumerate() {
            let p50 = Spread::of(&p50s[side]);
            findings.push(Finding::spread(
                format!("p50 of a waiting order at {rate:.0} a second, {name}, ms"),
                p50.times(0.001),
            ));
            findings.push(Finding::spread(
                format!("p99 of a waiting order at {rate:.0} a second, {name}, ms"),
                rounds.side(side).times(0.001),
            ));
        }
    }
    let rounds = alternate(lab.rounds(), names, async |side| {
        let answered = blocking(|| flood(servers[side].data, CONNECTIONS, length, &mut order))?;
        Ok(answered.only(201)?.rate(201))
    })
    .await?;
    for (side, name) in names.iter().enumerate().skip(1) {
        findings.push(Finding::spread(
            format!("waiting orders in a closed loop, {name} / 0 ms away"),
            rounds.ratio(side, 0),
        ));
    }
    for server in &servers {
        server.audit()?;
    }
    drop(servers);
    postgres.stop().await?;
    Ok(findings)
}
