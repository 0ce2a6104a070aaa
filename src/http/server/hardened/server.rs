//! The handle to a running server.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::conn_state::Phase;
use super::counters::{CloseReason, Counters};
use super::reaper::TICK;
use super::shared::Shared;
use super::{acceptor, reaper};
use crate::http::server::limits::Limits;
use crate::http::server::{Service, runtime};
use crate::supervise::Supervisor;

/// As [`serve_supervised`], without supervision: an unexpected end is not reported.
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
/// The listener is used as it is. The caller binds it, without silent port sharing.
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
    // If the caller has not configured it: a default stack would overflow.
    runtime::configure(0);
    let local_addr = listener.local_addr()?;
    let shared = Arc::new(Shared::new(limits));
    // Made first, so that an error below ends the reaper.
    let server = Server {
        local_addr,
        acceptor: Mutex::new(None),
        shared: shared.clone(),
    };
    reaper::start(shared.clone(), supervisor)?;
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

    /// Takes the connections that the kernel has queued, then closes the listener. Blocks for a
    /// moment.
    pub fn stop_accepting(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(acceptor) = self.acceptor.lock().take() {
            // A panic there has been reported by the panic hook, and it has stopped either way.
            let _ = acceptor.join();
        }
    }

    /// Stops accepting, answers requests in flight with `Connection: close`, closes idle
    /// connections, and closes the others at the deadline. Blocks the calling thread.
    ///
    /// Returns how many connections the deadline cut off. A request that is still inside the
    /// service then goes on without a client to answer.
    pub fn drain(&self, deadline: Duration) -> u64 {
        let ends = Instant::now() + deadline;
        self.shared.draining.store(true, Ordering::Release);
        self.stop_accepting();
        while self.open() > 0 && Instant::now() < ends {
            // Repeated, because a connection that was being served when the drain began may have
            // fallen idle just before it could know.
            self.close_idle();
            thread::sleep(Duration::from_millis(5));
        }
        let mut cut = 0;
        self.shared.registry.close_where(|_, state| {
            (state.phase() != Phase::Closed).then(|| {
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
        self.shared.registry.close_where(|_, state| {
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
