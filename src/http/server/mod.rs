//! An HTTP/1.1 server on coroutines. It knows no route: it serves any [`Service`].
//!
//! ```text
//!   sockets ─► engine (hardened or minihttp) ─► Service ──► wake::wait ─► parked
//!                                                  │                        ▲
//!                                                  └─► tokio_bridge ────────┤
//!                                       workers ─► dispatcher ──────────────┘
//! ```
//!
//! | module | content |
//! |---|---|
//! | [`hardened`] | the default engine |
//! | [`minihttp`] | stock `may_minihttp`, for benchmarks |
//! | [`limits`] | the bounds of a server, and body limits by target |
//! | [`runtime`] | the configuration of the `may` runtime |
//! | [`wake`] | parking a coroutine, and a [`std::task::Waker`] for it |
//! | [`dispatcher`] | waking many parked coroutines from a foreign thread |
//! | [`tokio_bridge`] | running a future on tokio while the coroutine is parked |

pub mod dispatcher;
pub mod hardened;
pub mod limits;
pub mod minihttp;
pub mod runtime;
pub mod tokio_bridge;
pub mod wake;

use crate::http::message::{Request, Response};
use crate::http::problem::Problem;

/// The function from a request to a response that every engine mounts.
pub trait Service: Send + Sync + 'static {
    /// Admits or refuses a request by its head, before any of its body is read; `head.body` is
    /// empty. Must not park.
    ///
    /// A refusal is answered with its problem, and [`Service::call`] is not called. A body that was
    /// announced stays unread, so the connection ends.
    ///
    /// # Errors
    /// The problem that the client receives.
    fn authorize(&self, head: &Request<'_>) -> Result<(), Problem> {
        let _ = head;
        Ok(())
    }

    /// Answers `request`, which was authorized, into `response`, which is clear (status 200, empty)
    /// on entry.
    ///
    /// Runs on a coroutine with a stack of 256 KiB: no guard, thread-local borrow or blocking
    /// call may be held across the point where it parks.
    fn call(&self, request: &Request<'_>, response: &mut Response);
}
