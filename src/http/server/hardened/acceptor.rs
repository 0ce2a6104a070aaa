//! The thread that accepts connections.
//!
//! A thread and not a coroutine: a flood of connections would keep a coroutine running and the
//! sockets of its worker unpolled, while a thread is preempted; and it may sleep to back off.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::conn_state::ConnState;
use super::reaper::TICK;
use super::shared::Shared;
use super::{connection, encode};
use crate::backoff::Backoff;
use crate::http::server::Service;
use crate::supervise::Supervisor;

/// Shortest pause after a connection could not be accepted.
const PAUSE: Duration = Duration::from_millis(5);
/// Pauses while none can be accepted.
const ACCEPT_AGAIN: Backoff = Backoff::new(PAUSE, Duration::from_millis(500));

/// Descriptors that may be held beyond the limit by connections that have just ended.
const ENDED_MAX: usize = 1024;

/// Connections that the kernel may queue for us; it lowers this to its own limit. The standard
/// library asks for 128. A crowd fills these before this thread is scheduled once, and every client
/// beyond waits a second before it retries.
const QUEUED_MAX: i32 = 4096;

/// Starts the acceptor; it ends, and closes the listener, once the server is stopping.
pub(super) fn start<S: Service>(
    listener: TcpListener,
    service: Arc<S>,
    shared: Arc<Shared>,
    supervisor: &Supervisor,
) -> io::Result<JoinHandle<()>> {
    listener.set_nonblocking(true)?;
    // Listening again on a socket that listens changes the length of its queue.
    rustix::net::listen(&listener, QUEUED_MAX)?;
    let stopping = Arc::clone(&shared);
    let asked = move || stopping.stopping.load(Ordering::Acquire);
    supervisor.thread("http-acceptor", asked, move || {
        run(&listener, &service, &shared);
    })
}

fn run<S: Service>(listener: &TcpListener, service: &Arc<S>, shared: &Arc<Shared>) {
    let mut backoff = ACCEPT_AGAIN;
    loop {
        // Read before accepting: connections that the kernel has queued before the stop are accepted.
        let stopping = shared.stopping.load(Ordering::Acquire);
        match listener.accept() {
            Ok((socket, _)) => {
                backoff.reset();
                admit(socket, service, shared);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if stopping {
                    return;
                }
                wait_for_connection(listener, TICK);
            }
            // The connection failed, not the listener.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                ) => {}
            // Out of descriptors, Linux says so even when nobody is waiting to be accepted.
            Err(_) if !stopping && !wait_for_connection(listener, TICK) => {}
            Err(error) => {
                shared
                    .counters
                    .accept_errors
                    .fetch_add(1, Ordering::Relaxed);
                let pause = backoff.pause();
                tracing::warn!(%error, ?pause, "cannot accept a connection, waiting");
                if stopping {
                    return;
                }
                // An idle connection gives its descriptor back in a moment.
                shared.registry.make_room(shared.clock.now_ms());
                thread::sleep(pause);
            }
        }
    }
}

/// Waits for a connection. False: none came in time, or a signal cut the wait short.
fn wait_for_connection(listener: &TcpListener, at_most: Duration) -> bool {
    let time = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(at_most.subsec_nanos()),
    };
    poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&time)).is_ok_and(|ready| ready > 0)
}

fn admit<S: Service>(socket: TcpStream, service: &Arc<S>, shared: &Arc<Shared>) {
    shared.counters.accepted.fetch_add(1, Ordering::Relaxed);
    let now_ms = shared.clock.now_ms();
    let full = shared.registry.admitted() >= shared.limits.connections_max;
    if full && !shared.registry.make_room(now_ms) {
        return refuse(socket, shared);
    }
    // Evicted and ended connections hold a descriptor for a tick or two. If they come faster than
    // that, new ones wait in the kernel's queue, so that descriptors stay bounded as well.
    while shared.registry.held() >= shared.limits.connections_max.saturating_add(ENDED_MAX) {
        thread::sleep(PAUSE);
    }
    let fd = socket.as_raw_fd();
    let conn = match ConnState::new(socket, now_ms) {
        Ok(conn) => Arc::new(conn),
        Err(error) => {
            shared
                .counters
                .accept_errors
                .fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%error, "cannot set up a connection");
            return;
        }
    };
    let slot = shared.registry.insert(conn.clone());
    let guard = connection::EndGuard::new(shared.clone(), conn, slot);
    let service = service.clone();
    // The runtime polls a descriptor on the worker of its number; starting there saves a hop.
    let builder = may::coroutine::Builder::new().id(usize::try_from(fd).unwrap_or(0));
    // Without memory for a stack the runtime panics. That ends one connection (through the guard),
    // not the acceptor.
    let spawned = catch_unwind(AssertUnwindSafe(|| {
        may::go!(builder, move || {
            connection::run(guard, &*service);
            // A wake-up that comes while a coroutine parks resumes it inside `Park::subscribe`
            // (may 0.3.51). One that ends there waits, in the destructor of its `Park`, for that very
            // call to return: a thread of the runtime is lost for good. This leaves it first.
            may::coroutine::yield_now();
        })
    }));
    if !matches!(spawned, Ok(Ok(_))) {
        shared
            .counters
            .accept_errors
            .fetch_add(1, Ordering::Relaxed);
        tracing::warn!("cannot start the coroutine of a connection");
    }
}

/// Answers `503` and closes; best effort, because this thread must not wait for a client.
fn refuse(mut socket: TcpStream, shared: &Shared) {
    shared.counters.refused.fetch_add(1, Ordering::Relaxed);
    if socket.set_nonblocking(true).is_ok() {
        // Unread input would turn the close into a reset that may overtake the answer.
        let _ = socket.read(&mut [0; 4096]);
        let _ = socket.write(encode::OVERLOADED);
        let _ = socket.shutdown(Shutdown::Write);
    }
}
