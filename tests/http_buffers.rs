//! What connections hold in memory: bounded while a client does not read, given back when idle.
//! Alone in its process, to count every byte.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::hardened::{self, CloseReason};
use millrace::http::server::limits::{BodyLimits, Limits};

const PATIENCE: Duration = Duration::from_secs(20);

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Answers with the body that came, or with a thousand bytes.
struct Echo;

impl Service for Echo {
    fn call(&self, request: &Request<'_>, response: &mut Response) {
        response.body_mut().extend_from_slice(request.body);
        if request.body.is_empty() {
            response.body_mut().resize(1_000, b'x');
        }
    }
}

fn live_bytes() -> usize {
    LIVE_BYTES.load(Ordering::Relaxed)
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let ends = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < ends, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One test, because two at a time would count each other's bytes.
#[test]
fn connections_hold_little_when_idle_and_no_more_than_their_bound_when_unread() {
    const BODY_BYTES: usize = 500_000;
    const CONNECTIONS: usize = 40;
    const PIPELINED: usize = 100_000;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let limits = Limits {
        bodies: BodyLimits {
            bytes_max: BODY_BYTES,
            rules: &[],
        },
        request_timeout: Duration::from_secs(4),
        ..Limits::default()
    };
    let server = hardened::serve(listener, Arc::new(Echo), limits).expect("a server");
    let head = "POST /large HTTP/1.1\r\nHost: h\r\nContent-Length: 500000\r\n\r\n";
    let request = [head.as_bytes(), &vec![b'y'; BODY_BYTES]].concat();
    let mut answer = vec![0; BODY_BYTES];
    let pipeline = "GET / HTTP/1.1\r\nHost: h\r\n\r\n".repeat(PIPELINED);

    // Large bodies in and out of connections that then fall idle.
    let before = live_bytes();
    let mut most = 0;
    let mut clients: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|_| {
            let mut stream = TcpStream::connect(server.local_addr()).expect("a connection");
            stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            stream.write_all(&request).expect("sent");
            let mut end = [0; 4];
            while &end != b"\r\n\r\n" {
                end.rotate_left(1);
                stream.read_exact(&mut end[3..]).expect("the head");
            }
            stream.read_exact(&mut answer).expect("the body");
            most = live_bytes().max(most);
            stream
        })
        .collect();
    assert!(
        most > before + BODY_BYTES,
        "{} bytes: they show",
        most - before
    );
    // A read and a write buffer of the smallest size, and what the runtime keeps of each.
    eventually("idle connections give their buffers back", || {
        live_bytes() < before + CONNECTIONS * 16 * 1024
    });
    // They are as good as new.
    for stream in &mut clients {
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            .expect("sent");
        stream.read_exact(&mut [0; 1_000]).expect("an answer");
    }
    drop(clients);
    eventually("they are gone", || {
        server.counters().open.load(Ordering::Acquire) == 0
    });

    // A hundred megabytes of answers to a client that never reads.
    let before = live_bytes();
    let stream = TcpStream::connect(server.local_addr()).expect("a connection");
    stream.set_nonblocking(true).expect("non-blocking");
    let (mut sent, mut most) = (0, 0);
    let unread = || server.counters().closed(CloseReason::UnreadReply) == 1;
    eventually("the client is cut", || {
        while let Some(rest) = pipeline
            .as_bytes()
            .get(sent..)
            .filter(|rest| !rest.is_empty())
        {
            match (&stream).write(rest) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // It has been cut.
                Err(_) => break,
            }
        }
        most = live_bytes().max(most);
        unread()
    });
    let served = server.counters().requests.load(Ordering::Relaxed) as usize;
    assert!(
        served < PIPELINED,
        "the client is not read from: {served} served"
    );
    let grown = most - before;
    assert!(grown < 1024 * 1024, "{grown} bytes for one connection");
}
