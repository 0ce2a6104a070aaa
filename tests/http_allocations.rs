//! A steady connection allocates nothing for its requests. Alone in its process, to count.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use millrace::http::data_plane::hardened::{self, Limits};
use millrace::http::data_plane::message::{Request, Response, Service};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for _ in 0..REQUESTS {
        exchange();
    }
    let spent = ALLOCATIONS.load(Ordering::Relaxed) - before;
    // The date, once a second, and the test harness have some of their own.
    assert!(
        spent < REQUESTS / 50,
        "{spent} allocations in {REQUESTS} requests"
    );
}
