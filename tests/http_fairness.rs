//! One client that never stops sending must not keep the others waiting. Alone in its process,
//! with a single worker, where it would show.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::hardened;
use millrace::http::server::limits::Limits;
use millrace::http::server::runtime;

/// Slow enough for one client to keep it busy for good.
struct Slow;

impl Service for Slow {
    fn call(&self, request: &Request<'_>, _: &mut Response) {
        if request.path() == "/flood" {
            let started = std::time::Instant::now();
            while started.elapsed() < Duration::from_micros(50) {
                std::hint::spin_loop();
            }
        }
    }
}

#[test]
fn a_flood_of_pipelined_requests_lets_others_through() {
    runtime::configure(1);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let server = hardened::serve(listener, Arc::new(Slow), Limits::default()).expect("serves");
    let flood = TcpStream::connect(server.local_addr()).expect("a connection");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let requests = "GET /flood HTTP/1.1\r\nHost: h\r\n\r\n".repeat(1000);
            while !over.load(Ordering::Acquire) {
                if (&flood).write_all(requests.as_bytes()).is_err() {
                    break;
                }
            }
        });
        scope.spawn(|| {
            let mut answers = [0; 65536];
            while (&flood).read(&mut answers).is_ok_and(|read| read > 0) {}
        });
        while server.counters().requests.load(Ordering::Relaxed) < 5_000 {
            std::thread::yield_now();
        }
        // How many requests of the flood went before each of a few others.
        let mut before: Vec<Option<u64>> = (0..9)
            .map(|_| {
                let earlier = server.counters().requests.load(Ordering::Relaxed);
                let mut stream = TcpStream::connect(server.local_addr()).ok()?;
                stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
                stream
                    .write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
                    .ok()?;
                stream.read_exact(&mut [0; 12]).ok()?;
                Some(server.counters().requests.load(Ordering::Relaxed) - earlier)
            })
            .collect();
        over.store(true, Ordering::Release);
        let _ = flood.shutdown(std::net::Shutdown::Both);
        assert!(before.iter().all(Option::is_some), "{before:?}");
        // The middle one, because this thread may itself have had to wait for a core.
        before.sort_unstable();
        assert!(before[4] < Some(2_500), "{before:?}");
    });
}
