//! A migrated database with SKUs, orders to write into it, and what can be asked of it.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use millrace::order::{
    Currency, IdempotencyKey, KeyHash, Lane, Order, OrderId, PayloadHash, Quantity, SkuId,
    SkuNumber, UnixMillis, UserId,
};
use millrace::pipeline::admin::audit::{audit, audit_in_parts};
use millrace::state::State;
use millrace::state::stock::{SaleTerms, Sku, WaitlistTerms};
use millrace::store::batch::BatchWriter;
use millrace::store::cluster::formats::Formats;
use millrace::store::cluster::lanes;
use millrace::store::cluster::membership::{self, Candidate, Join};
use millrace::store::postgres::audit::PartRows;
use millrace::store::postgres::lease::{self, Taken};
use millrace::store::postgres::{Database, NodeLease, skus};
use millrace::store::{StoreError, schema};

use super::postgres::{TestDatabase, connect};
use super::proxy::Proxy;

/// What a step may take where the test is not about steps.
pub const STEP: Duration = Duration::from_secs(10);
pub const SCHEMA: &str = "millrace";

/// A count from the environment, so that a patient person can turn the same test up.
pub fn count(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().expect("a number"))
        .unwrap_or(default)
}

/// A migrated database that this process has taken over.
pub struct Sale {
    pub database: Database,
    pub taken: Taken,
    pub config: tokio_postgres::Config,
    admin: tokio_postgres::Client,
    _test: Option<TestDatabase>,
}

impl Sale {
    pub async fn open(shards: i16) -> Self {
        let test = TestDatabase::create().await;
        Self::at(test.config(), Some(test), shards).await
    }

    /// One in a database of a server of the test's own.
    pub async fn open_at(config: tokio_postgres::Config, shards: i16) -> Self {
        Self::at(config, None, shards).await
    }

    async fn at(config: tokio_postgres::Config, test: Option<TestDatabase>, shards: i16) -> Self {
        let database = Database::with_config(config.clone(), SCHEMA, 8, STEP).unwrap();
        let mut client = database.connect("test").await.unwrap();
        schema::migrate(&mut client, SCHEMA).await.unwrap();
        let taken = take_over(&database, shards).await.unwrap();
        Sale {
            admin: admin(&config).await,
            database,
            taken,
            config,
            _test: test,
        }
    }

    pub fn lease(&self) -> NodeLease {
        self.taken.lease
    }

    /// The same database with another patience.
    pub fn with_step(&self, step: Duration) -> Database {
        Database::with_config(self.config.clone(), SCHEMA, 4, step).unwrap()
    }

    /// The same database through a proxy.
    pub fn through(&self, proxy: &Proxy, step: Duration) -> Database {
        Database::with_config(proxy.config(&self.config), SCHEMA, 4, step).unwrap()
    }

    /// Goes on as one of several nodes, with every lane.
    pub async fn become_a_node(&mut self, shards: i16) {
        let mut session = self.database.connect("test").await.unwrap();
        let candidate = Candidate {
            home: "00000000-0000-0000-0000-000000000001",
            log: None,
            address: "127.0.0.1:8082",
            formats: Formats {
                reads: 1,
                writes_from: 1,
            },
            answer_lease_ms: 3_000,
            shards,
            ids_from: UnixMillis::now(),
        };
        let joined = membership::join(&mut session, &candidate).await.unwrap();
        let Join::Joined(joined) = joined else {
            panic!("{joined:?}");
        };
        self.taken.lease = joined.lease;
        membership::activate(&self.database, joined.lease, UnixMillis(0))
            .await
            .unwrap();
        let lanes = lanes::claim_free(&self.database, joined.lease)
            .await
            .unwrap();
        assert_eq!(lanes.len(), Lane::COUNT);
    }

    pub fn writer(&self, shard: i16) -> BatchWriter {
        BatchWriter::new(self.database.clone(), self.lease(), shard)
    }

    pub async fn sku(&self, name: &str, total: u32) -> Sku {
        self.sku_with(name, total, None).await
    }

    pub async fn sku_with(&self, name: &str, total: u32, per_user_limit: Option<u32>) -> Sku {
        let terms = SaleTerms {
            title: format!("{name}, the best"),
            unit_price: 100,
            currency: Currency::new("EUR").unwrap(),
            per_user_limit,
            opens_at: None,
            closes_at: None,
            waitlist: WaitlistTerms::default(),
            draw: None,
        };
        skus::put(
            &self.database,
            self.lease(),
            &SkuId::new(name).unwrap(),
            &terms,
            total,
        )
        .await
        .unwrap()
    }

    /// The session that does all of this.
    pub fn admin(&self) -> &tokio_postgres::Client {
        &self.admin
    }

    /// Does by hand what nobody should.
    pub async fn sql(&self, statements: &str) {
        self.admin
            .batch_execute(statements)
            .await
            .unwrap_or_else(|error| panic!("{statements}: {error:?}"));
    }

    /// The number that a query returns.
    pub async fn number(&self, query: &str) -> i64 {
        self.admin
            .query_one(query, &[])
            .await
            .unwrap_or_else(|error| panic!("{query}: {error:?}"))
            .get(0)
    }

    pub async fn rows(&self) -> i64 {
        self.number("SELECT count(*) FROM orders").await
    }

    /// Every id in `table`, in order.
    pub async fn ids(&self, table: &str) -> Vec<i64> {
        self.admin
            .query(
                &format!("SELECT order_id FROM {table} ORDER BY order_id"),
                &[],
            )
            .await
            .unwrap()
            .iter()
            .map(|row| row.get(0))
            .collect()
    }

    /// After the server was started again.
    pub async fn reconnect(&mut self) {
        self.admin = admin(&self.config).await;
    }

    /// One more connection, for a session that holds locks.
    pub async fn session(&self) -> tokio_postgres::Client {
        admin(&self.config).await
    }

    /// Waits until `query` returns true.
    pub async fn until(&self, query: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if self.admin.query_one(query, &[]).await.unwrap().get(0) {
                return;
            }
            assert!(Instant::now() < deadline, "not in time: {query}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub async fn assert_audit(&self, state: Option<&State>) {
        let audit = audit(&self.database, state).await.unwrap();
        assert!(audit.ok, "{:#?}", audit.checks);
    }

    /// The checks of the audit that fail, by name.
    pub async fn faults(&self) -> Vec<&'static str> {
        self.faults_in_parts(PartRows::default()).await
    }

    /// The same where tables are read in parts of so many rows.
    pub async fn faults_in_parts(&self, rows: PartRows) -> Vec<&'static str> {
        let audit = audit_in_parts(&self.database, None, rows).await.unwrap();
        let faults: Vec<_> = audit
            .checks
            .iter()
            .filter(|check| !check.ok)
            .map(|check| check.name)
            .collect();
        assert_eq!(audit.ok, faults.is_empty());
        faults
    }
}

async fn admin(config: &tokio_postgres::Config) -> tokio_postgres::Client {
    let client = connect(config).await;
    client
        .batch_execute(&format!("SET search_path = {SCHEMA}"))
        .await
        .unwrap();
    client
}

/// One plain order of `units`, with an id and a buyer of its own.
pub fn order(sku: &Sku, units: u32) -> Order {
    static NEXT: AtomicI64 = AtomicI64::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let key = format!("key-{number}");
    let quantity = Quantity::new(units).unwrap();
    let now = UnixMillis::now();
    Order {
        id: OrderId::from_i64(number << 22).unwrap(),
        user_id: UserId::new(&format!("u-{number}")).unwrap(),
        sku_id: sku.id.clone(),
        sku: sku.number,
        quantity,
        adjustment: 0,
        amount: 100 * i64::from(units),
        currency: Currency::new("EUR").unwrap(),
        created_at: now,
        expires_at: now.plus_ms(900_000),
        key: Some(KeyHash::of(IdempotencyKey::new(&key).unwrap())),
        payload: PayloadHash::of(&sku.id, quantity, 0, None, false),
        attributes: None,
    }
}

/// `count` orders of one unit.
pub fn orders(sku: &Sku, count: usize) -> Vec<Order> {
    (0..count).map(|_| order(sku, 1)).collect()
}

pub fn refs(orders: &[Order]) -> Vec<&Order> {
    orders.iter().collect()
}

/// A SKU's number that no row has.
pub const NO_SKU: SkuNumber = SkuNumber(i32::MAX);

/// Becomes the one active process of a database and takes its node over.
pub async fn take_over(database: &Database, shards: i16) -> Result<Taken, StoreError> {
    let guard = lease::claim(database).await?;
    lease::take_over(guard, shards, UnixMillis::now()).await
}
