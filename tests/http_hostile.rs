//! A crowd of hostile clients: requests that trickle in by the byte, and pipelines whose answers
//! nobody reads. Memory, the time until they are gone, and what good clients notice meanwhile.
//!
//! By default a few hundred of them, and only what does not depend on the machine is asserted. The
//! real figures, asserted as well, with a server built for release:
//!
//! ```text
//! cargo build --release --features lab && ulimit -n 20000 &&
//! MILLRACE_SLOW=10000 MILLRACE_SLOW_SERVER=target/release/lab \
//!     cargo test --test http_hostile -- --nocapture
//! ```

#![cfg(target_os = "linux")]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::engine::{Child, child};

mod support {
    #![allow(dead_code, reason = "shared by several tests, each uses a part")]
    pub mod engine;
}

/// Clients that never read; each has a pipeline of requests under way.
const DEAF: usize = 16;

/// Memory that all of them together may cost.
const GROWTH_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// How long after their deadline the last of them may be there.
const GONE_AFTER: Duration = Duration::from_secs(15);

#[test]
fn engine_process() {
    child();
}

/// One good client: a request now and then on a connection of its own, as long as `while_true`.
fn good_client(address: SocketAddr, while_true: &AtomicBool) -> Vec<Duration> {
    let mut stream = TcpStream::connect(address).expect("a good client gets in");
    stream.set_nodelay(true).expect("no delay");
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a timeout");
    let mut times = Vec::new();
    let mut answer = [0; 1024];
    while while_true.load(Ordering::Acquire) {
        let started = Instant::now();
        stream
            .write_all(b"GET /good HTTP/1.1\r\nHost: h\r\n\r\n")
            .expect("a good client may write");
        let count = stream.read(&mut answer).expect("a good client is answered");
        times.push(started.elapsed());
        assert!(answer[..count].starts_with(b"HTTP/1.1 200 "));
        std::thread::sleep(Duration::from_millis(2));
    }
    times
}

/// What good clients saw while `meanwhile` ran: the median and the 99th percentile.
fn good_traffic(address: SocketAddr, meanwhile: impl FnOnce()) -> (Duration, Duration) {
    let running = AtomicBool::new(true);
    let mut times: Vec<Duration> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| good_client(address, &running)))
            .collect();
        meanwhile();
        running.store(false, Ordering::Release);
        clients
            .into_iter()
            .flat_map(|client| client.join().expect("a good client"))
            .collect()
    });
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

/// Connections whose end shows up when they are next looked at.
struct Crowd {
    slow: VecDeque<TcpStream>,
    deaf: Vec<TcpStream>,
    pipeline: Vec<u8>,
}

impl Crowd {
    fn connect(address: SocketAddr, slow: usize) -> Self {
        let connect = || {
            let stream = TcpStream::connect(address).expect("a descriptor: see `ulimit -n`");
            stream.set_nonblocking(true).expect("non-blocking");
            stream
        };
        let mut crowd = Self {
            slow: VecDeque::new(),
            deaf: (0..DEAF).map(|_| connect()).collect(),
            pipeline: "GET /deaf HTTP/1.1\r\nHost: h\r\n\r\n".repeat(4_000).into(),
        };
        // Half of them in the head, half in the body.
        for at in 0..slow {
            let mut stream = connect();
            let body = if at % 2 == 0 {
                ""
            } else {
                "Content-Length: 900\r\n\r\n"
            };
            let begun = format!("POST /slow HTTP/1.1\r\nHost: h\r\nX: y\r\n{body}");
            stream.write_all(begun.as_bytes()).expect("sent");
            crowd.slow.push_back(stream);
        }
        crowd
    }

    /// The next `count` of the slow and all who are deaf send a little; who was cut is dropped.
    fn stir(&mut self, count: usize) {
        let gone = |result: std::io::Result<usize>| match result {
            Ok(_) => false,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        };
        let ended = |stream: &mut TcpStream| match stream.read(&mut [0; 512]) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() != ErrorKind::WouldBlock,
        };
        for _ in 0..count.min(self.slow.len()) {
            let Some(mut stream) = self.slow.pop_front() else {
                break;
            };
            if !gone(stream.write(b"x")) && !ended(&mut stream) {
                self.slow.push_back(stream);
            }
        }
        let pipeline = &self.pipeline;
        // They would not even see an end: the reset of what they write tells.
        self.deaf.retain_mut(|stream| !gone(stream.write(pipeline)));
    }

    fn len(&self) -> usize {
        self.slow.len() + self.deaf.len()
    }
}

#[test]
fn a_hostile_crowd_costs_little_memory_is_gone_in_time_and_others_do_not_notice() {
    let wanted = std::env::var("MILLRACE_SLOW").ok();
    let strict = wanted.is_some();
    let slow: usize = wanted.map_or(300, |text| text.parse().expect("MILLRACE_SLOW is a number"));
    let (server, deadline) = match std::env::var("MILLRACE_SLOW_SERVER") {
        // Of the configuration's defaults.
        Ok(program) => (Child::start_program(&program), Duration::from_secs(10)),
        Err(_) => {
            let deadline = Duration::from_millis(if strict { 10_000 } else { 1_500 });
            let server = Child::start("engine_process", "hardened", deadline, None);
            (server, deadline)
        }
    };
    let quiet_time = if strict {
        Duration::from_secs(8)
    } else {
        Duration::from_millis(500)
    };
    let rounds = if strict { 3 } else { 1 };
    let mut ratios = Vec::new();
    for round in 1..=rounds {
        let quiet = good_traffic(server.address, || std::thread::sleep(quiet_time));
        let before = server.resident_bytes();
        let coming = Instant::now();
        let mut crowd = Crowd::connect(server.address, slow);
        let (came, took) = (Instant::now(), coming.elapsed());
        let mut most = before;
        let mut last_look = came;
        let loaded = good_traffic(server.address, || {
            // Up to the deadline of those who came first.
            while came.elapsed() < deadline.min(quiet_time) {
                // Spread out, as it would come from many machines: each sends five times. A burst
                // would measure how fast this process can write, and not the server.
                crowd.stir(slow.div_ceil(2_000));
                if last_look.elapsed() > deadline / 50 {
                    last_look = Instant::now();
                    most = most.max(server.resident_bytes());
                }
                std::thread::sleep(deadline / 10_000);
            }
        });
        let there = crowd.len();
        if coming.elapsed() < deadline {
            // The first one's time is not up yet.
            assert_eq!(there, slow + DEAF);
        }
        while crowd.len() > 0 {
            assert!(
                came.elapsed() < deadline + GONE_AFTER,
                "{} are still there",
                crowd.len()
            );
            crowd.stir(usize::MAX);
            most = most.max(server.resident_bytes());
            std::thread::sleep(deadline / 50);
        }
        let gone = came.elapsed();
        let grown = most - before;
        let ratio = loaded.1.as_secs_f64() / quiet.1.as_secs_f64();
        println!(
            "round {round}: {slow} slow and {DEAF} deaf clients, {there} at once after {:.1} s; memory +{} KiB; \
             all gone {:.1} s after they came, with a deadline of {:.1} s; p50 and p99 of good \
             traffic {:?} and {:?}, quiet {:?} and {:?}: p99 {ratio:.2} times",
            took.as_secs_f64(),
            grown / 1024,
            gone.as_secs_f64(),
            deadline.as_secs_f64(),
            loaded.0,
            loaded.1,
            quiet.0,
            quiet.1,
        );
        assert!(grown < GROWTH_BYTES_MAX, "{grown} bytes");
        ratios.push(ratio);
        // No more than that it is alive may depend on how busy this machine is.
        assert!(loaded.0 < Duration::from_secs(5), "{loaded:?}");
    }
    if strict {
        ratios.sort_by(f64::total_cmp);
        let median = ratios[ratios.len() / 2];
        assert!(
            median < 2.0,
            "p99 of good traffic: {ratios:?} times its quiet value"
        );
    }
}
