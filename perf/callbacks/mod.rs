//! Callbacks that are coalesced into set-based transactions, as the payment processor does it, beside a
//! well-written statement for each of them, all for one hot SKU.
//!
//! The row-at-a-time side does in one statement, which is its own transaction, what has to be done
//! for one callback: the event, the payment, the order's guarded transition, the SKU's counters and
//! the stock log; several connections at once. The other side takes in as many at once as wait
//! where 256 deliveries are under way. Both are durable when they answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::ensure;
use millrace::app::{OpenDatabase, open_database, prepare_schema};
use millrace::config::Config;
use millrace::order::payment::{Delivery, Notice, Payment, Provider};
use millrace::order::{Currency, Order, OrderId, SkuId, UnixMillis};
use millrace::state::stock::{SaleTerms, WaitlistTerms};
use millrace::store::batch::BatchWriter;
use millrace::store::postgres::{Database, lease, skus};
use millrace::store::settlement::SettlementWriter;
use millrace::store::settlement::payments::{self, Arrival};

use crate::fixture::compare::alternate;
use crate::fixture::engine::{BATCH_ROWS, HOT, rows};
use crate::fixture::{Finding, Lab, Scratch};

/// Deliveries under way at once on the coalescing side.
const WAITING: usize = 256;
/// Connections of the row-at-a-time side.
const CONNECTIONS: usize = 16;
/// Callbacks of a side and round.
const PAYMENTS: u64 = 4_000;

const ONE: &str = "
    WITH event AS (
        INSERT INTO payment_events (received_at, provider, event_id, kind, body, payment_id)
        VALUES (now(), 'standard', $1, 'payment.succeeded', $2, $3) ON CONFLICT DO NOTHING RETURNING id
    ), paid AS (
        UPDATE orders SET status = 2 FROM event WHERE order_id = $4 AND status = 1 AND amount = $5 AND expires_at > now()
        RETURNING sku, quantity
    ), payment AS (
        INSERT INTO payments (received_at, provider, payment_id, order_ref, order_id, amount, currency, state, changed_at,
                              check_at)
        SELECT now(), 'standard', $3, $4::text, $4, $5, 'EUR', 'matched', now(), now() FROM paid
    ), moved AS (
        UPDATE sku s SET held = held - p.quantity, sold = sold + p.quantity FROM paid p WHERE s.id = p.sku
        RETURNING s.id, p.quantity, s.total, s.held, s.sold
    )
    INSERT INTO stock_log (sku, cause, reference, held_delta, sold_delta, total_after, held_after, sold_after)
    SELECT id, 'paid', $3, -quantity, quantity, total, held, sold FROM moved";

/// Runs the case.
pub async fn run(lab: &Lab) -> anyhow::Result<Vec<Finding>> {
    let scratch = Scratch::new()?;
    let mut config = Config {
        data_dir: scratch.dir("millrace")?,
        ..Config::default()
    };
    config.database.pool_size = CONNECTIONS;
    let OpenDatabase { database, embedded } = open_database(&config).await?;
    prepare_schema(&config, &database).await?;
    let guard = lease::claim(&database).await?;
    let taken = lease::take_over(guard, 2, UnixMillis(0)).await?;
    let terms = SaleTerms {
        title: "hot".into(),
        unit_price: 100,
        currency: Currency::new("EUR")?,
        per_user_limit: None,
        opens_at: None,
        closes_at: None,
        waitlist: WaitlistTerms::default(),
        draw: None,
    };
    let hot = SkuId::new(HOT)?;
    let sku = skus::put(&database, taken.lease, &hot, &terms, u32::MAX).await?;
    let mut writer = BatchWriter::new(database.clone(), taken.lease, 0);
    let mut settlement = SettlementWriter::new(database.clone(), taken.lease, 1);
    let mut first = 0;
    let names = ["coalesced/s", "a statement each/s"];
    let rounds = alternate(lab.rounds(), names, async |side| {
        first += PAYMENTS;
        let orders = rows(first, PAYMENTS, sku.number);
        for part in orders.chunks(BATCH_ROWS) {
            writer.write(&part.iter().collect::<Vec<_>>()).await?;
        }
        let notices: Vec<Notice> = orders.iter().map(notice).collect();
        let started = Instant::now();
        match side {
            0 => coalesced(&mut settlement, &notices).await?,
            _ => one_by_one(&database, notices).await?,
        }
        Ok(PAYMENTS as f64 / started.elapsed().as_secs_f64())
    })
    .await?;
    let audit = millrace::pipeline::admin::audit::audit(&database, None).await?;
    ensure!(audit.ok, "{audit:?}");
    if let Some(embedded) = embedded {
        embedded.stop().await?;
    }
    Ok(vec![
        Finding::spread(
            format!("callbacks coalesced / a statement each over {CONNECTIONS} connections"),
            rounds.ratio(0, 1),
        ),
        Finding::spread("callbacks coalesced, a second", rounds.side(0)),
    ])
}

async fn coalesced(settlement: &mut SettlementWriter, notices: &[Notice]) -> anyhow::Result<()> {
    for part in notices.chunks(WAITING) {
        let now = UnixMillis::now();
        let arrival = Arrival {
            now,
            check_at: now,
            match_now: true,
            with_waiting: false,
        };
        let part: Vec<Delivery> = part
            .iter()
            .map(|notice| Delivery {
                notice: notice.clone(),
                received_at: now,
            })
            .collect();
        let part: Vec<&Delivery> = part.iter().collect();
        payments::ingest(settlement, &part, arrival, &[], &[]).await?;
    }
    Ok(())
}

async fn one_by_one(database: &Database, notices: Vec<Notice>) -> anyhow::Result<()> {
    let (notices, next) = (Arc::new(notices), Arc::new(AtomicUsize::new(0)));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..CONNECTIONS {
        let (database, notices, next) = (database.clone(), Arc::clone(&notices), Arc::clone(&next));
        tasks.spawn(async move {
            let client = database.pooled().await?;
            let statement = client.prepare_cached(ONE).await?;
            while let Some(notice) = notices.get(next.fetch_add(1, Ordering::Relaxed)) {
                let Some(payment) = &notice.payment else {
                    continue;
                };
                let order_id = payment.order_id().map(OrderId::as_i64);
                client
                    .execute(
                        &statement,
                        &[
                            &notice.event_id,
                            &&*notice.body,
                            &payment.payment_id,
                            &order_id,
                            &payment.amount,
                        ],
                    )
                    .await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

fn notice(order: &Order) -> Notice {
    let id = order.id;
    Notice {
        provider: Provider::Standard,
        event_id: format!("evt-{id}"),
        kind: "payment.succeeded".into(),
        body: format!(
            r#"{{"type":"payment.succeeded","data":{{"order_id":"{id}","amount":100}}}}"#
        )
        .into_bytes()
        .into_boxed_slice(),
        payment: Some(Payment {
            payment_id: format!("pay-{id}"),
            order_ref: id.to_string(),
            amount: order.amount,
            currency: order.currency,
            receipt: None,
            made_at: None,
        }),
    }
}
