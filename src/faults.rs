//! Deliberate faults, for the programs that prove the promises. Compiled into test builds only
//! (`--features faults`, which `cargo test` enables); in other builds each call does nothing.
//!
//! `MILLRACE_FAULT` names one fault:
//!
//! * `crash@POINT` or `crash@POINT:N` ends the process with SIGKILL when it passes the point for
//!   the first or the N-th time;
//! * `bug@NAME` enables a defect, to show that a check catches it;
//! * `end@NAME` and `panic@NAME` end a task, thread or coroutine that should never end;
//! * `clock@MS` shifts the wall clock that this process sees by so many milliseconds; negative is
//!   behind.

/// Environment variable that names a fault; `None` if this build has no faults.
pub const VARIABLE: Option<&str> = if cfg!(feature = "faults") {
    Some("MILLRACE_FAULT")
} else {
    None
};

/// Every point at which a process can be made to crash, along the way of an order.
pub const CRASH_POINTS: [&str; 24] = [
    "journal.segment_created",
    "journal.segment_renamed",
    "journal.before_write",
    "journal.after_write",
    "journal.after_sync",
    "journal.acknowledged",
    "journal.read_back",
    "journal.before_retire",
    "journal.after_retire",
    "log.before_send",
    "log.after_send",
    "log.marked",
    "worker.claimed",
    "worker.before_commit",
    "worker.committed",
    "settlement.before_commit",
    "settlement.committed",
    "waitlist.selected",
    "waitlist.assigned",
    "draw.fixed",
    "draw.ranked",
    "draw.drawn",
    "recovery.replayed_part",
    "recovery.replayed",
];

/// Every defect that can be enabled.
pub const BUGS: [&str; 33] = [
    "acknowledge_before_broker",
    "unknown_is_success",
    "no_fence",
    "read_stale_epoch",
    "ack_before_sync",
    "no_sync",
    "reuse_failed_file",
    "lost_wake_up",
    "no_directory_sync",
    "retire_before_commit",
    "skip_a_replay",
    "replay_without_looking",
    "trust_any_sector",
    "cut_at_damage",
    "double_release",
    "guess_the_commit",
    "hold_without_checking",
    "answer_before_commit",
    "keep_expired_units",
    "recover_without_holding",
    "pay_after_the_deadline",
    "expire_what_is_paid",
    "ready_without_progress",
    "pause_when_stored",
    "sell_what_is_parked",
    "forget_a_retry",
    "refund_again",
    "forget_what_falls_due_while_loading",
    "two_entries_of_a_user",
    "assign_before_the_draw",
    "rank_by_arrival",
    "stop_at_who_does_not_fit",
    "forget_the_place",
];

/// Everything that runs under supervision as long as the process does.
pub const SUPERVISED: [&str; 29] = [
    "a worker",
    "the wait for the workers",
    "the deadline task",
    "the leases",
    "the database health check",
    "the watch for lost commits",
    "the place of the order log",
    "the retention of the order log",
    "callbacks",
    "the payment processor",
    "expiry",
    "the assignment of units",
    "the draws",
    "the retry of parked orders",
    "the deletion of old rows",
    "the storage of pauses",
    "the count of dead letters",
    "the settlement of cancellations",
    "the eviction of old orders",
    "the delivery of events",
    "the supervision of the embedded PostgreSQL",
    "the control plane",
    "a dispatcher",
    "http-acceptor",
    "http-reaper",
    "minihttp",
    "log-spans",
    "log-reader",
    "log-append",
];

/// The same, in a process that is one node of several. `tests/program/supervision.rs` leaves them out.
pub const SUPERVISED_IN_CLUSTER: [&str; 8] = [
    "the link to a node",
    "the server of other nodes",
    "the renewal of the membership",
    "the lanes of this node",
    "the takeovers of dead nodes",
    "the lending of stock",
    "the terms set at other nodes",
    "the waiting lists of all nodes",
];

/// How a supervised task is made to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It returns.
    End,
    /// It panics.
    Panic,
}

/// The end chosen for this supervised task, if any.
#[inline]
pub fn fate(name: &'static str) -> Option<Fate> {
    #[cfg(feature = "faults")]
    return chosen::fate(name);
    #[cfg(not(feature = "faults"))]
    {
        let _ = name;
        None
    }
}

/// Ends the process with SIGKILL if this point is the chosen one.
#[inline]
pub fn crash_point(name: &'static str) {
    #[cfg(feature = "faults")]
    chosen::crash_point(name);
    #[cfg(not(feature = "faults"))]
    let _ = name;
}

/// Whether this defect is enabled.
#[inline]
pub fn bug(name: &'static str) -> bool {
    #[cfg(feature = "faults")]
    if let Some(surroundings) = crate::simulated::surroundings() {
        return surroundings.has_bug(name);
    }
    #[cfg(feature = "faults")]
    return chosen::bug(name);
    #[cfg(not(feature = "faults"))]
    {
        let _ = name;
        false
    }
}

/// Shift of the wall clock that this process sees, in milliseconds.
#[inline]
pub fn clock_off_ms() -> i64 {
    #[cfg(feature = "faults")]
    return chosen::clock_off_ms();
    #[cfg(not(feature = "faults"))]
    0
}

#[cfg(feature = "faults")]
mod chosen {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    enum Fault {
        None,
        Crash { point: String, left: AtomicU64 },
        Bug(String),
        Ended { name: String, how: super::Fate },
        ClockOff(i64),
    }

    static FAULT: LazyLock<Fault> = LazyLock::new(|| {
        let text = std::env::var("MILLRACE_FAULT").unwrap_or_default();
        if let Some(name) = text.strip_prefix("bug@") {
            assert!(super::BUGS.contains(&name), "MILLRACE_FAULT: no bug {name}");
            return Fault::Bug(name.to_owned());
        }
        for (prefix, how) in [("end@", super::Fate::End), ("panic@", super::Fate::Panic)] {
            if let Some(name) = text.strip_prefix(prefix) {
                let known = super::SUPERVISED.contains(&name);
                assert!(known, "MILLRACE_FAULT: nothing is called {name}");
                let name = name.to_owned();
                return Fault::Ended { name, how };
            }
        }
        if let Some(ms) = text.strip_prefix("clock@") {
            return Fault::ClockOff(ms.parse().expect("MILLRACE_FAULT: milliseconds"));
        }
        let Some(point) = text.strip_prefix("crash@") else {
            assert!(
                text.is_empty(),
                "MILLRACE_FAULT: {text:?} is no crash@, bug@, end@, panic@ or clock@"
            );
            return Fault::None;
        };
        let (point, count) = point.split_once(':').unwrap_or((point, "1"));
        assert!(
            super::CRASH_POINTS.contains(&point),
            "MILLRACE_FAULT: no point {point}"
        );
        Fault::Crash {
            point: point.to_owned(),
            left: AtomicU64::new(count.parse().expect("MILLRACE_FAULT: a count")),
        }
    });

    pub fn crash_point(name: &'static str) {
        debug_assert!(super::CRASH_POINTS.contains(&name), "{name} is not listed");
        if let Fault::Crash { point, left } = &*FAULT
            && point == name
            && left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
            // The signal may take a moment to arrive; nothing may happen meanwhile.
            loop {
                std::thread::park();
            }
        }
    }

    pub fn fate(name: &'static str) -> Option<super::Fate> {
        // A unit test may supervise other names.
        let is_listed =
            super::SUPERVISED.contains(&name) || super::SUPERVISED_IN_CLUSTER.contains(&name);
        debug_assert!(cfg!(test) || is_listed, "{name} is not listed");
        match &*FAULT {
            Fault::Ended { name: chosen, how } if chosen == name => Some(*how),
            _ => None,
        }
    }

    pub fn clock_off_ms() -> i64 {
        match *FAULT {
            Fault::ClockOff(ms) => ms,
            Fault::None | Fault::Crash { .. } | Fault::Bug(_) | Fault::Ended { .. } => 0,
        }
    }

    pub fn bug(name: &'static str) -> bool {
        debug_assert!(super::BUGS.contains(&name), "{name} is not listed");
        matches!(&*FAULT, Fault::Bug(chosen) if chosen == name)
    }
}
