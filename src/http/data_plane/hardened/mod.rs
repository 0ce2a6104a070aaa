//! The default engine: HTTP/1.1 on coroutines, safe to face clients that are slow, broken or
//! hostile.
//!
//! ```text
//!   listener ─► acceptor (thread) ─► connection (coroutine each) ─► Service
//!                   │ makes room           │ phase, by one word
//!                   ▼                      ▼
//!                registry of peers ◄── janitor (thread): clock, deadlines, release
//! ```
//!
//! What holds, whatever the bytes:
//!
//! - The service runs only for a request whose head and body are complete and framed beyond doubt
//!   ([`framing`]); no byte of one request is ever read as part of another.
//! - Before a body is read, its head is judged ([`Service::authorize`]) and its bytes are reserved
//!   from what all connections share ([`Limits::body_bytes_total_max`]).
//! - Answers leave in the order of their requests. What was answered is written as soon as no
//!   further complete request is at hand, or when the next one parks, whichever comes first: an
//!   answer never waits behind another request's wait, and a pipeline of quick ones shares a write.
//! - StickyRefusals of the engine (`4xx`, `5xx` of framing) come after the answers that are due, and end
//!   the connection. The rest of its input is thrown away for a bounded time, not served.
//! - A request has [`Limits::request_timeout`] from its first byte to its last, or is answered
//!   `408`; the client as long to take an answer; a connection [`Limits::idle_timeout`] between
//!   requests. The last two end in a close without a word, and none of them cuts a request that is
//!   inside the service.
//! - Memory for a connection grows with the bytes that came, up to the limits, and shrinks when it
//!   falls idle. Connections and descriptors are bounded.

mod acceptor;
mod answer;
mod budget;
mod clock;
mod connection;
mod counters;
pub mod framing;
mod janitor;
mod peer;
mod registry;
pub mod rehearsal;
mod server;
mod wire;

use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::message::{Request, Response, Service};
use budget::BodyBudget;
use clock::Clock;
pub use counters::{CloseReason, Counters};
use registry::Registry;
pub use server::{Server, serve, serve_supervised};

/// What a server puts up with.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time. When it is reached, the oldest one with an incomplete request, or
    /// else the longest idle one, makes room; when all are being served, a new one gets `503`.
    pub connections_max: usize,
    /// Bytes of a request line and its header fields; beyond, `431`.
    pub head_bytes_max: usize,
    /// Bytes of a request body; beyond, `413`.
    pub body_bytes_max: usize,
    /// Bytes of the body of a request to [`framing::BATCH_PATH`]; beyond, `413`.
    pub batch_body_bytes_max: usize,
    /// Bytes of bodies over all connections, a quarter of them for callbacks; beyond, `503`. What
    /// fits the least buffer of a connection is not counted.
    pub body_bytes_total_max: usize,
    /// From the first byte of a request to its last, and for the client to take an answer.
    pub request_timeout: Duration,
    /// Between requests.
    pub idle_timeout: Duration,
}

impl Default for Limits {
    /// The defaults of the configuration reference.
    fn default() -> Self {
        Self {
            connections_max: 20_000,
            head_bytes_max: 16 * 1024,
            body_bytes_max: 16 * 1024,
            batch_body_bytes_max: 2 * 1024 * 1024,
            body_bytes_total_max: 256 * 1024 * 1024,
            request_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
        }
    }
}

impl Limits {
    fn sizes(&self) -> framing::Sizes {
        framing::Sizes {
            head_bytes_max: self.head_bytes_max,
            body_bytes_max: self.body_bytes_max,
            batch_body_bytes_max: self.batch_body_bytes_max,
        }
    }
}

/// What the threads and coroutines of one server share.
struct Shared {
    limits: Limits,
    clock: Clock,
    counters: Counters,
    registry: Registry,
    bodies: BodyBudget,
    // Accept what the kernel has queued, then no more.
    stopping: AtomicBool,
    // Every answer is the last of its connection.
    draining: AtomicBool,
    // Nobody holds the server any more.
    closed: AtomicBool,
}
