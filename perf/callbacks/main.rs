//! Callbacks that are coalesced into set-based transactions, as the cashier does it, beside a
//! well-written update for each of them, alternating on the same PostgreSQL, all for one hot SKU.
//!
//! ```text
//! cargo run --release --example callbacks [ROUNDS [PAYMENTS [CONNECTIONS]]]     6 4000 16
//! ```
//!
//! The row-at-a-time side does in one statement, which is its own transaction, what has to be done
//! for one callback: the event, the payment, the order's guarded transition, the SKU's counters and
//! the stock journal; CONNECTIONS of them at once. The other side takes in as many at once as wait
//! where 256 deliveries are under way. Both are durable when they answer. Printed are callbacks a
//! second of each, and the ratio: median, least, greatest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use millrace::app::{OpenDatabase, open_database, prepare_schema};
use millrace::config::Config;
use millrace::order::payment::{Notice, Payment, Provider};
use millrace::order::{
    Currency, Order, OrderId, PayloadHash, Quantity, SkuId, SkuNumber, UnixMillis, UserId,
};
use millrace::state::stock::SaleTerms;
use millrace::store::batch::BatchWriter;
use millrace::store::postgres::Database;
use millrace::store::settlement::SettlementWriter;
use millrace::store::settlement::payments::Arrival;

/// Deliveries under way at once on the coalescing side.
const WAITING: usize = 256;

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
    INSERT INTO stock_journal (sku, cause, reference, held_delta, sold_delta, total_after, held_after, sold_after)
    SELECT id, 'paid', $3, -quantity, quantity, total, held, sold FROM moved";

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>());
    let mut next = |default| arguments.next().unwrap_or(Ok(default));
    let (rounds, payments, connections) = (next(6)?, next(4_000)?, next(16)?);
    let scratch = tempfile::tempdir()?;
    let mut config = Config {
        data_dir: scratch.path().to_owned(),
        ..Config::default()
    };
    config.database.pool_size = connections;
    let OpenDatabase { database, embedded } = open_database(&config).await?;
    prepare_schema(&config, &database).await?;
    let guard = database.claim().await?;
    let taken = database.take_over(guard, 2, UnixMillis(0)).await?;
    let terms = SaleTerms {
        title: "hot".into(),
        unit_price: 100,
        currency: Currency::new("EUR")?,
        per_user_limit: None,
        opens_at: None,
        closes_at: None,
    };
    let sku = database
        .put_sku(taken.lease, &SkuId::new("HOT")?, &terms, u32::MAX)
        .await?;
    let mut writer = BatchWriter::new(database.clone(), taken.lease, 0);
    let mut settlement = SettlementWriter::new(database.clone(), taken.lease, 1);
    let mut ratios = Vec::new();
    for round in 0..rounds {
        let mut rates = [0.0; 2];
        // Which goes first alternates too.
        for side in [round % 2, 1 - round % 2] {
            let first = 1 + ((2 * round + side) * payments) as u64;
            let orders: Vec<Order> = (first..first + payments as u64)
                .map(|number| order(number, &sku.id, sku.number))
                .collect();
            for part in orders.chunks(5_000) {
                writer.write(&part.iter().collect::<Vec<_>>()).await?;
            }
            let notices: Vec<Notice> = orders.iter().map(notice).collect();
            let started = Instant::now();
            if side == 0 {
                coalesced(&mut settlement, &notices).await?;
            } else {
                one_by_one(&database, notices, connections).await?;
            }
            rates[side] = payments as f64 / started.elapsed().as_secs_f64();
        }
        println!(
            "round {}: coalesced {:.0}/s, row at a time {:.0}/s",
            round + 1,
            rates[0],
            rates[1]
        );
        ratios.push(rates[0] / rates[1]);
    }
    let audit = millrace::pipeline::audit::audit(&database, None).await?;
    assert!(audit.ok, "{audit:?}");
    ratios.sort_by(f64::total_cmp);
    let (Some(least), Some(greatest)) = (ratios.first(), ratios.last()) else {
        return Ok(());
    };
    println!(
        "callbacks a second, coalesced / row at a time: {:.1} ({least:.1} to {greatest:.1}), {connections} connections, {payments} payments a round",
        ratios[ratios.len() / 2]
    );
    if let Some(embedded) = embedded {
        embedded.stop().await?;
    }
    Ok(())
}

async fn coalesced(
    settlement: &mut SettlementWriter,
    notices: &[Notice],
) -> Result<(), Box<dyn std::error::Error>> {
    for part in notices.chunks(WAITING) {
        let now = UnixMillis::now();
        let arrival = Arrival {
            now,
            check_at: now,
            judge: true,
            with_waiting: false,
        };
        let part: Vec<&Notice> = part.iter().collect();
        settlement.take_in(&part, arrival, &[]).await?;
    }
    Ok(())
}

async fn one_by_one(
    database: &Database,
    notices: Vec<Notice>,
    connections: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let (notices, next) = (Arc::new(notices), Arc::new(AtomicUsize::new(0)));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..connections {
        let (database, notices, next) = (database.clone(), Arc::clone(&notices), Arc::clone(&next));
        tasks.spawn(async move {
            let client = database.pooled().await.map_err(|e| e.to_string())?;
            let statement = client
                .prepare_cached(ONE)
                .await
                .map_err(|e| e.to_string())?;
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
                    .await
                    .map_err(|e| format!("{e:?}"))?;
            }
            Ok::<(), String>(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

fn order(number: u64, sku_id: &SkuId, sku: SkuNumber) -> Order {
    let now = UnixMillis::now();
    Order {
        id: OrderId::new(number).unwrap_or(OrderId::MAX),
        user_id: UserId::new(&format!("u-{number}")).expect("a user id"),
        sku_id: sku_id.clone(),
        sku,
        quantity: Quantity::ONE,
        adjustment: 0,
        amount: 100,
        currency: Currency::new("EUR").expect("a currency"),
        created_at: now,
        expires_at: now.plus_ms(3_600_000),
        key: None,
        payload: PayloadHash(number),
        attributes: None,
    }
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
        }),
    }
}
