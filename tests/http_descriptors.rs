//! A server that runs out of descriptors. Alone in its process, whose limit it lowers.

#![cfg(unix)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::hardened;
use millrace::http::server::limits::Limits;
use rustix::process::{Resource, getrlimit, setrlimit};

const PATIENCE: Duration = Duration::from_secs(20);

struct Empty;

impl Service for Empty {
    fn call(&self, _: &Request<'_>, _: &mut Response) {}
}

#[test]
fn a_server_out_of_descriptors_waits_without_spinning_and_recovers() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let server = hardened::serve(listener, Arc::new(Empty), Limits::default()).expect("a server");
    let address = server.local_addr();
    let answered = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer.starts_with("HTTP/1.1 200"))
    };
    assert!(answered().expect("an answer"));

    let mut limit = getrlimit(Resource::Nofile);
    let in_use = std::fs::read_dir("/proc/self/fd").map_or(64, Iterator::count);
    limit.current = Some(in_use as u64 + 100);
    setrlimit(Resource::Nofile, limit).expect("a lower limit");

    // Every client takes a descriptor here and one in the server, which gives some back by evicting
    // idle connections: so go on until it has to say that it could not accept one.
    let mut clients = Vec::new();
    let started = Instant::now();
    let errors = || server.counters().accept_errors.load(Ordering::Relaxed);
    while errors() == 0 {
        assert!(started.elapsed() < PATIENCE, "the server never ran out");
        clients.extend(TcpStream::connect(address));
    }
    // The back-off starts at 5 ms and doubles: a spinning server would count thousands.
    let (before, since) = (errors(), Instant::now());
    std::thread::sleep(Duration::from_millis(200));
    let spun = errors() - before;
    assert!(
        spun <= 1 + since.elapsed().as_millis() as u64 / 5,
        "{spun} errors"
    );

    clients.clear();
    while !answered().unwrap_or(false) {
        assert!(started.elapsed() < PATIENCE, "the server did not recover");
    }
}
