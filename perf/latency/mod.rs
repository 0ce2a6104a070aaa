//! T1, T2: the tail of waiting orders at 10,000 a second, beside a transaction an order at 500 a second; and how long a
//! waiting order takes at 1, 10, 50 and 80 % of the service's capacity. Open loop, from the moment that each was due.

mod earlier;
mod plot;

use std::path::Path;
use std::time::Duration;

use crate::fixture::child::{Server, Service};
use crate::fixture::compare::{Spread, alternate};
use crate::fixture::database::Postgres;
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Flooded, Template, flood, offer};
use crate::fixture::{Finding, Lab, Scratch, Target, blocking};
use plot::Curve;

/// Shares of capacity, in percent.
const SHARES: [u32; 4] = [1, 10, 50, 80];
const CONNECTIONS: usize = 512;

/// Waiting orders offered a second to Millrace, and orders to a service that makes each a transaction.
const RATES: [f64; 2] = [10_000.0, 500.0];

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("latency").await?;
    let shop = postgres.database("rows").await?;
    let server = Server::start(&scratch.dir("millrace")?, &[("DATABASE__URL", &url)])?;
    server.put_sku(HOT, u32::MAX)?;
    let row = Service::start("row", Some(&shop), None)?;
    let length = Duration::from_secs(lab.pick(8, 4));
    let mut order = Template::order(HOT, "");
    let mut placed = |address, rate: Option<f64>, length| -> anyhow::Result<Flooded> {
        let answered = blocking(|| match rate {
            Some(rate) => offer(address, CONNECTIONS, rate, length, &mut order),
            None => flood(address, CONNECTIONS, length, &mut order),
        })?;
        answered.only(201)
    };
    // The first orders find cold files.
    placed(server.data, None, length / 8)?;
    let capacity = placed(server.data, None, length)?.rate(201);
    placed(row.address, Some(RATES[1]), length / 4)?;

    let names = [
        "201 at 10,000 a second, p99 µs",
        "a row an order at 500 a second, p99 µs",
    ];
    let mut tails: [Vec<f64>; 2] = Default::default();
    let rounds = alternate(lab.rounds(), names, async |side| {
        let address = if side == 0 { server.data } else { row.address };
        let latency = placed(address, Some(RATES[side]), length)?.latency;
        tails[side].push(latency.value_at_quantile(0.999) as f64);
        Ok(latency.value_at_quantile(0.99) as f64)
    })
    .await?;
    let [ours, theirs] = &tails;
    let ratios: Vec<f64> = ours
        .iter()
        .zip(theirs)
        .map(|(ours, theirs)| ours / theirs)
        .collect();
    let mut findings = vec![
        Finding::spread(
            "p99 of a waiting order at 10,000 a second / of a row an order at 500 a second",
            rounds.ratio(0, 1),
        )
        .against("T1", Target::AtMost(1.0)),
        Finding::spread("p99.9 likewise", Spread::of(&ratios)).against("T2", Target::AtMost(0.5)),
        Finding::spread(
            "p99 of a waiting order at 10,000 a second, ms",
            rounds.side(0).times(0.001),
        ),
        Finding::spread("p99.9 likewise, ms", Spread::of(ours).times(0.001)),
        Finding::spread(
            "p99 of a row an order at 500 a second, ms",
            rounds.side(1).times(0.001),
        ),
        Finding::spread("p99.9 likewise, ms", Spread::of(theirs).times(0.001)),
        Finding::of("capacity in a closed loop, orders a second", capacity),
    ];
    let mut curves = Vec::new();
    for share in SHARES {
        let latency = placed(
            server.data,
            Some(capacity * f64::from(share) / 100.0),
            length,
        )?
        .latency;
        for (quantile, name) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")] {
            findings.push(Finding::of(
                format!("{name} at {share} % of capacity, ms"),
                latency.value_at_quantile(quantile) as f64 / 1_000.0,
            ));
        }
        curves.push(Curve::of(format!("{share} %"), &latency));
    }
    server.audit()?;
    drop((server, row));
    postgres.stop().await?;
    draw(lab, "latency.svg", &curves)?;
    if let Some(program) = &lab.earlier {
        findings.extend(earlier::compare(lab, &scratch, program).await?);
    }
    Ok(findings)
}

/// Writes a picture beside this file, in a recorded run.
fn draw(lab: &Lab, name: &str, curves: &[Curve]) -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("perf/latency");
    if lab.record {
        std::fs::write(folder.join(name), plot::svg(curves))?;
    }
    Ok(())
}
