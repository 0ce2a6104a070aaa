//! The log, outside of the failure domain: a line is queued, limited by its kind, and dropped and
//! counted rather than waited for.
//!
//! ```text
//!   event ─► level ─► limit by kind ─► format ─► queue ─► thread `millrace-log` ─► standard error
//!                        │ held back               │ full            │ cannot be written
//!                        └──────────────────── counted ──────────────┘
//! ```
//!
//! Only the log's thread writes to standard error. A full disk, a closed pipe or a pipe without a
//! reader therefore stops the log and nothing else. The same holds for panic messages and for the
//! output of the command line ([`say`]), which take the same way.

mod limit;
mod queue;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tracing::Level;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use self::limit::{HeldBack, Limit, WINDOW};
use self::queue::{Queue, Sink};

/// Target of lines about the log itself. They are not limited.
const TARGET: &str = "millrace::logging";

/// Interval at which the thread looks for lines held back.
const TICK: Duration = Duration::from_secs(1);

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// For people, with or without colours.
    Text {
        /// Whether standard error is a terminal.
        colours: bool,
    },
    /// One JSON object per line.
    Json,
}

/// Lines lost, by reason. The numbers only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// The queue was full: standard error accepts lines too slowly, or none.
    pub full: u64,
    /// Standard error refused them.
    pub sink: u64,
    /// Too many of one kind; the log reports the number of each kind.
    pub limited: u64,
}

/// The log of this process, which has one standard error.
struct Log {
    queue: Queue,
    limit: Limit,
    /// Whether events are formatted; until then only [`say`] writes.
    started: AtomicBool,
}

/// The log, with the thread that writes it.
static LOG: LazyLock<Log> = LazyLock::new(|| {
    // Without the thread the queue fills up and further lines are counted: no reason to end a sale.
    let _ = std::thread::Builder::new()
        .name("millrace-log".to_owned())
        .spawn(|| write(&LOG));
    Log {
        queue: Queue::default(),
        limit: Limit::default(),
        started: AtomicBool::new(false),
    }
});

/// Starts logging events that pass `directives`, in the format `form`. Call once; a second call
/// changes nothing.
///
/// # Errors
/// If the directives cannot be parsed.
pub fn start(directives: &str, form: Form) -> Result<(), ParseError> {
    // Lines about dropped lines are needed at info, and lines below info are not limited.
    let filter = EnvFilter::try_new(format!("{directives},{TARGET}=info"))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| Line)
        .log_internal_errors(false);
    let limited = tracing_subscriber::registry().with(filter).with(LimitLayer);
    let started = match form {
        Form::Text { colours } => limited
            .with(lines.with_ansi(colours).with_target(false))
            .try_init(),
        Form::Json => limited.with(lines.json().flatten_event(true)).try_init(),
    };
    if started.is_ok() {
        LOG.started.store(true, Ordering::Release);
    }
    Ok(())
}

/// Turns panics into log lines from now on. Rust's own hook writes to standard error, where a pipe
/// without a reader would block the thread before it unwinds.
pub fn take_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed").to_owned();
        let place = panic.location().map(ToString::to_string);
        let place = place.unwrap_or_default();
        let reason = panic.payload_as_str().unwrap_or("no message");
        let backtrace = std::backtrace::Backtrace::capture();
        let backtrace = match backtrace.status() {
            std::backtrace::BacktraceStatus::Captured => format!("\n{backtrace}"),
            _ => String::new(),
        };
        if LOG.started.load(Ordering::Acquire) {
            tracing::error!(thread, place, "a thread panicked: {reason}{backtrace}");
        } else {
            say(&format!(
                "millrace: thread {thread} panicked at {place}: {reason}{backtrace}"
            ));
        }
    }));
}

/// Writes a line of the command line's output, in sequence with the lines of the log.
pub fn say(line: &str) {
    say_part(&format!("{line}\n"));
}

/// Writes a part of a line.
pub fn say_part(text: &str) {
    LOG.queue.push(text.as_bytes());
}

/// Holds log lines back until [`release`], as far as the queue has room.
pub fn hold() {
    LOG.queue.hold();
}

/// Writes the held lines, and continues as usual.
pub fn release() {
    LOG.queue.release();
}

/// Waits until every line is written or lost, at most `patience`: a pipe without a reader must not
/// delay the end of a drained process.
pub fn flush(patience: Duration) {
    for held_back in LOG.limit.due(Duration::ZERO) {
        tell(&held_back);
    }
    LOG.queue.flush(patience);
}

/// Lines dropped since the start of the process.
pub fn dropped() -> Dropped {
    let (full, sink) = LOG.queue.dropped();
    let limited = LOG.limit.held_back();
    Dropped {
        full,
        sink,
        limited,
    }
}

/// Writer of the fmt layer. It accepts every line at once: an error would make the layer write to
/// standard error itself.
struct Line;

impl io::Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LOG.queue.push_or_hold(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Holds lines back if there are too many of one kind.
struct LimitLayer;

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for LimitLayer {
    fn event_enabled(
        &self,
        event: &tracing::Event<'_>,
        _: tracing_subscriber::layer::Context<'_, S>,
    ) -> bool {
        let kind = event.metadata();
        // Debug lines were asked for and are not limited; the queue bounds them.
        *kind.level() > Level::INFO
            || kind.target() == TARGET
            || LOG.limit.admit(Instant::now(), event)
    }
}

/// Main loop of the thread, until the process ends.
fn write(log: &Log) {
    // A descriptor of its own: the lock of Rust's handle would be held during a write that hangs.
    let descriptor = std::io::stderr().as_fd().try_clone_to_owned();
    let mut sink = descriptor.map(|descriptor| Sink::new(File::from(descriptor)));
    let mut told = log.queue.dropped();
    let mut tick = Instant::now() + TICK;
    let mut tell_again = Instant::now();
    loop {
        if let Some(line) = log.queue.next(tick) {
            let written = sink.as_mut().is_ok_and(|sink| sink.write(&line));
            log.queue.done(written);
        }
        let now = Instant::now();
        if now < tick {
            continue;
        }
        tick = now + TICK;
        for held_back in log.limit.due(WINDOW) {
            tell(&held_back);
        }
        let (full, refused) = log.queue.dropped();
        if (full, refused) != told && now >= tell_again {
            tracing::warn!(
                target: TARGET,
                full = full - told.0,
                refused = refused - told.1,
                "log lines were lost: standard error accepted them too slowly, or refused them"
            );
            told = (full, refused);
            tell_again = now + WINDOW;
        }
    }
}

/// Logs a line about lines held back, at their level.
fn tell(held_back: &HeldBack) {
    let HeldBack {
        level,
        lines,
        seconds,
        message,
    } = held_back;
    macro_rules! at {
        ($level:expr) => {
            tracing::event!(
                target: TARGET,
                $level,
                held_back = lines,
                "{lines} more in {seconds} s: {message}"
            )
        };
    }
    match *level {
        Level::ERROR => at!(Level::ERROR),
        Level::WARN => at!(Level::WARN),
        Level::INFO => at!(Level::INFO),
        Level::DEBUG => at!(Level::DEBUG),
        Level::TRACE => at!(Level::TRACE),
    }
}
