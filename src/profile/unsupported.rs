//! Stub for platforms without profiles.

use std::collections::BTreeMap;
use std::convert::Infallible;

use super::ProfileError;

/// Never constructed.
pub(super) struct Sampler(Infallible);

impl Sampler {
    pub(super) fn start(_hz: u16) -> Result<Self, ProfileError> {
        Err(ProfileError::Unsupported)
    }

    pub(super) fn stacks(self) -> Result<BTreeMap<String, u64>, ProfileError> {
        match self.0 {}
    }
}

pub(super) fn draw(_folded: &str, _subtitle: &str) -> Result<Vec<u8>, ProfileError> {
    Err(ProfileError::Unsupported)
}
