//! CPU profiles of this process: stacks sampled many times a second.
//!
//! The kernel counts the process's CPU time and interrupts a running thread with `SIGPROF`. The
//! thread's stack at that moment is one sample. A process that waits gives none, and four busy
//! cores give four times as many as one. The timer and the signal belong to the process, so only
//! one profile can be taken at a time.
//!
//! `sampler` explains how stacks are walked, and why.

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

/// Reasons why there is no profile.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// Another profile is being taken.
    #[error("another profile of this process is being taken; retry when it is done")]
    Running,
    /// Not supported on this platform.
    #[error(
        "profiles are supported on Linux and macOS on x86-64 only; use the system's own profiler"
    )]
    Unsupported,
    /// The profiler failed.
    #[error("the profiler failed: {0}; it needs a writable temporary directory (TMPDIR)")]
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

/// A running profile. Dropping it ends the sampling.
pub struct Profile {
    // In this order: the place is freed once the sampling has stopped.
    sampler: Sampler,
    _place: Place,
}

impl Profile {
    /// Starts a profile with `hz` samples per second of CPU time, 1 to 999. The first one of a
    /// process reads its unwind tables, so this may block briefly.
    ///
    /// # Errors
    /// Another profile is being taken, or the profiler failed.
    pub fn start(hz: u16) -> Result<Self, ProfileError> {
        let place = Place::take().ok_or(ProfileError::Running)?;
        Ok(Profile {
            sampler: Sampler::start(hz)?,
            _place: place,
        })
    }

    /// Stops sampling and looks up function names, which blocks for a while.
    ///
    /// # Errors
    /// If the samples cannot be read back.
    pub fn finish(self) -> Result<Stacks, ProfileError> {
        let counts = self.sampler.stacks()?;
        Ok(Stacks { counts })
    }
}

/// The right to take a profile in this process; dropping it frees it.
struct Place;

static TAKEN: AtomicBool = AtomicBool::new(false);

impl Place {
    fn take() -> Option<Self> {
        // Acquire and Release: the next owner sees a sampler that has stopped completely.
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

/// Result of a profile: the number of samples of each stack.
#[derive(Debug)]
pub struct Stacks {
    /// By stack: the thread's name, then functions from the outermost to the innermost, separated
    /// by semicolons.
    counts: BTreeMap<String, u64>,
}

impl Stacks {
    /// Number of samples.
    pub fn samples(&self) -> u64 {
        self.counts.values().sum()
    }

    /// The collapsed form of flamegraph tools: one line per stack, with its count at the end.
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
    /// If it cannot be drawn.
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
<text x="600" y="32">No samples: this process used almost no CPU time.</text>
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
