//! Pauses between attempts: the shortest first, doubled each time, up to the longest.

use std::time::Duration;

use rand::Rng;

/// A row of attempts, and the pauses between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    shortest: Duration,
    longest: Duration,
    next: Duration,
    attempts: u32,
}

impl Backoff {
    /// Pauses from `shortest` to `longest`.
    pub const fn new(shortest: Duration, longest: Duration) -> Self {
        Backoff {
            shortest,
            longest,
            next: shortest,
            attempts: 0,
        }
    }

    /// Attempts that have failed.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Notes a failed attempt. The pause before the next one.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.attempts = self.attempts.saturating_add(1);
        self.next = (self.next * 2).min(self.longest);
        pause
    }

    /// The same with full jitter, from half the shortest pause on: those that failed together do
    /// not come back together.
    pub fn jittered_pause(&mut self) -> Duration {
        let pause = self.pause();
        #[cfg(feature = "faults")]
        if let Some(surroundings) = crate::simulated::surroundings() {
            let least = self.shortest / 2;
            let share = (surroundings.random() % 1_001) as u32;
            return least + (pause.saturating_sub(least)) * share / 1_000;
        }
        rand::rng().random_range(self.shortest / 2..=pause)
    }

    /// Whether the next pause is the longest.
    pub fn is_at_longest(&self) -> bool {
        self.next >= self.longest
    }

    /// An attempt went well.
    pub fn reset(&mut self) {
        *self = Backoff::new(self.shortest, self.longest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_a_success() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(10), ms(35));
        let pauses: Vec<Duration> = (0..4).map(|_| backoff.pause()).collect();
        assert_eq!(pauses, [ms(10), ms(20), ms(35), ms(35)]);
        assert!(backoff.is_at_longest());
        assert_eq!(backoff.attempts(), 4);
        backoff.reset();
        assert_eq!((backoff.attempts(), backoff.pause()), (0, ms(10)));
    }

    #[test]
    fn a_jittered_pause_is_between_half_the_shortest_and_the_plain_one() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(10), ms(1_000));
        for attempt in 0..12 {
            let plain = ms(10 << attempt).min(ms(1_000));
            let pause = backoff.jittered_pause();
            assert!(pause >= ms(5) && pause <= plain, "{pause:?} of {plain:?}");
        }
    }
}
