//! Entries of a draw over HTTP, beside orders of a SKU that is sold first come, first served.

use millrace::order::UnixMillis;
use serde_json::json;

use crate::fixture::child::Server;
use crate::fixture::compare::alternate;
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, rate};
use crate::fixture::{Finding, Lab, Scratch};
use crate::wait_mode::CONNECTIONS;

const DRAWN: &str = "DRAWN";
/// The draw itself is not part of it.
const A_DAY_MS: u64 = 86_400_000;
/// More than a run makes; the highest that there is.
const ENTRIES_MAX: u32 = 10_000_000;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("entries").await?;
    let server = Server::start(&scratch.dir("millrace")?, &[("DATABASE__URL", &url)])?;
    server.put_sku(HOT, u32::MAX)?;
    let now = UnixMillis::now();
    let terms = json!({
        "allocation": "draw",
        "waitlist_max": ENTRIES_MAX,
        "opens_at": UnixMillis(now.0 - 60_000).to_string(),
        "draw_at": now.plus_ms(A_DAY_MS).to_string(),
        "closes_at": now.plus_ms(2 * A_DAY_MS).to_string(),
    });
    server.put_sku_with(DRAWN, 1_000, terms)?;
    let client = database::connect(&url).await?;
    let mut entry = Template::order(DRAWN, "");
    // Other buyers: a key is one request's.
    let mut order = Template::order(HOT, "").starting_at(1_000_000_000);
    let window = lab.window();
    // The first of each side grow the maps.
    rate(server.data, CONNECTIONS, window / 4, &mut entry, 202)?;
    rate(server.data, CONNECTIONS, window / 4, &mut order, 201)?;
    let rounds = alternate(lab.rounds(), ["entries/s", "orders/s"], async |side| {
        database::settle(&client).await?;
        match side {
            0 => rate(server.data, CONNECTIONS, window, &mut entry, 202),
            _ => rate(server.data, CONNECTIONS, window, &mut order, 201),
        }
    })
    .await?;
    server.audit()?;
    drop(server);
    postgres.stop().await?;
    Ok(vec![
        Finding::spread(
            "entries of a draw over HTTP / waiting orders",
            rounds.ratio(0, 1),
        ),
        Finding::spread("entries of a draw over HTTP, a second", rounds.side(0)),
        Finding::spread("waiting orders over HTTP, a second", rounds.side(1)),
    ])
}
