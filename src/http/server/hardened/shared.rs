//! The state that the threads and coroutines of one server share.

use std::sync::atomic::AtomicBool;

use super::budget::BodyBudget;
use super::clock::Clock;
use super::counters::Counters;
use super::registry::Registry;
use crate::http::server::limits::Limits;

/// The shared state of one server.
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) clock: Clock,
    pub(super) counters: Counters,
    pub(super) registry: Registry,
    pub(super) bodies: BodyBudget,
    /// The acceptor takes the connections that the kernel has queued, then no more.
    pub(super) stopping: AtomicBool,
    /// Every answer is the last of its connection.
    pub(super) draining: AtomicBool,
    /// The [`Server`](super::Server) was dropped.
    pub(super) closed: AtomicBool,
}

impl Shared {
    /// The state of a server that has just started.
    pub(super) fn new(limits: Limits) -> Self {
        Shared {
            bodies: BodyBudget::new(limits.body_bytes_total_max),
            limits,
            clock: Clock::start(),
            counters: Counters::default(),
            registry: Registry::default(),
            stopping: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }
}
