//! A constant answer from one engine, to compare them with a load generator:
//!
//! ```text
//! cargo build --release --example http_constant
//! http_constant hardened 127.0.0.1:9001 &   http_constant stock 127.0.0.1:9002 &
//! wrk -t1 -c64 -d5 http://127.0.0.1:9001/   # alternating with 9002
//! ```
//!
//! `minihttp` is that engine behind our `Service`, `stock` the engine alone, without even looking
//! at the request.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use may_minihttp::{HttpServer, HttpService};
use millrace::http::data_plane::hardened::{self, Limits};
use millrace::http::data_plane::message::{Request, Response, Service};
use millrace::http::data_plane::{minihttp, runtime};

struct Constant;

impl Service for Constant {
    fn call(&self, _: &Request<'_>, response: &mut Response) {
        response.header("Content-Type", "text/plain");
        response.body_mut().extend_from_slice(b"Hello, World!");
    }
}

#[derive(Clone)]
struct Stock;

impl HttpService for Stock {
    fn call(
        &mut self,
        _: may_minihttp::Request<'_, '_, '_>,
        response: &mut may_minihttp::Response<'_>,
    ) -> std::io::Result<()> {
        response.header("Content-Type: text/plain");
        response.body("Hello, World!");
        Ok(())
    }
}

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let engine = arguments.next().unwrap_or_default();
    let address: SocketAddr = arguments.next().unwrap_or_default().parse()?;
    runtime::configure(0);
    match engine.as_str() {
        "hardened" => {
            let listener = TcpListener::bind(address)?;
            let _server = hardened::serve(listener, Arc::new(Constant), Limits::default())?;
            loop {
                std::thread::park();
            }
        }
        "minihttp" => {
            let (handle, _) = minihttp::serve(address, Arc::new(Constant), &Limits::default())?;
            // It ends only by a panic of the engine.
            let _ = handle.join();
        }
        "stock" => {
            let _ = HttpServer(Stock).start(address)?.join();
        }
        _ => anyhow::bail!("usage: http_constant hardened|minihttp|stock ADDRESS"),
    }
    Ok(())
}
