//! How many requests a second are due, over time.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How long a [`RateProfile::Step`] takes to reach its peak: within the first second, yet not in
/// no time, as real crowds arrive over some hundred milliseconds.
const STEP_RISE_S: f64 = 0.5;

/// The rate of requests over time, in requests a second, second clicks included.
///
/// Written as `5000` (constant), `step:20000` (from nothing to the peak within a second, then
/// held) or `ramp:100..20000` (linear over the whole duration); the same text is its serde form.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RateProfile {
    /// The same rate throughout.
    Constant {
        /// Requests a second.
        per_second: f64,
    },
    /// From zero to the peak in half a second, then held.
    Step {
        /// Requests a second at the peak.
        peak_per_second: f64,
    },
    /// A straight line over the whole duration; may fall as well as rise.
    Ramp {
        /// Requests a second at the start.
        from_per_second: f64,
        /// Requests a second at the end.
        to_per_second: f64,
    },
}

impl RateProfile {
    /// The highest rate of the profile, in requests a second.
    pub fn peak_per_second(&self) -> f64 {
        match *self {
            Self::Constant { per_second } => per_second,
            Self::Step { peak_per_second } => peak_per_second,
            Self::Ramp {
                from_per_second,
                to_per_second,
            } => from_per_second.max(to_per_second),
        }
    }

    /// The profile as a curve; `duration_s` is what a ramp stretches over.
    pub(super) fn curve(&self, duration_s: f64) -> Curve {
        match *self {
            Self::Constant { per_second } => Curve {
                from: per_second,
                to: per_second,
                rise_s: 0.0,
            },
            Self::Step { peak_per_second } => Curve {
                from: 0.0,
                to: peak_per_second,
                rise_s: STEP_RISE_S,
            },
            Self::Ramp {
                from_per_second,
                to_per_second,
            } => Curve {
                from: from_per_second,
                to: to_per_second,
                rise_s: duration_s,
            },
        }
    }
}

/// A rate that goes from one value to another in a straight line and then stays there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Curve {
    from: f64,
    to: f64,
    rise_s: f64,
}

impl Curve {
    /// How many requests are due before `t` seconds.
    pub(super) fn due_before(&self, t: f64) -> f64 {
        let rising = t.min(self.rise_s);
        let mut due = self.from * rising;
        if self.rise_s > 0.0 {
            due += (self.to - self.from) * rising * rising / (2.0 * self.rise_s);
        }
        due + self.to * (t - rising)
    }

    /// The second at which request number `n` (from 0) is due; infinite if it never is.
    pub(super) fn moment_s(&self, n: f64) -> f64 {
        let in_rise = self.due_before(self.rise_s);
        if n >= in_rise {
            return if self.to > 0.0 {
                self.rise_s + (n - in_rise) / self.to
            } else {
                f64::INFINITY
            };
        }
        let slope = (self.to - self.from) / self.rise_s;
        // The stable form of the quadratic's root: it loses no digits where the slope is small.
        let root = (self.from * self.from + 2.0 * slope * n).max(0.0).sqrt();
        if n <= 0.0 {
            0.0
        } else {
            2.0 * n / (self.from + root)
        }
    }
}

impl fmt::Display for RateProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant { per_second } => write!(f, "{per_second}"),
            Self::Step { peak_per_second } => write!(f, "step:{peak_per_second}"),
            Self::Ramp {
                from_per_second,
                to_per_second,
            } => write!(f, "ramp:{from_per_second}..{to_per_second}"),
        }
    }
}

impl FromStr for RateProfile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let profile = match text.split_once(':') {
            None => Self::Constant {
                per_second: rate(text)?,
            },
            Some(("constant", value)) => Self::Constant {
                per_second: rate(value)?,
            },
            Some(("step", value)) => Self::Step {
                peak_per_second: rate(value)?,
            },
            Some(("ramp", value)) => {
                let (from, to) = value.split_once("..").ok_or_else(|| {
                    format!("{text:?} is not a ramp; write it like ramp:100..20000")
                })?;
                Self::Ramp {
                    from_per_second: rate(from)?,
                    to_per_second: rate(to)?,
                }
            }
            Some(_) => {
                return Err(format!(
                    "{text:?} is not a rate; write 5000, step:20000 or ramp:100..20000"
                ));
            }
        };
        if profile.peak_per_second() > 0.0 {
            Ok(profile)
        } else {
            Err(format!("the rate {text:?} never sends a request"))
        }
    }
}

impl TryFrom<String> for RateProfile {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<RateProfile> for String {
    fn from(profile: RateProfile) -> Self {
        profile.to_string()
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.trim().replace('_', "").parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err(format!(
            "{text:?} is not a number of requests a second; write 5000, step:20000 or ramp:100..20000"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_read_and_written_alike() {
        for text in ["5000", "step:20000", "ramp:100..20000", "0.5"] {
            assert_eq!(text.parse::<RateProfile>().unwrap().to_string(), text);
        }
        for text in ["", "-1", "step:", "ramp:5", "sine:3", "nan", "inf", "0"] {
            assert!(text.parse::<RateProfile>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_moment_of_a_request_inverts_the_count_due() {
        for text in ["5000", "step:20000", "ramp:100..20000", "ramp:900..10"] {
            let curve = text.parse::<RateProfile>().unwrap().curve(4.0);
            let mut last = -1.0;
            for n in (0..1000).map(|n| f64::from(n) * 1.7) {
                let t = curve.moment_s(n);
                assert!(t > last, "{text}: {n}");
                assert!((curve.due_before(t) - n).abs() < 1e-6, "{text}: {n}");
                last = t;
            }
        }
    }

    #[test]
    fn a_step_is_at_its_peak_within_a_second() {
        let curve = "step:1000".parse::<RateProfile>().unwrap().curve(10.0);
        let second = |s: f64| curve.due_before(s + 1.0) - curve.due_before(s);
        assert!((second(1.0) - 1000.0).abs() < 1e-6);
        assert!((second(0.0) - 750.0).abs() < 1e-6);
    }
}
