//! Latencies in HDR histograms, in microseconds.

use hdrhistogram::{Counter, Histogram};

/// One histogram that grows with what it is given. Without the limits of a fixed range there is
/// nothing that recording can fail on, short of an absurd value, which saturates.
#[derive(Debug, Clone)]
pub(super) struct Latencies<C: Counter> {
    histogram: Option<Histogram<C>>,
    digits: u8,
}

/// A day; a latency above it is recorded as this.
const US_MAX: u64 = 86_400_000_000;

impl<C: Counter> Latencies<C> {
    /// An empty histogram with this many significant decimal digits (1 to 5).
    pub(super) fn new(digits: u8) -> Self {
        Self {
            histogram: None,
            digits,
        }
    }

    /// Records one latency.
    pub(super) fn record(&mut self, latency_ns: u64) {
        if self.histogram.is_none() {
            self.histogram = Histogram::new(self.digits).ok();
        }
        if let Some(histogram) = &mut self.histogram {
            let us = (latency_ns / 1000).clamp(1, US_MAX);
            // The range grows by itself, so this cannot fail below the clamp.
            let _ = histogram.record(us);
        }
    }

    /// Adds another histogram's counts.
    pub(super) fn add(&mut self, other: &Self) {
        match (&mut self.histogram, &other.histogram) {
            (_, None) => {}
            (Some(own), Some(others)) => {
                let _ = own.add(others);
            }
            (None, Some(others)) => self.histogram = Some(others.clone()),
        }
    }

    /// How many latencies were recorded.
    pub(super) fn count(&self) -> u64 {
        self.histogram.as_ref().map_or(0, Histogram::len)
    }

    /// The latency at a quantile (0 to 1), in milliseconds; none while it is empty.
    pub(super) fn quantile_ms(&self, quantile: f64) -> Option<f64> {
        let histogram = self.histogram.as_ref().filter(|h| !h.is_empty())?;
        Some(ms(histogram.value_at_quantile(quantile)))
    }

    /// The longest latency, in milliseconds; none while it is empty.
    pub(super) fn max_ms(&self) -> Option<f64> {
        let histogram = self.histogram.as_ref().filter(|h| !h.is_empty())?;
        Some(ms(histogram.max()))
    }

    /// The mean latency, in milliseconds; none while it is empty.
    pub(super) fn mean_ms(&self) -> Option<f64> {
        let histogram = self.histogram.as_ref().filter(|h| !h.is_empty())?;
        Some((histogram.mean()).round() / 1000.0)
    }
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}
