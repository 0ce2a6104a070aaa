//! Retries and double clicks: each order comes four times under the same key.

use std::time::Duration;

use crate::fixture::child::{Server, Service};
use crate::fixture::compare::alternate;
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, flood, rate};
use crate::fixture::{Finding, Lab, Scratch, blocking};

const CONNECTIONS: usize = 256;
/// Orders that are asked for again and again.
const ORDERS: u64 = 10_000;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let server = Server::start(&scratch.dir("millrace")?, &[])?;
    server.put_sku(HOT, u32::MAX)?;
    let constant = Service::start("constant", None, None)?;
    let mut order = Template::order(HOT, "").wrapping_at(ORDERS);
    // Until each is there.
    while server.metric("millrace_rows_written_total")? < ORDERS as f64 {
        blocking(|| {
            flood(
                server.data,
                CONNECTIONS,
                Duration::from_millis(200),
                &mut order,
            )
        })?;
    }
    let window = lab.window();
    let mut answer = |address| rate(address, CONNECTIONS, window, &mut order, 200);
    let rounds = alternate(
        lab.rounds(),
        ["replayed/s", "constant answers/s"],
        async |side| match side {
            0 => answer(server.data),
            _ => answer(constant.address),
        },
    )
    .await?;
    server.audit()?;
    Ok(vec![
        Finding::spread(
            "duplicate answered from memory / constant answer",
            rounds.ratio(0, 1),
        ),
        Finding::spread("duplicates answered, a second", rounds.side(0)),
    ])
}
