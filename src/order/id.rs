//! Time-ordered 64-bit order ids.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::{Lane, UnixMillis};

use crate::clock;

/// A 64-bit, time-ordered order id. Layout, from the most significant bit:
///
/// ```text
///   0 │ 41 bits: milliseconds since 2024-01-01 │ 6 bits: lane of the buyer │ 16 bits: sequence
/// ```
///
/// The ids of one buyer ascend. Ids of different buyers ascend from millisecond to millisecond. Ids of releases
/// before lanes have the number of a node, 0, in the place of the lane ([`Cutover`](super::Cutover)).
///
/// Positive as a `bigint` until the year 2093. Written in JSON as a string, because JavaScript
/// numbers lose bits above 2^53.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OrderId(u64);

/// 2024-01-01T00:00:00Z in Unix milliseconds, the zero of id timestamps.
const EPOCH_MS: u64 = 1_704_067_200_000;
const SEQUENCE_BITS: u32 = 16;
const LANE_BITS: u32 = 6;

impl OrderId {
    /// The lowest id.
    pub const MIN: OrderId = OrderId(1);
    /// The highest id.
    pub const MAX: OrderId = OrderId(i64::MAX as u64);

    /// The id with this value; `None` unless it is 1 to 2^63 − 1.
    pub fn new(value: u64) -> Option<Self> {
        (value != 0 && value <= i64::MAX as u64).then_some(OrderId(value))
    }

    /// The id in a `bigint` column.
    pub fn from_i64(value: i64) -> Option<Self> {
        u64::try_from(value).ok().and_then(Self::new)
    }

    /// Parses the decimal form, without sign or leading zeros.
    pub fn parse(text: &str) -> Option<Self> {
        if !text.bytes().all(|byte| byte.is_ascii_digit()) || text.starts_with('0') {
            return None;
        }
        text.parse().ok().and_then(Self::new)
    }

    /// The value.
    pub fn get(self) -> u64 {
        self.0
    }

    /// The value as a `bigint`.
    pub fn as_i64(self) -> i64 {
        // Never wraps: the constructors keep the top bit clear.
        self.0 as i64
    }

    /// Time of the id clock at which the id was given out, in Unix milliseconds.
    pub fn millis(self) -> UnixMillis {
        UnixMillis(((self.0 >> (SEQUENCE_BITS + LANE_BITS)) + EPOCH_MS) as i64)
    }

    /// Its place among all ids, which a clock gives out in this order, whatever their lanes. No other id has the same: two
    /// nodes may give out ids of one moment with one sequence number, in different lanes.
    pub fn turn(self) -> u64 {
        let ms = self.0 >> (SEQUENCE_BITS + LANE_BITS);
        let sequence = self.0 & ((1 << SEQUENCE_BITS) - 1);
        let lane = self.0 >> SEQUENCE_BITS & ((1 << LANE_BITS) - 1);
        (ms << SEQUENCE_BITS | sequence) << LANE_BITS | lane
    }

    /// The bits of the lane; meaningful from the [`Cutover`](super::Cutover) on.
    pub(crate) fn lane_bits(self) -> Lane {
        Lane::from_bits(self.0 >> SEQUENCE_BITS)
    }

    /// The lowest id of a moment: every id given out before is smaller.
    pub fn floor_of(moment: UnixMillis) -> Self {
        let ms = u64::try_from(moment.0)
            .unwrap_or(0)
            .saturating_sub(EPOCH_MS);
        OrderId((ms << (SEQUENCE_BITS + LANE_BITS)).clamp(1, i64::MAX as u64))
    }
}

/// A range of ids, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The lowest id.
    pub from: OrderId,
    /// The highest id.
    pub to: OrderId,
}

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(itoa::Buffer::new().format(self.0))
    }
}

impl serde::Serialize for OrderId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(itoa::Buffer::new().format(self.0))
    }
}

/// The ids leased to this process are used up, because the lease could not be renewed. No id is
/// given out until it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lease on order ids has run out; it will be renewed as soon as the database answers")]
pub struct IdLeaseExhausted;

/// A reading of the wall clock, continued by the monotonic clock. Values derived from one reading
/// agree, even if the wall clock is set meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct ClockReading {
    wall: UnixMillis,
    at: Instant,
}

impl ClockReading {
    /// Reads the wall clock.
    pub fn take() -> Self {
        ClockReading {
            wall: UnixMillis::now(),
            at: clock::now(),
        }
    }

    /// A reading of another clock, which says `now`.
    pub fn of(now: UnixMillis) -> Self {
        ClockReading {
            wall: now,
            at: Instant::now(),
        }
    }

    /// The current time, continued from this reading.
    pub fn now(&self) -> UnixMillis {
        let since = u64::try_from(clock::since(self.at).as_millis());
        self.wall.plus_ms(since.unwrap_or(u64::MAX))
    }
}

/// Gives out ids: strictly increasing, lock-free, never set back with the wall clock.
///
/// The clock's time is the wall clock, read once at start, plus a monotonic clock since. It is
/// never below the high-water mark of earlier processes, which is leased ahead in the database. A
/// full millisecond borrows from the next. No id is given out at or beyond the lease.
///
/// All lanes share one sequence, so that an id costs one access to one word whatever its lane.
#[derive(Debug)]
pub struct IdClock {
    /// `milliseconds since EPOCH_MS << 16 | sequence` of the last id given out. Relaxed
    /// read-modify-writes suffice: ids publish nothing else.
    last: AtomicU64,
    /// First millisecond (since EPOCH_MS) that is not leased.
    leased_until: AtomicU64,
    base_ms: u64,
    ahead_ms: u64,
    started: Instant,
}

impl IdClock {
    /// A clock that starts no earlier than `high_water` and gives out ids below `leased_until`.
    pub fn new(high_water: UnixMillis, leased_until: UnixMillis) -> Self {
        Self::going_on(ClockReading::take(), high_water, leased_until)
    }

    /// Same as [`IdClock::new`], from an earlier reading that was compared with another clock.
    pub fn going_on(clock: ClockReading, high_water: UnixMillis, leased_until: UnixMillis) -> Self {
        let since_epoch = |moment: UnixMillis| {
            u64::try_from(moment.0)
                .unwrap_or(0)
                .saturating_sub(EPOCH_MS)
        };
        let wall_ms = since_epoch(clock.now());
        let base_ms = wall_ms.max(since_epoch(high_water));
        IdClock {
            last: AtomicU64::new(base_ms << SEQUENCE_BITS),
            leased_until: AtomicU64::new(since_epoch(leased_until)),
            base_ms,
            ahead_ms: base_ms - wall_ms,
            started: clock::now(),
        }
    }

    fn ms_at(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.started).as_millis();
        self.base_ms + u64::try_from(since).unwrap_or(u64::MAX >> 24)
    }

    /// The clock's time: monotonic, and never before an id of an earlier process, or of an earlier owner of a lane.
    pub fn now(&self) -> UnixMillis {
        let last_ms = self.last.load(Ordering::Relaxed) >> SEQUENCE_BITS;
        UnixMillis((self.ms_at(clock::now()).max(last_ms) + EPOCH_MS) as i64)
    }

    /// Lets no further id lie before `moment`. The lease has to reach beyond it before ids are given out again.
    pub fn raise(&self, moment: UnixMillis) {
        let ms = u64::try_from(moment.0)
            .unwrap_or(0)
            .saturating_sub(EPOCH_MS);
        self.last.fetch_max(ms << SEQUENCE_BITS, Ordering::Relaxed);
    }

    /// Real time as this process knows it: the wall clock at its start plus a monotonic clock
    /// since. After a crash [`IdClock::now`] runs ahead of it by the unused lease of the previous
    /// process.
    pub fn real_now(&self) -> UnixMillis {
        self.real_at(clock::now())
    }

    /// [`IdClock::real_now`] for a caller that has read the monotonic clock already.
    pub fn real_at(&self, now: Instant) -> UnixMillis {
        UnixMillis((self.ms_at(now) - self.ahead_ms + EPOCH_MS) as i64)
    }

    /// The lowest id that may belong to the last `window_ms`. After a crash this clock is ahead of
    /// real time by the unused lease of the previous process; the window is not shortened by that.
    pub fn window_floor(&self, window_ms: u64) -> OrderId {
        let back = i64::try_from(window_ms).unwrap_or(i64::MAX);
        OrderId::floor_of(UnixMillis(self.real_now().0.saturating_sub(back)))
    }

    /// The next id in a lane.
    ///
    /// # Errors
    /// [`IdLeaseExhausted`] if the id would be beyond the lease.
    pub fn next(&self, lane: Lane) -> Result<OrderId, IdLeaseExhausted> {
        self.next_at(clock::now(), lane)
    }

    /// [`IdClock::next`] for a caller that has read the monotonic clock already.
    ///
    /// # Errors
    /// [`IdLeaseExhausted`] if the id would be beyond the lease.
    pub fn next_at(&self, now: Instant, lane: Lane) -> Result<OrderId, IdLeaseExhausted> {
        let now = self.ms_at(now) << SEQUENCE_BITS;
        let step = |last: u64| (last + 1).max(now);
        let previous = self
            .last
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| {
                Some(step(last))
            })
            .unwrap_or_else(|last| last);
        let value = step(previous);
        let (ms, sequence) = (value >> SEQUENCE_BITS, value & ((1 << SEQUENCE_BITS) - 1));
        if ms >= self.leased_until.load(Ordering::Relaxed) {
            return Err(IdLeaseExhausted);
        }
        let lane = u64::from(lane.get());
        Ok(OrderId(
            (((ms << LANE_BITS) | lane) << SEQUENCE_BITS) | sequence,
        ))
    }

    /// Extends the lease after the database has committed it. It never shrinks.
    pub fn extend_lease(&self, leased_until: UnixMillis) {
        let ms = u64::try_from(leased_until.0)
            .unwrap_or(0)
            .saturating_sub(EPOCH_MS);
        self.leased_until.fetch_max(ms, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn lane(number: u8) -> Lane {
        Lane::new(number).unwrap()
    }

    fn clock() -> IdClock {
        IdClock::new(UnixMillis(0), UnixMillis::now().plus_ms(3_600_000))
    }

    #[test]
    fn ids_increase_and_a_full_millisecond_borrows_the_next() {
        let clock = clock();
        let mut last = clock.next(lane(3)).unwrap();
        for _ in 0..200_000 {
            let id = clock.next(lane(3)).unwrap();
            assert!(id > last);
            last = id;
        }
    }

    #[test]
    fn ids_of_different_lanes_are_different_and_name_their_lane() {
        let clock = clock();
        let mut seen = std::collections::HashSet::new();
        let mut before = OrderId::MIN;
        for n in 0..200_000_u32 {
            let lane = lane((n % 64) as u8);
            let id = clock.next(lane).unwrap();
            assert_eq!(id.lane_bits(), lane);
            assert!(seen.insert(id));
            assert!(before.millis() <= id.millis(), "{before} {id}");
            before = id;
        }
    }

    #[test]
    fn ids_are_in_turn_as_they_were_given_out_whatever_their_lanes() {
        let clock = clock();
        let mut before = clock.next(lane(63)).unwrap().turn();
        for n in 0..10_000_u32 {
            let turn = clock.next(lane(63 - (n % 64) as u8)).unwrap().turn();
            assert!(before < turn, "{before} {turn}");
            before = turn;
        }
    }

    #[test]
    fn two_nodes_give_out_no_two_ids_of_one_turn() {
        let turns = |lane: u64| {
            let at =
                |ms: u64, sequence| OrderId((ms << LANE_BITS | lane) << SEQUENCE_BITS | sequence);
            [
                at(1, 0),
                at(1, 1),
                at(1, (1 << SEQUENCE_BITS) - 1),
                at(2, 0),
            ]
            .map(OrderId::turn)
        };
        let (one, other) = (turns(0), turns(63));
        assert!(one.iter().zip(&other).all(|(one, other)| one < other));
        assert!(other.iter().zip(&one[1..]).all(|(other, one)| other < one));
    }

    #[test]
    fn a_clock_goes_on_with_the_monotonic_clock() {
        let (clock, now) = (clock(), Instant::now());
        let later = now + Duration::from_secs(5);
        assert_eq!(clock.real_at(later).0 - clock.real_at(now).0, 5_000);
        let ids = [now, later].map(|at| clock.next_at(at, lane(3)).unwrap().millis().0);
        assert_eq!(ids[1] - ids[0], 5_000);
    }

    #[test]
    fn ids_start_beyond_the_high_water_mark_of_a_predecessor() {
        let ahead = UnixMillis::now().plus_ms(60_000);
        let clock = IdClock::new(ahead, ahead.plus_ms(1_000));
        assert!(clock.next(lane(3)).unwrap().millis() >= ahead);
    }

    #[test]
    fn a_clock_that_is_ahead_shortens_no_window() {
        let before = clock().next(lane(3)).unwrap();
        let ahead = IdClock::new(UnixMillis::now().plus_ms(60_000), UnixMillis(i64::MAX));
        assert!(ahead.window_floor(30_000) <= before);
        assert!(ahead.real_now() < UnixMillis::now().plus_ms(1_000));
    }

    #[test]
    fn a_clock_that_is_raised_goes_on_from_there_and_shortens_no_window() {
        let clock = IdClock::new(UnixMillis(0), UnixMillis(i64::MAX));
        let before = clock.next(lane(3)).unwrap();
        let ahead = UnixMillis::now().plus_ms(60_000);
        clock.raise(ahead);
        clock.raise(UnixMillis(0));
        let id = clock.next(lane(4)).unwrap();
        assert!(id.millis() >= ahead && clock.now() >= ahead, "{id}");
        assert!(clock.next(lane(5)).unwrap().turn() > id.turn());
        assert!(clock.window_floor(30_000) <= before);
        assert!(clock.real_now() < UnixMillis::now().plus_ms(1_000));
    }

    #[test]
    fn a_clock_goes_on_from_the_reading_that_it_is_given() {
        let reading = ClockReading {
            wall: UnixMillis(1_800_000_000_000),
            at: Instant::now(),
        };
        let clock = IdClock::going_on(reading, UnixMillis(0), UnixMillis(i64::MAX));
        let since_ms = clock.real_now().0 - reading.wall.0;
        assert!((0..600_000).contains(&since_ms), "{since_ms}");
    }

    #[test]
    fn nothing_is_given_out_beyond_the_lease() {
        let clock = IdClock::new(UnixMillis(0), UnixMillis::now());
        assert_eq!(clock.next(lane(3)), Err(IdLeaseExhausted));
        clock.extend_lease(UnixMillis::now().plus_ms(10_000));
        assert!(clock.next(lane(3)).is_ok());
    }

    #[test]
    fn the_decimal_form_round_trips_and_nothing_else_parses() {
        let id = clock().next(lane(3)).unwrap();
        assert_eq!(OrderId::parse(&id.to_string()), Some(id));
        for bad in [
            "",
            "0",
            "01",
            "+1",
            "-1",
            "1a",
            "9223372036854775808",
            "99999999999999999999",
        ] {
            assert_eq!(OrderId::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_floor_of_a_moment_lies_below_its_ids() {
        let clock = clock();
        let before = clock.now();
        let id = clock.next(lane(3)).unwrap();
        assert!(OrderId::floor_of(before) <= id);
        assert!(OrderId::floor_of(id.millis().plus_ms(1)) > id);
    }
}
