//! Limits the lines of one kind per window of time; the log counts the rest.
//!
//! A kind is the place in the code that writes the line. The number of kinds is therefore bounded,
//! and no client can choose one.
//!
//! A kind that goes on, window after window, says nothing new and buries the others: after its first window few of its
//! lines are written. Errors are, since each names something for a person to look at.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level};

/// Lines of one kind that are written in a window: its first, or any if they are errors.
pub(super) const LINES_MAX: u32 = 20;
/// Lines of one kind that are written in a window that follows one with such lines.
const GOING_ON_LINES_MAX: u32 = 2;
/// Length of a window.
pub(super) const WINDOW: Duration = Duration::from_secs(10);

/// Lines of one kind that were held back.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HeldBack {
    /// Their level.
    pub(super) level: Level,
    /// Number of lines.
    pub(super) lines: u64,
    /// Seconds since the first of them, rounded up.
    pub(super) seconds: u64,
    /// Message of the first line.
    pub(super) message: String,
}

/// Counts lines by kind.
#[derive(Default)]
pub(super) struct Limit {
    kinds: DashMap<Identifier, Kind>,
    held_back: AtomicU64,
}

struct Kind {
    /// Start of the current window.
    since: Instant,
    /// Lines written in it, and how many may be.
    written: u32,
    lines_max: u32,
    held: Option<Held>,
}

/// Lines held back that are not reported yet.
struct Held {
    since: Instant,
    level: Level,
    lines: u64,
    message: String,
}

impl Limit {
    /// Whether the line may be written.
    pub(super) fn admit(&self, now: Instant, event: &Event<'_>) -> bool {
        let metadata = event.metadata();
        let first = {
            let mut kind = self.kinds.entry(metadata.callsite()).or_insert(Kind {
                since: now,
                written: 0,
                lines_max: LINES_MAX,
                held: None,
            });
            let age = now.duration_since(kind.since);
            if age >= WINDOW {
                let goes_on = age < 2 * WINDOW && *metadata.level() != Level::ERROR;
                kind.lines_max = if goes_on {
                    GOING_ON_LINES_MAX
                } else {
                    LINES_MAX
                };
                (kind.since, kind.written) = (now, 0);
            }
            if kind.written < kind.lines_max {
                kind.written += 1;
                return true;
            }
            match &mut kind.held {
                Some(held) => {
                    held.lines += 1;
                    false
                }
                None => true,
            }
        };
        self.held_back.fetch_add(1, Ordering::Relaxed);
        if first {
            // Outside the lock: the `Debug` of a field may do anything.
            let mut message = Message::default();
            event.record(&mut message);
            if let Some(mut kind) = self.kinds.get_mut(&metadata.callsite()) {
                let held = kind.held.get_or_insert(Held {
                    since: now,
                    level: *metadata.level(),
                    lines: 0,
                    message: message.0,
                });
                held.lines += 1;
            }
        }
        false
    }

    /// Removes and returns lines held back, of kinds whose first such line is at least `age` old.
    pub(super) fn due(&self, age: Duration) -> Vec<HeldBack> {
        let now = Instant::now();
        let kinds = self.kinds.iter_mut().filter_map(|mut kind| {
            let held = kind
                .held
                .take_if(|held| now.duration_since(held.since) >= age)?;
            Some(HeldBack {
                level: held.level,
                lines: held.lines,
                seconds: now.duration_since(held.since).as_secs_f64().ceil() as u64,
                message: held.message,
            })
        });
        kinds.collect()
    }

    /// Lines held back so far, reported or not.
    pub(super) fn held_back(&self) -> u64 {
        self.held_back.load(Ordering::Relaxed)
    }
}

/// The message of an event, without its fields.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tracing_subscriber::Layer;
    use tracing_subscriber::layer::{Context, SubscriberExt};

    use super::*;

    /// Admits events as if each came at the moment in its field `at_s`.
    struct Asks {
        limit: Arc<Limit>,
        start: Instant,
        admitted: Arc<AtomicU64>,
    }

    struct At(u64);

    impl Visit for At {
        fn record_u64(&mut self, field: &Field, value: u64) {
            if field.name() == "at_s" {
                self.0 = value;
            }
        }
        fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
    }

    impl<S: tracing::Subscriber> Layer<S> for Asks {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut at = At(0);
            event.record(&mut at);
            let now = self.start + Duration::from_secs(at.0);
            let admitted = self.limit.admit(now, event);
            self.admitted
                .fetch_add(u64::from(admitted), Ordering::Relaxed);
        }
    }

    fn with(test: impl FnOnce(&Limit, &AtomicU64)) {
        let (limit, admitted) = (Arc::<Limit>::default(), Arc::<AtomicU64>::default());
        let start = Instant::now() - Duration::from_secs(100);
        let layer = Asks {
            limit: Arc::clone(&limit),
            start,
            admitted: Arc::clone(&admitted),
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            test(&limit, &admitted);
        });
    }

    #[test]
    fn a_flood_of_one_kind_is_cut_and_told_of_and_the_others_are_not() {
        with(|limit, admitted| {
            for number in 0..1_000_u64 {
                tracing::warn!(at_s = 1_u64, number, "knocked");
            }
            assert_eq!(admitted.load(Ordering::Relaxed), u64::from(LINES_MAX));
            tracing::error!(at_s = 1_u64, "burns");
            assert_eq!(admitted.load(Ordering::Relaxed), u64::from(LINES_MAX) + 1);
            let told = limit.due(WINDOW);
            let [held_back] = told.as_slice() else {
                panic!("{told:?}")
            };
            assert_eq!(held_back.level, Level::WARN);
            assert_eq!(held_back.lines, 1_000 - u64::from(LINES_MAX));
            assert_eq!(held_back.message, "knocked");
            assert_eq!(limit.held_back(), 1_000 - u64::from(LINES_MAX));
            assert_eq!(limit.due(Duration::ZERO), [], "told once");
        });
    }

    #[test]
    fn a_kind_that_goes_on_writes_few_lines_and_all_of_them_again_after_a_pause() {
        with(|limit, admitted| {
            let write = |at_s: u64| {
                for _ in 0..15 {
                    tracing::info!(at_s, "again");
                }
                admitted.swap(0, Ordering::Relaxed)
            };
            assert_eq!([0, 5, 9].map(write), [15, 5, 0]);
            assert_eq!([11, 12, 22].map(write), [2, 0, 2]);
            assert_eq!(write(42), 15, "a window without any is between");
            let told: u64 = limit.due(WINDOW).iter().map(|held| held.lines).sum();
            assert_eq!(told, 7 * 15 - 20 - 2 - 2 - 15);
        });
    }

    #[test]
    fn errors_that_go_on_are_written_as_before() {
        with(|_, admitted| {
            for at_s in [0, 11_u64] {
                for _ in 0..LINES_MAX + 5 {
                    tracing::error!(at_s, "again");
                }
            }
            assert_eq!(admitted.load(Ordering::Relaxed), 2 * u64::from(LINES_MAX));
        });
    }

    #[test]
    fn what_was_held_back_a_moment_ago_is_not_told_yet() {
        with(|limit, _| {
            for _ in 0..=LINES_MAX {
                tracing::info!(at_s = 99_u64, "just now");
            }
            assert_eq!(limit.due(WINDOW), []);
            assert_eq!(limit.due(Duration::ZERO).len(), 1);
        });
    }
}
