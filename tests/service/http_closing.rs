//! Connections that are closed right after an answer that had to wait for somebody else.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::task::Waker;

use crate::support::http::try_call;
use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::hardened;
use millrace::http::server::limits::Limits;
use millrace::http::server::wake;

/// Connections in all.
const CONNECTIONS: usize = 12_000;

/// Parks each request until another thread, which is busy waiting for it, has woken it.
struct Parks {
    wakers: parking_lot::Mutex<Sender<(Waker, Arc<AtomicBool>)>>,
}

impl Service for Parks {
    fn call(&self, request: &Request<'_>, _: &mut Response) {
        let ready = Arc::new(AtomicBool::new(false));
        let sent = (Waker::clone(request.waker), Arc::clone(&ready));
        self.wakers.lock().send(sent).expect("the waking thread");
        wake::wait(request, || ready.load(Ordering::Acquire));
    }
}

/// A wake-up that comes while the coroutine is parking resumes it inside the very call that was to
/// park it, and with its connection it ends there. It must not take a thread of the runtime with it.
#[test]
fn a_connection_that_ends_as_it_is_woken_takes_no_thread_with_it() {
    let (wakers, to_wake) = channel::<(Waker, Arc<AtomicBool>)>();
    std::thread::spawn(move || {
        let turn = AtomicU32::new(0);
        loop {
            match to_wake.try_recv() {
                Ok((waker, ready)) => {
                    // Each a little later than the one before, so that some hit the moment.
                    for _ in 0..turn.fetch_add(1, Ordering::Relaxed) % 400 {
                        std::hint::spin_loop();
                    }
                    ready.store(true, Ordering::Release);
                    waker.wake();
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => std::hint::spin_loop(),
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
            }
        }
    });
    let service = Arc::new(Parks {
        wakers: parking_lot::Mutex::new(wakers),
    });
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let server = hardened::serve(listener, service, Limits::default()).expect("a server");
    let address = server.local_addr();
    let callers = (0..2).map(|_| {
        std::thread::spawn(move || {
            for number in 0..CONNECTIONS / 2 {
                let answer = try_call(address, "GET", "/", &[], "");
                let answer = answer.unwrap_or_else(|error| panic!("connection {number}: {error}"));
                assert_eq!(answer.status, 200, "{answer:?}");
            }
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        caller.join().expect("answers");
    }
    server.stop_accepting();
}
