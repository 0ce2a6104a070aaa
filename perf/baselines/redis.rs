//! The design that people reach for: Redis holds the stock and a stream, one consumer inserts.
//!
//! Redis runs with `appendfsync always`, so that its answer is as durable as Millrace's `202`. The
//! connection is multiplexed: commands that are under way at once share a write, and Redis a sync.

use std::net::SocketAddr;
use std::time::Duration;

use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::tokio_bridge;
use millrace::order::{IdClock, Lane, UnixMillis};
use redis::aio::MultiplexedConnection;
use redis::streams::{StreamReadOptions, StreamReadReply};
use redis::{AsyncCommands, Script};
use tokio::runtime::Handle;
use tokio_postgres::NoTls;

use super::rows::TABLES;
use super::{Body, Placed, answer, refuse};

/// Takes the stock and appends the order, or does neither.
const TAKE_AND_APPEND: &str = "
    if redis.call('DECRBY', KEYS[1], ARGV[3]) < 0 then
        redis.call('INCRBY', KEYS[1], ARGV[3])
        return 0
    end
    redis.call('XADD', KEYS[2], '*', 'id', ARGV[1], 'user', ARGV[2], 'quantity', ARGV[3], 'sku', ARGV[4])
    return 1";
const STREAM: &str = "orders";
const GROUP: &str = "writer";
const BATCH_ROWS: usize = 5_000;

/// A batch in one statement, which moves the counters as well.
const INSERT_MANY: &str = "
    WITH wanted AS (
        SELECT * FROM unnest($1::int8[], $2::text[], $3::int8[], $4::text[]) AS w (order_id, user_id, quantity, sku_id)
    ), moved AS (
        UPDATE shop_sku s SET held = held + w.units
          FROM (SELECT sku_id, sum(quantity)::int8 AS units FROM wanted GROUP BY sku_id) w WHERE s.sku_id = w.sku_id
        RETURNING s.id, s.sku_id, s.unit_price, s.currency
    )
    INSERT INTO shop_orders (order_id, user_id, sku, quantity, amount, currency, status, created_at, expires_at)
    SELECT w.order_id, w.user_id, m.id, w.quantity, m.unit_price * w.quantity, m.currency, 1, now(),
           now() + interval '15 minutes'
      FROM wanted w JOIN moved m USING (sku_id)";

/// Places orders in Redis; a task inserts them.
pub struct Stream {
    redis: MultiplexedConnection,
    script: Script,
    ids: IdClock,
    runtime: Handle,
}

impl Stream {
    /// Connects to both, and starts the consumer.
    ///
    /// # Errors
    /// If either cannot be reached.
    pub async fn new(redis: SocketAddr, database: &str) -> anyhow::Result<Self> {
        let client = redis::Client::open(format!("redis://{redis}"))?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let _: () = connection.set("stock:HOT", 4_000_000_000_u64).await?;
        // There is none yet, so it says so only where there is one.
        let _: Result<(), _> = connection.xgroup_create_mkstream(STREAM, GROUP, "0").await;
        let (postgres, driver) = tokio_postgres::connect(database, NoTls).await?;
        tokio::spawn(driver);
        postgres.batch_execute(TABLES).await?;
        let reader = client.get_multiplexed_async_connection().await?;
        tokio::spawn(async move {
            if let Err(error) = consume(reader, postgres).await {
                eprintln!("the consumer of the stream stopped: {error:#}");
                std::process::exit(1);
            }
        });
        Ok(Stream {
            redis: connection,
            script: Script::new(TAKE_AND_APPEND),
            ids: IdClock::new(UnixMillis::now(), UnixMillis(i64::MAX)),
            runtime: Handle::current(),
        })
    }
}

async fn consume(
    mut redis: MultiplexedConnection,
    postgres: tokio_postgres::Client,
) -> anyhow::Result<()> {
    let insert = postgres.prepare(INSERT_MANY).await?;
    let options = StreamReadOptions::default()
        .group(GROUP, "one")
        .count(BATCH_ROWS);
    loop {
        let read: Option<StreamReadReply> =
            redis.xread_options(&[STREAM], &[">"], &options).await?;
        let entries: Vec<_> = read
            .into_iter()
            .flat_map(|read| read.keys)
            .flat_map(|key| key.ids)
            .collect();
        if entries.is_empty() {
            // Blocking reads would hold up a connection; at rates that matter there is always something.
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        }
        let text = |name: &str| -> Vec<String> {
            entries.iter().filter_map(|entry| entry.get(name)).collect()
        };
        let numbers = |name: &str| -> Vec<i64> {
            entries.iter().filter_map(|entry| entry.get(name)).collect()
        };
        postgres
            .execute(
                &insert,
                &[
                    &numbers("id"),
                    &text("user"),
                    &numbers("quantity"),
                    &text("sku"),
                ],
            )
            .await?;
        let done: Vec<&str> = entries.iter().map(|entry| entry.id.as_str()).collect();
        let _: () = redis::pipe()
            .xack(STREAM, GROUP, &done)
            .xdel(STREAM, &done)
            .query_async(&mut redis)
            .await?;
    }
}

impl Service for Stream {
    fn call(&self, request: &Request<'_>, response: &mut Response) {
        let Ok(body) = serde_json::from_slice::<Body<'_>>(request.body) else {
            return refuse(response, 400, "malformed_json");
        };
        let Ok(id) = self.ids.next(Lane::FIRST) else {
            return refuse(response, 503, "no_id");
        };
        let (mut redis, script) = (self.redis.clone(), self.script.clone());
        let (user, sku, quantity) = (
            body.user_id.to_owned(),
            body.sku_id.to_owned(),
            body.quantity,
        );
        let taken = tokio_bridge::run(request, &self.runtime, async move {
            let mut call = script.key(format!("stock:{sku}"));
            call.key(STREAM)
                .arg(id.as_i64())
                .arg(user)
                .arg(quantity)
                .arg(sku);
            call.invoke_async::<i64>(&mut redis).await
        });
        match taken {
            Ok(Ok(1)) => {
                let mut digits = itoa::Buffer::new();
                let placed = Placed {
                    order_id: digits.format(id.as_i64()),
                    user_id: body.user_id,
                    sku_id: body.sku_id,
                    quantity: body.quantity,
                    status: "accepted",
                };
                answer(response, 202, &placed);
            }
            Ok(Ok(_)) => refuse(response, 409, "sold_out"),
            Ok(Err(error)) => refuse(response, 500, &error.to_string()),
            Err(_) => refuse(response, 500, "internal"),
        }
    }
}
