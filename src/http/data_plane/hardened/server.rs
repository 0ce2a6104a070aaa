//! The handle to a running server.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::budget::BodyBudget;
use super::clock::Clock;
use super::counters::{CloseReason, Counters};
use super::janitor::TICK;
use super::peer::Phase;
use super::registry::Registry;
use super::{Limits, Service, Shared, acceptor, janitor};
use crate::http::data_plane::runtime;
use crate::supervise::Supervisor;

/// As [`serve_supervised`], with nobody who hears where it ends by itself.
///
/// # Errors
///
/// As there.
pub fn serve<S: Service>(
    listener: TcpListener,
    service: Arc<S>,
    limits: Limits,
) -> io::Result<Server> {
    serve_supervised(listener, service, limits, &Supervisor::default())
}

/// Serves `service` on `listener` until the returned server is dropped or drained.
///
/// The listener is taken as it is: binding it, without silent port sharing, is the caller's.
///
/// # Errors
///
/// When the listener cannot be set up or a thread cannot be started.
pub fn serve_supervised<S: Service>(
    listener: TcpListener,
    service: Arc<S>,
    limits: Limits,
    supervisor: &Supervisor,
) -> io::Result<Server> {
    // In case nobody did: a default stack would overflow.
    runtime::configure(0);
    let local_addr = listener.local_addr()?;
    let shared = Arc::new(Shared {
        bodies: BodyBudget::new(limits.body_bytes_total_max),
        limits,
        clock: Clock::start(),
        counters: Counters::default(),
        registry: Registry::default(),
        stopping: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        closed: AtomicBool::new(false),
    });
    // Made first, so that an error below ends the janitor.
    let server = Server {
        local_addr,
        acceptor: Mutex::new(None),
        shared: shared.clone(),
    };
    janitor::start(shared.clone(), supervisor)?;
    let acceptor = acceptor::start(listener, service, shared, supervisor)?;
    *server.acceptor.lock() = Some(acceptor);
    Ok(server)
}

/// A running server. Dropping it closes every connection at once; [`Server::drain`] is kinder.
pub struct Server {
    local_addr: SocketAddr,
    acceptor: Mutex<Option<JoinHandle<()>>>,
    shared: Arc<Shared>,
}

impl Server {
    /// The address that it listens on, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The live counters.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Takes what the kernel has queued, then closes the listener. Blocks for a moment.
    pub fn stop_accepting(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(acceptor) = self.acceptor.lock().take() {
            // A panic there has been reported by the panic hook, and it has stopped either way.
            let _ = acceptor.join();
        }
    }

    /// Stops accepting, answers what is in flight with `Connection: close`, closes idle
    /// connections, and at the deadline closes what is left. Blocks the calling thread.
    ///
    /// Returns how many connections the deadline cut off. A request that is still inside the
    /// service then goes on, without anybody to answer.
    pub fn drain(&self, deadline: Duration) -> u64 {
        let ends = Instant::now() + deadline;
        self.shared.draining.store(true, Ordering::Release);
        self.stop_accepting();
        while self.open() > 0 && Instant::now() < ends {
            // Again and again, because a connection that was being served when the drain began may
            // have fallen idle just before it could know.
            self.close_idle();
            thread::sleep(Duration::from_millis(5));
        }
        let mut cut = 0;
        self.shared.registry.doom_where(|_, state| {
            (state.phase() != Phase::Doomed).then(|| {
                cut += 1;
                CloseReason::Drained
            })
        });
        cut
    }

    fn open(&self) -> u64 {
        self.shared.counters.open.load(Ordering::Acquire)
    }

    fn close_idle(&self) {
        let now_ms = self.shared.clock.now_ms();
        // One that has been idle for less than a tick may have a request on its way in.
        let tick_ms = u64::try_from(TICK.as_millis()).unwrap_or(u64::MAX);
        self.shared.registry.doom_where(|_, state| {
            let idle = state.phase() == Phase::Idle;
            (idle && now_ms.saturating_sub(state.since_ms()) > tick_ms)
                .then_some(CloseReason::Drained)
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.drain(Duration::ZERO);
        self.shared.closed.store(true, Ordering::Release);
    }
}
