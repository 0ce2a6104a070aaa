//! RFC 3339 times, as strict as its grammar: a library reads more than that.

use jiff::civil::{Date, date};
use serde::Serialize;

use crate::order::UnixMillis;

/// A time in an answer: RFC 3339, UTC, milliseconds.
#[derive(Debug)]
pub(super) struct Time(pub(super) UnixMillis);

impl Serialize for Time {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// Milliseconds of a day.
const DAY_MS: i64 = 86_400_000;

/// The first moment that has no year of four digits: 10000-01-01T00:00:00Z.
const END_MS: i64 = 253_402_300_800_000;

/// Why a text is no time that can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTime {
    /// It is not in the form, or a part of it is out of range.
    #[error("must be a time as in RFC 3339 with its offset, such as 2026-11-11T20:00:00+08:00")]
    Form,
    /// It has a second 60 at a moment at which no leap second can be.
    #[error("has a second 60, which there is only at the end of a month in UTC")]
    LeapSecond,
    /// It is before 1970 or after 9999, in UTC.
    #[error("must be from 1970 to 9999 in UTC")]
    Range,
}

/// Reads `date-time` of RFC 3339 5.6: `T` and `Z` in capitals or not, a fraction of any length (what
/// is below a millisecond is cut off), offsets to 23:59, `-00:00` among them. A leap second is the
/// second after it, as in Unix time.
///
/// # Errors
/// [`InvalidTime`].
pub fn parse(text: &str) -> Result<UnixMillis, InvalidTime> {
    let mut rest = Rest(text.as_bytes());
    let fields = read(&mut rest).filter(|_| rest.0.is_empty());
    let fields = fields.ok_or(InvalidTime::Form)?;
    let day = Date::new(fields.year, fields.month, fields.day).map_err(|_| InvalidTime::Form)?;
    let days = day.duration_since(date(1970, 1, 1)).as_secs() / 86_400;
    let leaps = fields.second == 60;
    let minutes = fields.hour * 60 + fields.minute - fields.offset_minutes;
    let seconds = days * 86_400 + minutes * 60 + fields.second;
    if leaps && !ends_a_month(seconds) {
        return Err(InvalidTime::LeapSecond);
    }
    let millis = seconds * 1_000 + fields.millisecond;
    if !(0..END_MS).contains(&millis) {
        return Err(InvalidTime::Range);
    }
    Ok(UnixMillis(millis))
}

/// Whether a month of UTC begins at this second of Unix time.
fn ends_a_month(second: i64) -> bool {
    let first = date(1970, 1, 1).checked_add(jiff::SignedDuration::from_secs(second));
    second.rem_euclid(DAY_MS / 1_000) == 0 && first.is_ok_and(|day| day.day() == 1)
}

struct Fields {
    year: i16,
    month: i8,
    day: i8,
    hour: i64,
    minute: i64,
    second: i64,
    millisecond: i64,
    /// East of UTC.
    offset_minutes: i64,
}

fn read(rest: &mut Rest<'_>) -> Option<Fields> {
    let year = rest.digits(4, 9999)?;
    rest.any_of(b"-")?;
    let month = rest.digits(2, 12)?;
    rest.any_of(b"-")?;
    let day = rest.digits(2, 31)?;
    rest.any_of(b"Tt")?;
    let hour = rest.digits(2, 23)?;
    rest.any_of(b":")?;
    let minute = rest.digits(2, 59)?;
    rest.any_of(b":")?;
    let second = rest.digits(2, 60)?;
    let mut millisecond = 0;
    if rest.any_of(b".").is_some() {
        let mut weight = 100;
        millisecond += weight * rest.digits(1, 9)?;
        while let Some(digit) = rest.digits(1, 9) {
            weight /= 10;
            millisecond += weight * digit;
        }
    }
    let offset_minutes = match rest.any_of(b"Zz+-")? {
        b'Z' | b'z' => 0,
        sign => {
            let hours = rest.digits(2, 23)?;
            rest.any_of(b":")?;
            let minutes = hours * 60 + rest.digits(2, 59)?;
            if sign == b'-' { -minutes } else { minutes }
        }
    };
    Some(Fields {
        year: i16::try_from(year).ok()?,
        month: i8::try_from(month).ok()?,
        day: i8::try_from(day).ok()?,
        hour,
        minute,
        second,
        millisecond,
        offset_minutes,
    })
}

/// The part that is still to be read.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    /// Takes one of these bytes.
    fn any_of(&mut self, bytes: &[u8]) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        if !bytes.contains(first) {
            return None;
        }
        self.0 = rest;
        Some(*first)
    }

    /// Takes so many digits, whose number is at most `most`.
    fn digits(&mut self, count: usize, most: i64) -> Option<i64> {
        let (digits, rest) = self.0.split_at_checked(count)?;
        let number = digits.iter().try_fold(0, |number, byte| {
            byte.is_ascii_digit()
                .then(|| number * 10 + i64::from(byte - b'0'))
        })?;
        if number > most {
            return None;
        }
        self.0 = rest;
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_of_rfc_3339_is_read() {
        for (text, expected) in [
            ("2026-11-11T12:00:00Z", "2026-11-11T12:00:00.000Z"),
            ("2026-11-11t12:00:00z", "2026-11-11T12:00:00.000Z"),
            ("2026-11-11T20:00:00+08:00", "2026-11-11T12:00:00.000Z"),
            ("2026-11-11T12:00:00-00:00", "2026-11-11T12:00:00.000Z"),
            ("2026-11-11T12:00:00+23:59", "2026-11-10T12:01:00.000Z"),
            ("2026-11-11T12:00:00-23:59", "2026-11-12T11:59:00.000Z"),
            ("2026-11-11T12:00:00.5Z", "2026-11-11T12:00:00.500Z"),
            (
                "2026-11-11T12:00:00.12399999999999999999999999Z",
                "2026-11-11T12:00:00.123Z",
            ),
            ("2028-02-29T00:00:00Z", "2028-02-29T00:00:00.000Z"),
            ("1970-01-01T00:00:00Z", "1970-01-01T00:00:00.000Z"),
            ("1969-12-31T23:00:00-01:00", "1970-01-01T00:00:00.000Z"),
            // Those of the RFC's own examples.
            ("1990-12-31T23:59:60Z", "1991-01-01T00:00:00.000Z"),
            ("1990-12-31T15:59:60-08:00", "1991-01-01T00:00:00.000Z"),
            ("1985-04-12T23:20:50.52Z", "1985-04-12T23:20:50.520Z"),
            // Whoever means "never".
            ("9999-12-31T23:59:59.999Z", "9999-12-31T23:59:59.999Z"),
        ] {
            let read = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(read.to_string(), expected, "{text}");
        }
    }

    #[test]
    fn what_rfc_3339_does_not_have_is_refused_for_its_own_reason() {
        for text in [
            "",
            "tomorrow",
            "2026-11-11",
            "2026-11-11T12:00:00",
            "2026-11-11 12:00:00Z",
            "2026-11-11T12:00Z",
            "2026-11-11T12Z",
            "20261111T120000Z",
            "2026-11-11T120000Z",
            "2026-11-11T12:00:00,5Z",
            "2026-11-11T12:00:00.Z",
            "2026-11-11T12:00:00+08",
            "2026-11-11T12:00:00+0800",
            "2026-11-11T12:00:00+24:00",
            "2026-11-11T12:00:00+08:60",
            "2026-11-11T12:00:00+08:00:30",
            "2026-11-11T12:00:00\u{2212}08:00",
            "2026-11-11T12:00:00Z[UTC]",
            "2026-11-11T12:00:00+01:00[Europe/Berlin]",
            "2026-11-11T12:00:00Z ",
            " 2026-11-11T12:00:00Z",
            "+002026-11-11T12:00:00Z",
            "-002026-11-11T12:00:00Z",
            "12026-11-11T12:00:00Z",
            "2026-W46-3T12:00:00Z",
            "2026-315T12:00:00Z",
            "2026-02-29T12:00:00Z",
            "2026-13-01T12:00:00Z",
            "2026-00-01T12:00:00Z",
            "2026-11-31T12:00:00Z",
            "2026-11-11T24:00:00Z",
            "2026-11-11T12:60:00Z",
            "2026-11-11T12:00:61Z",
        ] {
            assert_eq!(parse(text), Err(InvalidTime::Form), "{text}");
        }
        for text in [
            "2026-11-11T12:00:60Z",
            "2026-11-11T23:59:60Z",
            "2026-06-30T23:59:60+01:00",
        ] {
            assert_eq!(parse(text), Err(InvalidTime::LeapSecond), "{text}");
        }
        for text in [
            "0000-01-01T00:00:00Z",
            "1969-12-31T23:59:59.999Z",
            "9999-12-31T23:59:59-00:01",
        ] {
            assert_eq!(parse(text), Err(InvalidTime::Range), "{text}");
        }
    }
}
