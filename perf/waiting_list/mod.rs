//! Units that come back: as many orders as a SKU has units expire within half a second while as many buyers wait. How long
//! after an order's `expires_at` the next one is payable, without other load and with 5,000 orders a second of another SKU.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::json;

use crate::fixture::child::{Server, call};
use crate::fixture::compare::{Spread, alternate};
use crate::fixture::database::{Postgres, connect};
use crate::fixture::engine::HOT;
use crate::fixture::flood::{Template, offer};
use crate::fixture::{Finding, Lab, Scratch, blocking};

const UNITS: u32 = 10_000;
/// Orders offered a second while they are placed, and of another SKU while units come back.
const PLACED: f64 = 20_000.0;
const BESIDE: f64 = 5_000.0;
/// Time to pay an order, and an order that was assigned units.
const TTL_MS: i64 = 10_000;
const WAITLIST_TTL_MS: i64 = 900_000;
const CONNECTIONS: usize = 256;
const PATIENCE: Duration = Duration::from_secs(120);

/// The unit that the n-th expired order gave back is counted as the n-th assigned one's. An assignment counts from the
/// moment that its transaction begins; the last one, from outside, until it is committed.
const REFLOW: &str = "
    WITH gone AS (
        SELECT expires_at AS at, row_number() OVER (ORDER BY expires_at, order_id) AS n
          FROM order_list WHERE sku_id = $1 AND status = 'expired'
    ), came AS (
        SELECT expires_at - $2::int8 * interval '1 ms' AS at, row_number() OVER (ORDER BY expires_at, order_id) AS n
          FROM order_list WHERE sku_id = $1 AND status = 'pending_payment'
    )
    SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY extract(epoch FROM came.at - gone.at)::float8),
           extract(epoch FROM max(came.at) - max(gone.at))::float8, count(*)
      FROM gone JOIN came USING (n)";

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let postgres = Postgres::start(&scratch).await?;
    let url = postgres.database("waiting_list").await?;
    let ttl = TTL_MS.to_string();
    let settings = [("DATABASE__URL", &*url), ("ORDERS__PAYMENT_TTL_MS", &*ttl)];
    let server = Server::start(&scratch.dir("millrace")?, &settings)?;
    server.put_sku(HOT, u32::MAX)?;
    let client = connect(&url).await?;
    let mut beside = Template::order(HOT, "");
    let (mut number, mut sides) = (0, [(); 2].map(|()| [const { Vec::new() }; 3]));
    let names = ["all assigned after, ms", "beside 5,000 orders a second, ms"];
    let rounds = alternate(lab.pick(5, 2), names, async |side| {
        number += 1;
        let sku = format!("BACK-{number}");
        let body = json!({
            "unit_price": 100, "currency": "EUR", "total": UNITS, "waitlist_payment_ttl_ms": WAITLIST_TTL_MS,
        });
        let path = format!("/admin/v1/skus/{sku}");
        let (status, answer) = call(server.control, "PUT", &path, &body.to_string())?;
        ensure!(status / 100 == 2, "PUT of a SKU: {status} {answer}");
        let length = Duration::from_secs_f64(f64::from(UNITS) / PLACED);
        let started = Instant::now();
        for (waits, status) in [(false, 201), (true, 202)] {
            let mut order = order(&sku, waits);
            blocking(|| offer(server.data, CONNECTIONS, PLACED, length, &mut order))?
                .only(status)?;
        }
        let until_expiry = Duration::from_millis(TTL_MS as u64).saturating_sub(started.elapsed());
        std::thread::scope(|threads| {
            let load = (side == 1).then(|| {
                let length = until_expiry + Duration::from_secs(4);
                let order = &mut beside;
                threads.spawn(move || offer(server.data, CONNECTIONS, BESIDE, length, order))
            });
            let deadline = Instant::now() + PATIENCE;
            while waiting(&server, &sku)? > 0 {
                ensure!(Instant::now() < deadline, "orders go on waiting");
                std::thread::sleep(Duration::from_millis(10));
            }
            if let Some(load) = load {
                let answered = load
                    .join()
                    .map_err(|_| anyhow::anyhow!("the load has panicked"))?;
                answered?.only(201)?;
            }
            anyhow::Ok(())
        })?;
        let row = client.query_one(REFLOW, &[&sku, &WAITLIST_TTL_MS]).await?;
        ensure!(
            row.get::<_, i64>(2) == i64::from(UNITS),
            "not every unit found its buyer"
        );
        let quantiles: Vec<f64> = row.get(0);
        let last: f64 = row.get(1);
        for (all, value) in sides[side]
            .iter_mut()
            .zip([quantiles[0], quantiles[1], last])
        {
            all.push(value * 1_000.0);
        }
        Ok(last * 1_000.0)
    });
    rounds.await?;
    server.audit()?;
    drop(server);
    postgres.stop().await?;
    let mut findings = Vec::new();
    for (side, words) in ["", ", beside 5,000 orders a second"].iter().enumerate() {
        let what = [
            "p50 from expires_at of an order to the assignment of the next",
            "p99 likewise",
            "from the last expires_at to the last assignment of 10,000",
        ];
        for (values, what) in sides[side].iter().zip(what) {
            findings.push(Finding::spread(
                format!("{what}{words}, ms"),
                Spread::of(values),
            ));
        }
    }
    Ok(findings)
}

/// One unit by a new buyer each time, who waits if none is free.
fn order(sku: &str, waits: bool) -> Template {
    let (buyer, more) = if waits {
        ("w", r#","waitlist":true"#)
    } else {
        ("u", "")
    };
    Template::new(
        "POST",
        "/v1/orders",
        "Content-Type: application/json\r\n",
        &format!(r#"{{"user_id":"{buyer}-{sku}-0000000000","sku_id":"{sku}"{more}}}"#),
    )
}

/// Orders that wait for units of a SKU.
fn waiting(server: &Server, sku: &str) -> anyhow::Result<u64> {
    let (_, text) = call(server.data, "GET", &format!("/v1/skus/{sku}"), "")?;
    let sku: serde_json::Value = serde_json::from_str(&text)?;
    sku["waiting"].as_u64().context("a SKU says how many wait")
}
