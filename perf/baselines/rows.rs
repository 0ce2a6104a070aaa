//! One row per order and transaction, as a shop does it without Millrace.

use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod};
use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::tokio_bridge;
use millrace::order::{IdClock, Lane, UnixMillis};
use tokio::runtime::Handle;
use tokio_postgres::NoTls;

use super::{Body, POOL, Placed, answer, refuse};

/// One statement, so that the hot row is locked for one round trip and one commit, and no client
/// comes between.
const TAKE_AND_INSERT: &str = "
    WITH taken AS (
        UPDATE shop_sku SET held = held + $3 WHERE sku_id = $4 AND held + sold + $3 <= total
        RETURNING id, unit_price, currency
    )
    INSERT INTO shop_orders (order_id, user_id, sku, quantity, amount, currency, status, created_at, expires_at)
    SELECT $1, $2, id, $3, unit_price * $3, currency, 1, now(), now() + interval '15 minutes' FROM taken";

const INSERT: &str = "
    INSERT INTO shop_orders (order_id, user_id, sku, quantity, amount, currency, status, created_at, expires_at)
    SELECT $1, $2, id, $3::int8, unit_price * $3::int8, currency, 1, now(), now() + interval '15 minutes'
      FROM shop_sku WHERE sku_id = $4";

/// The tables: the columns that matter, one index.
pub const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS shop_sku (
        id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, sku_id text NOT NULL UNIQUE, unit_price bigint NOT NULL,
        currency text NOT NULL, total bigint NOT NULL, held bigint NOT NULL DEFAULT 0, sold bigint NOT NULL DEFAULT 0,
        CHECK (held >= 0 AND sold >= 0 AND held + sold <= total)
    ) WITH (fillfactor = 50);
    CREATE TABLE IF NOT EXISTS shop_orders (
        order_id bigint PRIMARY KEY, user_id text NOT NULL, sku integer NOT NULL, quantity integer NOT NULL,
        amount bigint NOT NULL, currency text NOT NULL, status smallint NOT NULL, created_at timestamptz NOT NULL,
        expires_at timestamptz NOT NULL
    );
    INSERT INTO shop_sku (sku_id, unit_price, currency, total) VALUES ('HOT', 100, 'EUR', 4000000000)
    ON CONFLICT DO NOTHING";

/// Places each order by a statement of its own.
pub struct Rows {
    pool: Pool,
    ids: IdClock,
    runtime: Handle,
    statement: &'static str,
}

impl Rows {
    /// `with_stock`: takes the stock too.
    ///
    /// # Errors
    /// If the database cannot be reached.
    pub async fn new(database: &str, with_stock: bool) -> anyhow::Result<Self> {
        let recycling_method = RecyclingMethod::Fast;
        let manager =
            Manager::from_config(database.parse()?, NoTls, ManagerConfig { recycling_method });
        let pool = Pool::builder(manager).max_size(POOL).build()?;
        pool.get().await?.batch_execute(TABLES).await?;
        Ok(Rows {
            pool,
            // By the second, because a service that is started again begins above the last one.
            ids: IdClock::new(UnixMillis::now(), UnixMillis(i64::MAX)),
            runtime: Handle::current(),
            statement: if with_stock { TAKE_AND_INSERT } else { INSERT },
        })
    }
}

impl Service for Rows {
    fn call(&self, request: &Request<'_>, response: &mut Response) {
        let Ok(body) = serde_json::from_slice::<Body<'_>>(request.body) else {
            return refuse(response, 400, "malformed_json");
        };
        let Ok(id) = self.ids.next(Lane::FIRST) else {
            return refuse(response, 503, "no_id");
        };
        let (pool, statement) = (self.pool.clone(), self.statement);
        let (user, sku, quantity) = (
            body.user_id.to_owned(),
            body.sku_id.to_owned(),
            body.quantity,
        );
        let placed = tokio_bridge::run(request, &self.runtime, async move {
            let work = async {
                let client = pool.get().await.map_err(|e| e.to_string())?;
                let statement = client
                    .prepare_cached(statement)
                    .await
                    .map_err(|e| e.to_string())?;
                let rows = client
                    .execute(
                        &statement,
                        &[&id.as_i64(), &user, &i64::from(quantity), &sku],
                    )
                    .await;
                rows.map_err(|e| e.to_string())
            };
            tokio::time::timeout(Duration::from_secs(7), work).await
        });
        match placed {
            Ok(Ok(Ok(1))) => {
                let (order_id, mut digits) = (id.as_i64(), itoa::Buffer::new());
                let placed = Placed {
                    order_id: digits.format(order_id),
                    user_id: body.user_id,
                    sku_id: body.sku_id,
                    quantity: body.quantity,
                    status: "pending_payment",
                };
                answer(response, 201, &placed);
            }
            Ok(Ok(Ok(_))) => refuse(response, 409, "sold_out"),
            Ok(Ok(Err(why))) => refuse(response, 500, &why),
            Ok(Err(_)) => refuse(response, 504, "timed_out"),
            Err(_) => refuse(response, 500, "internal"),
        }
    }
}
