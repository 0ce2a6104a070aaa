//! The link between the nodes of a cluster: a request that came to the wrong node is passed on to the one that
//! owns its lane, and the answer comes back.
//!
//! ```text
//!   handler (coroutine) ─► pool ─► link ─► outbox ══ TLS ══► server ─► feeder ─► coroutine: the router, as owner
//!        ▲ parked                   │                          ▲ outbox ◄───────────────┘
//!        └──────────────────────────┴───── calls by number ◄═══╧═══
//! ```
//!
//! | module | content |
//! |---|---|
//! | [`key`] | `cluster.secret` as a TLS identity: who does not know it gets no byte in |
//! | [`frame`] | the frames, and their bytes |
//! | `greet` | opening a connection: TCP, TLS, a hello from each side |
//! | [`outbox`] | frames that wait to be written, and which of them the connection may have carried |
//! | [`link`] | the connection to one node, and the calls on it |
//! | [`pool`] | a link to each node |
//! | [`server`] | the other end: runs each call on a coroutine |
//! | `runners` | those coroutines, which go on with other calls |
//!
//! # Promises of the link
//!
//! * A call ends in one of the [`Outcome`]s, at its deadline at the latest. [`Outcome::NotRun`] and [`Unsent`] are
//!   certain: the call did not reach a handler and never will. [`Outcome::Uncertain`] and [`Outcome::Late`] say
//!   nothing about that.
//! * A call is never repeated by the link. Whether it may be is known above.
//! * Everything is bounded: calls, queued bytes, bytes of a frame, connections, and the time of each step.
//! * Many calls share one connection: under load one system call carries many of them, which is most of the cost of
//!   passing an order on. That is why this is no HTTP between nodes.
//!
//! # Trust
//!
//! TLS 1.3, both sides authenticated by one Ed25519 key that is derived from `cluster.secret` ([`key`]). TLS gives
//! confidentiality, integrity, and protection against replay of whole connections and of single records; there is no
//! early data and no resumption. A node trusts another one as it trusts itself: the request was authorized where it
//! came in.
//!
//! The version of the protocol is the name that TLS negotiates (ALPN), so that two releases find the newest that
//! both speak, and a stranger's version ends in the handshake.

pub mod frame;
mod greet;
pub mod key;
pub mod link;
pub mod outbox;
pub mod pool;
mod runners;
pub mod server;

use std::time::Duration;

use bytes::Bytes;

pub use self::frame::{Hint, NotRun};

/// The version of the protocol, as ALPN names it.
pub const PROTOCOL: &[u8] = b"millrace-nodes/1";

/// Longest time from the first packet to the end of the handshake.
const OPEN_WITHIN: Duration = Duration::from_secs(2);

/// Interval at which the calling side asks whether the other one is there.
const PING_EVERY: Duration = Duration::from_secs(1);

/// Silence after which a connection counts as dead. Three pings are unanswered by then.
const SILENCE_MAX: Duration = Duration::from_millis(3_500);

/// Interval at which deadlines and silence are checked.
const TICK: Duration = Duration::from_millis(20);

/// Calls on one connection at a time.
pub const CALLS_MAX: usize = 8_192;

/// Bytes of frames on one connection that wait to be written, in each direction.
pub const QUEUED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Bytes of calls on one connection that are being served.
pub const SERVED_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Who a process is to the others of its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The random id of the database that all of them work on.
    pub database: [u8; 16],
    /// Its number.
    pub node: u8,
    /// Its epoch, which rises with each process that takes the number over.
    pub epoch: u64,
    /// The address of its data plane, for clients that send each order to the right node.
    pub data_plane: String,
}

/// The node's answer to a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The fields, each as `Name: value\r\n`.
    pub fields: Bytes,
    /// The body.
    pub body: Bytes,
}

/// Reason why a call was not begun. No byte of it has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsent {
    /// There is no connection.
    #[error("no connection to that node")]
    Away,
    /// The connection carries as many calls, or bytes, as it may.
    #[error("as many requests are on the way to that node as may be")]
    Busy,
    /// It is longer than a frame may be.
    #[error("the request is longer than one that is passed on may be")]
    TooLong,
}

/// The end of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The node has answered.
    Answered(Answer),
    /// The node has received the call and not begun it.
    NotRun(NotRun),
    /// The connection was lost before any byte of the call could have left.
    Unsent,
    /// The connection was lost: the call may or may not have been served.
    Uncertain,
    /// No answer came by the deadline: the call may or may not have been served, or is being served.
    Late,
}
