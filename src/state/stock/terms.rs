//! The terms of sale of a SKU.

use std::fmt;

use crate::order::{Currency, UnixMillis};

/// Terms of sale of a SKU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaleTerms {
    /// Title for people.
    pub title: String,
    /// Price of one unit in minor units, 0 or more.
    pub unit_price: i64,
    /// Currency of the price.
    pub currency: Currency,
    /// Units that one buyer's live orders may hold together; `None` for no limit.
    pub per_user_limit: Option<u32>,
    /// Orders are refused before this moment.
    pub opens_at: Option<UnixMillis>,
    /// Orders are refused from this moment on.
    pub closes_at: Option<UnixMillis>,
    /// Its waiting list.
    pub waitlist: WaitlistTerms,
    /// Its draw; `None` if units go to whoever comes first.
    pub draw: Option<DrawTerms>,
}

/// Terms of a draw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrawTerms {
    /// Until this moment every order is an entry.
    pub at: UnixMillis,
    /// The name of the public value that takes part in the ranks; `None` if the seed alone ranks.
    pub beacon: Option<String>,
}

/// Orders on a waiting list at most, unless a SKU says otherwise.
pub const WAITLIST_MAX_DEFAULT: u32 = 100_000;

/// Terms of a SKU's waiting list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitlistTerms {
    /// Orders on it at most.
    pub max: u32,
    /// Whether an order is passed over if the units that are there do not suffice for it.
    pub skips: bool,
    /// Time to pay after assignment, in milliseconds; `None` for that of any order.
    pub payment_ttl_ms: Option<u64>,
    /// Units are assigned at these times of day only.
    pub assign_between: Option<DayWindow>,
}

impl Default for WaitlistTerms {
    fn default() -> Self {
        WaitlistTerms {
            max: WAITLIST_MAX_DEFAULT,
            skips: false,
            payment_ttl_ms: None,
            assign_between: None,
        }
    }
}

/// A time of day at an offset from UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DayTime {
    /// Minutes since midnight there, below 1440.
    minute: u16,
    /// Minutes that it is ahead of UTC, within a day.
    offset: i16,
}

/// Minutes of a day.
const DAY: i64 = 1_440;

impl DayTime {
    /// Parses `HH:MM+HH:MM`, `HH:MM-HH:MM` or `HH:MMZ`.
    pub fn parse(text: &str) -> Option<Self> {
        let minutes = |text: &str| {
            let (hours, minutes) = text.split_once(':')?;
            let number = |text: &str, below: u16| {
                let is_two_digits = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
                let number: Option<u16> = is_two_digits.then(|| text.parse().ok()).flatten();
                number.filter(|number| *number < below)
            };
            Some(number(hours, 24)? * 60 + number(minutes, 60)?)
        };
        let (time, offset) = text.split_at_checked(5)?;
        let offset = match offset.split_at_checked(1)? {
            ("Z", "") => 0,
            ("+", offset) => minutes(offset)? as i16,
            ("-", offset) => -(minutes(offset)? as i16),
            _ => return None,
        };
        let minute = minutes(time)?;
        Some(DayTime { minute, offset })
    }

    /// Minutes since midnight in UTC.
    fn in_utc(self) -> i64 {
        (i64::from(self.minute) - i64::from(self.offset)).rem_euclid(DAY)
    }
}

impl fmt::Display for DayTime {
    /// As [`DayTime::parse`] reads it, with an offset in numbers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.offset < 0 { '-' } else { '+' };
        let (minute, offset) = (self.minute, self.offset.unsigned_abs());
        write!(
            f,
            "{:02}:{:02}{sign}{:02}:{:02}",
            minute / 60,
            minute % 60,
            offset / 60,
            offset % 60
        )
    }
}

/// A part of every day, over midnight if it ends before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DayWindow {
    /// Its first minute.
    pub from: DayTime,
    /// The minute after its last one.
    pub to: DayTime,
}

impl DayWindow {
    /// A window; `None` if both are the same moment.
    pub fn new(from: DayTime, to: DayTime) -> Option<Self> {
        (from.in_utc() != to.in_utc()).then_some(DayWindow { from, to })
    }

    /// Whether it has this moment.
    pub fn has(self, moment: UnixMillis) -> bool {
        let since = (moment.0.div_euclid(60_000) - self.from.in_utc()).rem_euclid(DAY);
        since < (self.to.in_utc() - self.from.in_utc()).rem_euclid(DAY)
    }
}

impl SaleTerms {
    /// Whether the units of live orders must be known at `now`, for the purchase limit, or because a
    /// draw takes one entry of a user. A sale that ended a day ago no longer needs them, and a clock
    /// set back by less than a day opens no sale without them.
    pub fn need_units(&self, now: UnixMillis) -> bool {
        let is_over = self
            .closes_at
            .is_some_and(|closes_at| closes_at.plus_ms(OVER_MS) <= now);
        (self.per_user_limit.is_some() || self.draw.is_some()) && !is_over
    }

    /// Names, as in JSON, of the terms in which `other` differs.
    pub fn differing(&self, other: &SaleTerms) -> Vec<&'static str> {
        let SaleTerms {
            title,
            unit_price,
            currency,
            per_user_limit,
            opens_at,
            closes_at,
            waitlist,
            draw,
        } = self;
        let of_draw = |terms: &SaleTerms| {
            let draw = terms.draw.clone();
            draw.map_or((None, None), |draw| (Some(draw.at), draw.beacon))
        };
        let (draw_at, draw_beacon) = of_draw(self);
        let (other_at, other_beacon) = of_draw(other);
        let WaitlistTerms {
            max,
            skips,
            payment_ttl_ms,
            assign_between,
        } = *waitlist;
        let differs = [
            ("title", *title != other.title),
            ("unit_price", *unit_price != other.unit_price),
            ("currency", *currency != other.currency),
            ("per_user_limit", *per_user_limit != other.per_user_limit),
            ("opens_at", *opens_at != other.opens_at),
            ("closes_at", *closes_at != other.closes_at),
            ("waitlist_max", max != other.waitlist.max),
            ("waitlist_skips", skips != other.waitlist.skips),
            (
                "waitlist_payment_ttl_ms",
                payment_ttl_ms != other.waitlist.payment_ttl_ms,
            ),
            (
                "assign_between",
                assign_between != other.waitlist.assign_between,
            ),
            ("allocation", draw.is_some() != other.draw.is_some()),
            ("draw_at", draw_at != other_at),
            ("draw_beacon", draw_beacon != other_beacon),
        ];
        let names = differs.into_iter().filter(|(_, differs)| *differs);
        names.map(|(name, _)| name).collect()
    }
}

/// Time after its end during which a sale's limit is still maintained, in milliseconds: a day.
const OVER_MS: u64 = 86_400_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_day_are_read_with_their_offset_and_written_as_read() {
        for text in ["09:00+08:00", "00:00+00:00", "23:59-03:30"] {
            assert_eq!(DayTime::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(DayTime::parse("09:00Z"), DayTime::parse("09:00+00:00"));
        for bad in [
            "",
            "9:00Z",
            "09:00",
            "24:00Z",
            "09:60Z",
            "09:00+8",
            "09:00 Z",
            "09:00Zz",
            "+9:00Z",
            "09:0é",
            "09:00+24:00",
        ] {
            assert_eq!(DayTime::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_part_of_the_day_begins_with_its_first_minute_and_may_span_midnight() {
        let window =
            |from, to| DayWindow::new(DayTime::parse(from).unwrap(), DayTime::parse(to).unwrap());
        let at = |minutes: i64| UnixMillis(minutes * 60_000);
        // 01:00 to 14:00 in UTC.
        let day = window("09:00+08:00", "22:00+08:00").unwrap();
        let night = window("22:00+08:00", "09:00+08:00").unwrap();
        for (minute, has) in [
            (59, false),
            (60, true),
            (839, true),
            (840, false),
            (1_500, true),
        ] {
            assert_eq!(day.has(at(minute)), has, "{minute}");
            assert_eq!(night.has(at(minute)), !has, "{minute}");
        }
        assert_eq!(window("08:00+08:00", "00:00Z"), None);
    }
}
