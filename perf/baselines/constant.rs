//! Answers that cost nothing but the engine.

use std::net::SocketAddr;

use may_minihttp::{HttpServer, HttpService};
use millrace::http::message::{Request, Response};
use millrace::http::server::Service;

/// The same 13 bytes for everything, from our own engine.
pub struct Constant;

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
        request: may_minihttp::Request<'_, '_, '_>,
        response: &mut may_minihttp::Response<'_>,
    ) -> std::io::Result<()> {
        // It takes a body that nobody reads for the next request.
        std::io::Read::read_to_end(&mut request.body(), &mut Vec::new())?;
        response.header("Content-Type: text/plain");
        response.body("Hello, World!");
        Ok(())
    }
}

/// The same from stock `may_minihttp`.
///
/// # Errors
/// If it cannot listen.
pub fn serve_stock(address: SocketAddr) -> anyhow::Result<()> {
    let _ = HttpServer(Stock).start(address)?.join();
    Ok(())
}
