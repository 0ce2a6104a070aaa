//! Places in an order log that a broker keeps.

use std::fmt;

/// The identity of a group: the epoch of its writer, and its number in that epoch. Number 0 is the epoch's marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Epoch of the process that wrote it, from 1.
    pub epoch: u64,
    /// Number in the epoch.
    pub number: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.number)
    }
}

/// The place of a group, and the broker's offset of it. The offset is a hint that reading verifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The identity of the group.
    pub place: Place,
    /// The broker's offset; 0 for a broker that addresses groups by their place (Redis).
    pub offset: u64,
}
