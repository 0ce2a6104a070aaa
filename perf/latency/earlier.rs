//! An earlier build beside this one, in turns: the latency of waiting orders at the same rates. Each has a PostgreSQL of
//! its own making, as users run it.

use std::path::Path;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::plot::Curve;
use super::{CONNECTIONS, draw};
use crate::fixture::child::Server;
use crate::fixture::compare::alternate;
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Flooded, Template, flood, offer};
use crate::fixture::{Finding, Lab, Scratch, blocking};

/// Shares of the earlier build's capacity, in percent.
const SHARES: [u32; 3] = [1, 10, 50];

/// Measures the build `program` and this one.
pub async fn compare(lab: &Lab, scratch: &Scratch, program: &Path) -> anyhow::Result<Vec<Finding>> {
    let servers = [
        Server::start_program(program, &scratch.dir("earlier")?, &[])?,
        Server::start(&scratch.dir("this")?, &[])?,
    ];
    let length = Duration::from_secs(lab.pick(8, 4));
    let mut order = Template::order(HOT, "");
    let mut placed = |server: &Server, rate: Option<f64>| -> anyhow::Result<Flooded> {
        let answered = blocking(|| match rate {
            Some(rate) => offer(server.data, CONNECTIONS, rate, length, &mut order),
            None => flood(server.data, CONNECTIONS, length, &mut order),
        })?;
        answered.only(201)
    };
    let mut capacities = Vec::new();
    for server in &servers {
        server.put_sku(HOT, u32::MAX)?;
        capacities.push(placed(server, None)?.rate(201));
    }
    let mut findings = vec![
        Finding::of(
            "capacity of the earlier build, orders a second",
            capacities[0],
        ),
        Finding::of("capacity of this build, orders a second", capacities[1]),
    ];
    let mut curves = Vec::new();
    for share in SHARES {
        let rate = capacities[0] * f64::from(share) / 100.0;
        let mut all = [(); 2].map(|()| Histogram::<u64>::new(3));
        let names = ["earlier, p99 µs", "this, p99 µs"];
        let rounds = alternate(lab.rounds(), names, async |side| {
            let latency = placed(&servers[side], Some(rate))?.latency;
            if let Ok(all) = &mut all[side] {
                all.add(&latency)?;
            }
            Ok(latency.value_at_quantile(0.99) as f64)
        });
        let rounds = rounds.await?;
        findings.push(Finding::spread(
            format!("p99 at {share} % of the earlier build's capacity, this / the earlier"),
            rounds.ratio(1, 0),
        ));
        for (side, (name, all)) in ["earlier", "this"].into_iter().zip(all).enumerate() {
            let all = all?;
            for (quantile, words) in [(0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")] {
                findings.push(Finding::of(
                    format!("{words} at {share} % of the earlier build's capacity, {name}, ms"),
                    all.value_at_quantile(quantile) as f64 / 1_000.0,
                ));
            }
            let curve = Curve::of(format!("{share} %, {name}"), &all);
            curves.push(if side == 0 { curve.dashed() } else { curve });
        }
    }
    for server in &servers {
        server.audit()?;
    }
    draw(lab, "earlier.svg", &curves)?;
    Ok(findings)
}
