//! The counters of the engine, as plain atomics for the metrics to export.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CloseReason {
    /// The client closed or went away.
    PeerClosed,
    /// A request or its version asked for the end, or the answer to it announced one.
    Finished,
    /// Bytes that cannot be served as a request.
    Refused,
    /// A request did not complete within its time.
    RequestTimeout,
    /// No request came for too long.
    IdleTimeout,
    /// The client did not read its answer in time.
    UnreadReply,
    /// Made room for a new connection.
    Evicted,
    /// Closed by the drain: idle, or left at its deadline.
    Drained,
    /// The socket failed.
    IoError,
    /// The service or the engine panicked.
    Panicked,
    /// The last bytes of a connection that we closed took too long; counted by its own reason.
    Lingered,
}

impl CloseReason {
    /// Every reason that is counted, in the order of the counters.
    pub const ALL: [Self; 10] = [
        Self::PeerClosed,
        Self::Finished,
        Self::Refused,
        Self::RequestTimeout,
        Self::IdleTimeout,
        Self::UnreadReply,
        Self::Evicted,
        Self::Drained,
        Self::IoError,
        Self::Panicked,
    ];

    /// The name of the reason, as a metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::PeerClosed => "peer_closed",
            Self::Finished => "finished",
            Self::Refused => "refused",
            Self::RequestTimeout => "request_timeout",
            Self::IdleTimeout => "idle_timeout",
            Self::UnreadReply => "unread_reply",
            Self::Evicted => "evicted",
            Self::Drained => "drained",
            Self::IoError => "io_error",
            Self::Panicked => "panicked",
            Self::Lingered => "lingered",
        }
    }
}

/// The counters of one server.
#[derive(Default)]
pub struct Counters {
    /// Connections whose coroutine runs, now.
    pub open: AtomicU64,
    /// Connections taken from the listener, ever, refused ones included.
    pub accepted: AtomicU64,
    /// Connections answered `503` because the server was full.
    pub refused: AtomicU64,
    /// Failures to take a connection from the listener, such as no descriptors left.
    pub accept_errors: AtomicU64,
    /// Requests that reached the service.
    pub requests: AtomicU64,
    /// Panics of the service, each answered `500`.
    pub panics: AtomicU64,
    closed: [AtomicU64; CloseReason::ALL.len()],
}

impl Counters {
    /// Connections that ended for `reason`, ever.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed
            .get(reason as usize)
            .map_or(0, |count| count.load(Ordering::Relaxed))
    }

    pub(super) fn count_closed(&self, reason: CloseReason) {
        if let Some(count) = self.closed.get(reason as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counted_reason_has_its_own_counter() {
        let counters = Counters::default();
        for (at, reason) in CloseReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, at);
            counters.count_closed(reason);
            assert_eq!(counters.closed(reason), 1, "{}", reason.label());
        }
    }

    #[test]
    fn every_reason_is_a_value_of_the_metric() {
        let metrics = crate::metrics::Metrics::new().unwrap();
        let known = metrics.connections_cut.totals();
        for reason in CloseReason::ALL {
            assert!(known.contains_key(reason.label()), "{reason:?}");
        }
    }
}
