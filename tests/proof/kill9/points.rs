//! The points to crash at, and which of them were passed.

use std::collections::BTreeSet;
use std::fmt;

/// Points of one form of the proof.
pub struct Points {
    pub all: Vec<&'static str>,
    /// How many were asked for, one after the other.
    next: usize,
    asked: BTreeSet<&'static str>,
    /// Those that a process has crashed at.
    hit: BTreeSet<&'static str>,
}

impl Points {
    pub fn new(all: Vec<&'static str>) -> Self {
        Points {
            all,
            next: 0,
            asked: BTreeSet::new(),
            hit: BTreeSet::new(),
        }
    }

    /// Begins at any of them, unless it has begun.
    pub fn begin(&mut self, first: usize) {
        if self.asked.is_empty() {
            self.next = first;
        }
    }

    pub fn next(&mut self) -> &'static str {
        let point = self.all[self.next % self.all.len()];
        self.next += 1;
        self.asked.insert(point);
        point
    }

    /// A process has crashed at this one.
    pub fn hit(&mut self, point: &'static str) {
        self.hit.insert(point);
    }
}

impl fmt::Display for Points {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hit, asked) = (self.hit.len(), self.asked.len());
        write!(f, "points_hit={hit}/{asked} of {}", self.all.len())?;
        let missed: Vec<&str> = self.asked.difference(&self.hit).copied().collect();
        if missed.is_empty() {
            return Ok(());
        }
        write!(f, " never_passed={}", missed.join(","))
    }
}
