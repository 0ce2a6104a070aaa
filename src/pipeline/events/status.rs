//! What the feeders say about themselves, for `readyz`, metrics and operators. Reading it costs no I/O.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::order::UnixMillis;

/// A failure is a warning once it has lasted for so long.
const FAILING: Duration = Duration::from_secs(60);

/// The state of one sink.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SinkStatus {
    /// When the newest change that it has got was committed.
    pub place_at: Option<UnixMillis>,
    /// Whether it has taken an event since the start.
    pub has_delivered: bool,
    /// Bytes of WAL that PostgreSQL keeps for it.
    pub kept_bytes: u64,
    /// Age in milliseconds of the oldest event that is read and not delivered.
    pub behind_ms: u64,
    /// Events that wait one by one, because the sink took others.
    pub waiting: u64,
    /// Events that it never took.
    pub dead_letters: u64,
    /// Why nothing is delivered just now, and since when.
    pub failure: Option<(String, Instant)>,
    /// Why nothing is delivered any more, until an operator asks for a resync.
    pub disabled: Option<String>,
    /// Whether its slot is gone or was, and the rows are read instead.
    pub is_refilling: bool,
    /// Whether another process reads its slot.
    pub is_elsewhere: bool,
    /// Whether there is a slot: events begin with it.
    pub is_listening: bool,
}

/// The status of one sink, shared with its feeder.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The sink's name.
    pub name: String,
    /// Its kind and address.
    pub title: String,
    status: Arc<Mutex<SinkStatus>>,
}

impl Shared {
    /// The status of a sink that has done nothing yet.
    pub fn new(name: String, title: String) -> Self {
        Shared {
            name,
            title,
            status: Arc::default(),
        }
    }

    /// The status as it is.
    pub fn get(&self) -> SinkStatus {
        self.status.lock().clone()
    }

    /// Changes it.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut SinkStatus) -> T) -> T {
        change(&mut self.status.lock())
    }

    /// Notes that deliveries fail. Returns since when.
    pub(super) fn fail(&self, reason: String) -> Instant {
        self.change(|status| {
            let since = status
                .failure
                .take()
                .map_or_else(Instant::now, |(_, since)| since);
            status.failure = Some((reason, since));
            since
        })
    }
}

/// The sinks of this process.
#[derive(Clone, Debug, Default)]
pub struct Sinks(pub Arc<[Shared]>);

impl Sinks {
    /// Warnings for `readyz`, as name and detail.
    pub fn warnings(&self) -> Vec<(&'static str, String)> {
        let mut warnings = Vec::new();
        for sink in self.0.iter() {
            let (name, status) = (&sink.name, sink.get());
            if let Some(reason) = &status.disabled {
                let detail = format!(
                    "the sink {name} gets no events: {reason}. Once it wants them again: POST /admin/v1/events/{name}/resync"
                );
                warnings.push(("events_disabled", detail));
                continue;
            }
            if status.is_refilling {
                let detail = format!(
                    "the sink {name} is refilled from the rows, because its slot was gone or somebody asked for it: of an \
                     order that changed several times it hears the newest change alone"
                );
                warnings.push(("events_refilled", detail));
            }
            if let Some((reason, since)) = &status.failure
                && since.elapsed() >= FAILING
            {
                let seconds = since.elapsed().as_secs();
                let detail =
                    format!("the sink {name} has taken no event for {seconds} s: {reason}");
                warnings.push(("events_failing", detail));
            }
        }
        warnings
    }
}
