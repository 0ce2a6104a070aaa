//! The clocks of this process, read in one place: a simulation has its own (`simulated`).

use std::sync::LazyLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The monotonic clock.
#[inline]
pub fn now() -> Instant {
    #[cfg(feature = "faults")]
    if let Some(surroundings) = crate::simulated::surroundings() {
        return surroundings.now();
    }
    Instant::now()
}

/// Time since `earlier`, which [`now`] gave.
#[inline]
pub fn since(earlier: Instant) -> Duration {
    now().saturating_duration_since(earlier)
}

/// A fixed moment of this process, of the monotonic clock.
pub fn start() -> Instant {
    #[cfg(feature = "faults")]
    if let Some(surroundings) = crate::simulated::surroundings() {
        return surroundings.start();
    }
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    *START
}

/// The wall time at [`start`] if this process goes by another clock than its machine's, in Unix milliseconds.
static OTHER_CLOCK: AtomicI64 = AtomicI64::new(i64::MIN);

/// Lets [`wall_ms`] go on from `now_ms` with the monotonic clock, whatever the machine's says: the nodes of a cluster go by
/// their database's.
pub fn go_by(now_ms: i64) {
    // Nothing else is published through it.
    OTHER_CLOCK.store(now_ms.saturating_sub(since_start_ms()), Ordering::Relaxed);
}

fn since_start_ms() -> i64 {
    i64::try_from(since(start()).as_millis()).unwrap_or(i64::MAX)
}

/// The wall clock, in Unix milliseconds: the machine's, or what [`go_by`] was told last.
pub fn wall_ms() -> i64 {
    match OTHER_CLOCK.load(Ordering::Relaxed) {
        i64::MIN => machine_ms(),
        at_start => at_start.saturating_add(since_start_ms()),
    }
}

/// The machine's wall clock, in Unix milliseconds; 0 if it is before the epoch.
pub fn machine_ms() -> i64 {
    #[cfg(feature = "faults")]
    if let Some(surroundings) = crate::simulated::surroundings() {
        return surroundings.wall_ms();
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let ms = since.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX));
    ms.saturating_add(crate::faults::clock_off_ms())
}

/// Milliseconds since the machine was started, its sleep included.
pub fn since_boot_ms() -> u64 {
    #[cfg(feature = "faults")]
    if let Some(surroundings) = crate::simulated::surroundings() {
        return surroundings.since_boot_ms();
    }
    #[cfg(target_os = "linux")]
    let clock = rustix::time::ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = rustix::time::ClockId::Monotonic;
    let now = rustix::time::clock_gettime(clock);
    let ms = now.tv_sec.saturating_mul(1_000) + now.tv_nsec / 1_000_000;
    u64::try_from(ms).unwrap_or(0)
}
