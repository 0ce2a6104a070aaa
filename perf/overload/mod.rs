//! P9: ten times what a slow database takes. Orders that could not be persisted within their wait are
//! refused at the door, so what is let in is persisted.

use crate::fixture::child::Server;
use crate::fixture::database::{self, Postgres};
use crate::fixture::engine::HOT;
use crate::fixture::load::{Load, load};
use crate::fixture::{Finding, Lab, Scratch, Target, blocking};

/// Rows a second that the database takes, all workers together.
const ROWS_A_SECOND: f64 = 2_000.0;
/// Orders a second that are offered.
const OFFERED: f64 = 20_000.0;
/// As many as may wait at once: half of the order timeout at that rate, and more.
const CONNECTIONS: usize = 10_000;
const WORKERS: f64 = 2.0;

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("overload").await?;
    let settings = [("DATABASE__URL", url.as_str()), ("WORKERS__COUNT", "2")];
    let server = Server::start(&scratch.dir("millrace")?, &settings)?;
    server.put_sku(HOT, u32::MAX)?;
    let client = database::connect(&url).await?;
    // By the rows of a statement, so that sleeping is not rounded up for each of them.
    client
        .batch_execute(&format!(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                 PERFORM pg_sleep((SELECT count(*) FROM added) / {:.1}); RETURN NULL;
             END $$;
             CREATE TRIGGER slow AFTER INSERT ON orders REFERENCING NEW TABLE AS added
                 FOR EACH STATEMENT EXECUTE FUNCTION slow()",
            ROWS_A_SECOND / WORKERS
        ))
        .await?;
    let seconds = lab.pick(60.0, 20.0);
    let plan = Load {
        rate: OFFERED,
        seconds,
        mode: "wait",
        connections: CONNECTIONS,
        seed: 1,
        more: ["--buyers", "4000000"].map(str::to_owned).to_vec(),
    };
    let report = blocking(|| load(server.data, HOT, &plan))?;
    server.audit()?;
    drop(server);
    postgres.stop().await?;
    let (placed, late) = (report.count("created"), report.count("timed_out"));
    let waited = placed + late + report.count("undecided");
    // The last of them were answered after the last was offered.
    let took = report.number("elapsed_ms")? / 1_000.0;
    Ok(vec![
        Finding::of(
            format!("goodput at {OFFERED:.0} orders a second offered / the {ROWS_A_SECOND:.0} rows a second that the database takes"),
            placed as f64 / took / ROWS_A_SECOND,
        )
        .against("P9", Target::AtLeast(0.9)),
        Finding::of("waiting orders that timed out or stayed undecided, %", (waited - placed) as f64 / waited as f64 * 100.0)
            .against("P9b", Target::AtMost(0.1)),
        Finding::of("refused at once (503), of all, %", report.count("unavailable") as f64 / report.number("offered")? * 100.0),
        Finding::of("p50 of a refusal, ms", report.latency_ms("unavailable", "p50_ms")?),
        Finding::of("p99 of a placed order, ms", report.latency_ms("created", "p99_ms")?),
    ])
}
