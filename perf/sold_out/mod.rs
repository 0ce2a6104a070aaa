//! The answer that nearly everybody gets, beside a constant one; and our HTTP engine beside stock
//! `may_minihttp`.

use std::time::Duration;

use crate::fixture::child::{Server, Service};
use crate::fixture::compare::alternate;
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, flood, rate};
use crate::fixture::{Finding, Lab, Scratch, blocking};

/// Connections, each with one request at a time.
const CONNECTIONS: usize = 256;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let server = Server::start(&scratch.dir("millrace")?, &[])?;
    server.put_sku(HOT, 1)?;
    let constant = Service::start("constant", None, None)?;
    let stock = Service::start("stock", None, None)?;
    let mut order = Template::order(HOT, "");
    // One at a time, so that exactly one is placed.
    blocking(|| flood(server.data, 1, Duration::from_millis(200), &mut order))?;
    let window = lab.window();
    let mut answer =
        |address, status, length: Duration| rate(address, CONNECTIONS, length, &mut order, status);
    for (address, status) in [
        (server.data, 409),
        (constant.address, 200),
        (stock.address, 200),
    ] {
        answer(address, status, window / 4)?;
    }
    let names = ["409/s", "constant answers/s", "stock may_minihttp/s"];
    // Twice as many rounds: the differences are small.
    let rounds = alternate(lab.rounds() * 2, names, async |side| match side {
        0 => answer(server.data, 409, window / 2),
        1 => answer(constant.address, 200, window / 2),
        _ => answer(stock.address, 200, window / 2),
    })
    .await?;
    server.audit()?;
    Ok(vec![
        Finding::spread(
            "sold-out answer / constant answer, same engine",
            rounds.ratio(0, 1),
        ),
        Finding::spread(
            "hardened engine / stock may_minihttp, constant answer",
            rounds.ratio(1, 2),
        ),
        Finding::spread("sold-out answers, a second", rounds.side(0)),
        Finding::spread("constant answers, a second", rounds.side(1)),
    ])
}
