//! A steady connection allocates nothing for its requests. Alone in its process, to count.

#[path = "support/allocations.rs"]
mod allocations;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::hardened;
use millrace::http::server::limits::Limits;

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

struct Constant;

impl Service for Constant {
    fn call(&self, request: &Request<'_>, response: &mut Response) {
        response.set_status(201);
        response.header(
            "Location",
            format_args!("/v1/orders/{}", request.body.len()),
        );
        response.body_mut().extend_from_slice(request.body);
    }
}

#[test]
fn a_steady_connection_allocates_nothing_for_a_request() {
    const REQUESTS: usize = 5_000;
    allocations::leave_out_this_thread();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let server = hardened::serve(listener, Arc::new(Constant), Limits::default()).expect("serves");
    let mut stream = TcpStream::connect(server.local_addr()).expect("a connection");
    let request = b"POST /v1/orders HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n\
        Content-Length: 9\r\n\r\n{\"a\": 12}";
    let mut answer = [0; 1024];
    let mut exchange = || {
        stream.write_all(request).expect("sent");
        let mut length = 0;
        while !answer[..length].ends_with(b"{\"a\": 12}") {
            let read = stream.read(&mut answer[length..]).expect("received");
            assert!(read > 0, "closed");
            length += read;
        }
    };
    for _ in 0..100 {
        exchange();
    }
    let before = allocations::so_far();
    for _ in 0..REQUESTS {
        exchange();
    }
    let spent = allocations::so_far() - before;
    // The date, once a second, and the test harness have some of their own.
    assert!(
        spent < REQUESTS / 50,
        "{spent} allocations in {REQUESTS} requests"
    );
}
