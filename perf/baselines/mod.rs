//! The usual alternatives, each as well as it can be written, on Millrace's own HTTP engine: only the
//! way of an order differs.
//!
//! * `row`: one statement, which is its own transaction, takes the stock and inserts the order.
//! * `insert`: the order alone, without any stock.
//! * `redis`: a script takes the stock and appends to a stream, and one consumer inserts what gathered.
//! * `constant`, `stock`: no order at all; what the engine, and `may_minihttp` as it comes, can answer.

mod constant;
mod redis;
mod rows;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use anyhow::Context;
use millrace::http::message::Response;
use millrace::http::server::Service;
use millrace::http::server::hardened;
use millrace::http::server::limits::Limits;
use millrace::http::server::runtime;
use serde::{Deserialize, Serialize};

/// Connections of the baselines' pool: more than PostgreSQL can make use of on a small machine.
const POOL: usize = 32;

/// `lab serve`.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// constant, stock, row, insert or redis.
    kind: String,
    /// Where to listen.
    address: SocketAddr,
    /// The database of `row`, `insert` and `redis`.
    #[arg(long)]
    database: Option<String>,
    /// The Redis of `redis`.
    #[arg(long)]
    redis: Option<SocketAddr>,
}

/// Serves until it is killed.
///
/// # Errors
/// If it cannot start.
pub fn serve(arguments: ServeArgs) -> anyhow::Result<()> {
    runtime::configure(0);
    let address = arguments.address;
    if arguments.kind == "stock" {
        return constant::serve_stock(address);
    }
    let listener = TcpListener::bind(address)?;
    if arguments.kind == "constant" {
        return mount(listener, Arc::new(constant::Constant));
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let database = arguments.database.context("--database is missing")?;
    match arguments.kind.as_str() {
        "row" | "insert" => {
            let rows = runtime.block_on(rows::Rows::new(&database, arguments.kind == "row"))?;
            mount(listener, Arc::new(rows))
        }
        "redis" => {
            let redis = arguments.redis.context("--redis is missing")?;
            let stream = runtime.block_on(redis::Stream::new(redis, &database))?;
            mount(listener, Arc::new(stream))
        }
        other => anyhow::bail!("there is no service `{other}`"),
    }
}

fn mount(listener: TcpListener, service: Arc<impl Service>) -> anyhow::Result<()> {
    let _server = hardened::serve(listener, service, Limits::default())?;
    loop {
        std::thread::park();
    }
}

/// The body of an order, as far as these look at it.
#[derive(Debug, Deserialize)]
struct Body<'a> {
    user_id: &'a str,
    sku_id: &'a str,
    #[serde(default = "one")]
    quantity: i32,
}

fn one() -> i32 {
    1
}

/// What they answer with.
#[derive(Debug, Serialize)]
struct Placed<'a> {
    order_id: &'a str,
    user_id: &'a str,
    sku_id: &'a str,
    quantity: i32,
    status: &'a str,
}

fn answer(response: &mut Response, status: u16, body: &impl Serialize) {
    response.set_status(status);
    response.header("Content-Type", "application/json");
    // Into a vector it cannot fail.
    let _ = serde_json::to_writer(response.body_mut(), body);
}

fn refuse(response: &mut Response, status: u16, why: &str) {
    answer(response, status, &serde_json::json!({ "error": why }));
}
