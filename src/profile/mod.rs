//! Where this process spends its processor time: stacks, taken many times a second while it works.
//!
//! The kernel counts the process's processor time and interrupts whoever uses it with `SIGPROF`;
//! what the thread is doing at that moment is one sample. So a process that waits gives none, and
//! one on four busy cores gives four times as many as on one. The timer and the signal belong to
//! the process, therefore one profile is taken at a time.
//!
//! `sampler` says how stacks are walked, and why in that way.

#[cfg(all(any(target_os = "linux", target_os = "macos"), target_arch = "x86_64"))]
mod sampler;
#[cfg(not(all(any(target_os = "linux", target_os = "macos"), target_arch = "x86_64")))]
#[path = "unsupported.rs"]
mod sampler;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use sampler::Sampler;
use thiserror::Error;

/// Why there is no profile.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// Somebody else takes one.
    #[error("a profile of this process is being taken: wait until it is done")]
    Running,
    /// Not here.
    #[error("profiles are taken on Linux and macOS on x86-64 only: use the system's own profiler")]
    Unsupported,
    /// The profiler itself said no.
    #[error(
        "the profiler failed: {0}; it needs a temporary directory that it may write to (TMPDIR)"
    )]
    Failed(String),
}

impl ProfileError {
    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            ProfileError::Running => true,
            ProfileError::Unsupported | ProfileError::Failed(_) => false,
        }
    }
}

/// A profile that is being taken. Dropping it ends it.
pub struct Profile {
    // In this order: the place is free once nothing is sampled any more.
    sampler: Sampler,
    _place: Place,
}

impl Profile {
    /// Begins one with `hz` samples a second of processor time, 1 to 999. The first one of a
    /// process reads its unwind tables, so this may block for a moment.
    ///
    /// # Errors
    /// Another one is being taken, or none can be.
    pub fn start(hz: u16) -> Result<Self, ProfileError> {
        let place = Place::take().ok_or(ProfileError::Running)?;
        Ok(Profile {
            sampler: Sampler::start(hz)?,
            _place: place,
        })
    }

    /// Ends it and names the functions in it, which blocks for a while.
    ///
    /// # Errors
    /// What was sampled could not be read back.
    pub fn finish(self) -> Result<Stacks, ProfileError> {
        let counts = self.sampler.stacks()?;
        Ok(Stacks { counts })
    }
}

/// The one place for a profile in this process; dropping it frees it.
struct Place;

static TAKEN: AtomicBool = AtomicBool::new(false);

impl Place {
    fn take() -> Option<Self> {
        // Acquire and Release: who takes the place sees a sampler that was stopped completely.
        TAKEN
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

/// What a profile found: how many samples fell on each stack.
#[derive(Debug)]
pub struct Stacks {
    /// By the stack from its thread's name to the innermost function, separated by semicolons.
    counts: BTreeMap<String, u64>,
}

impl Stacks {
    /// Samples in all.
    pub fn samples(&self) -> u64 {
        self.counts.values().sum()
    }

    /// The collapsed form that flamegraph tools read and compare: a line a stack, its count last.
    pub fn folded(&self) -> String {
        let mut text = String::new();
        for (stack, count) in &self.counts {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{stack} {count}");
        }
        text
    }

    /// An SVG that can be searched and zoomed in a browser. Without samples it says so.
    ///
    /// # Errors
    /// It could not be drawn.
    pub fn flamegraph(&self, subtitle: &str) -> Result<Vec<u8>, ProfileError> {
        if self.counts.is_empty() {
            return Ok(empty(subtitle).into_bytes());
        }
        sampler::draw(&self.folded(), subtitle)
    }
}

/// The picture of a profile without samples.
fn empty(subtitle: &str) -> String {
    format!(
        r##"<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg" width="1200" height="80" viewBox="0 0 1200 80">
<rect width="100%" height="100%" fill="#eeeeee"/>
<g font-family="monospace" font-size="14" text-anchor="middle">
<text x="600" y="32">No samples: this process used next to no processor time meanwhile.</text>
<text x="600" y="56">{subtitle}</text>
</g>
</svg>
"##
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_place_and_whoever_leaves_frees_it() {
        let place = Place::take().expect("nobody else takes one in this test");
        assert!(Place::take().is_none());
        drop(place);
        assert!(Place::take().is_some());
    }

    #[test]
    fn a_profile_without_samples_says_so() {
        let nothing = Stacks {
            counts: BTreeMap::new(),
        };
        assert_eq!((nothing.samples(), nothing.folded().as_str()), (0, ""));
        let picture = nothing.flamegraph("0 samples").expect("a picture");
        let picture = String::from_utf8(picture).expect("UTF-8");
        assert!(picture.contains("<svg") && picture.contains("No samples"));
    }
}
