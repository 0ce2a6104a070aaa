//! Sampling with `pprof`, whose signal handler walks the stack of the interrupted thread.
//!
//! The handler may interrupt anything: the allocator, the loader, the small stack of a coroutine,
//! or a switch between coroutines. It must therefore neither lock nor allocate nor read memory that
//! may be unmapped. `pprof` offers three unwinders:
//!
//! * libgcc's unwinder takes the loader's lock and reads unchecked memory: it has stopped and crashed
//!   profiled servers;
//! * frame pointers need a build of their own, leave out the interrupted function, and follow any
//!   value that C code keeps in that register;
//! * `framehop` reads unwind tables, those of C libraries too. It copies them beforehand, allocates
//!   nothing while walking, and has the kernel check every word of a stack first. A coroutine's first
//!   frame returns to address 0, where the walk ends.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, raise};
use pprof::flamegraph::color::{MultiPalette, Palette};
use pprof::flamegraph::{Options, from_lines};
use pprof::{Frames, ProfilerGuard, ProfilerGuardBuilder};

use super::ProfileError;

/// Libraries in which no sample is taken. Unwinding an exception and loading a library hold locks
/// that older C libraries also take to find the function of an address, which `pprof` asks of them
/// to count equal stacks.
const BLOCKED: [&str; 2] = ["libgcc_s", "ld-linux"];

/// A rate that makes `pprof`'s interval 0 µs, which leaves the timer off.
const NEVER: c_int = c_int::MAX;

/// Samples until it is dropped.
pub(super) struct Sampler(ProfilerGuard<'static>);

impl Sampler {
    /// Needs the [`super::Place`], and a thread that may block.
    pub(super) fn start(hz: u16) -> Result<Self, ProfileError> {
        prepare()?;
        guard(c_int::from(hz)).map(Sampler)
    }

    /// Stops sampling and counts equal stacks.
    pub(super) fn stacks(self) -> Result<BTreeMap<String, u64>, ProfileError> {
        let report = self.0.report().build_unresolved().map_err(failed)?;
        // Stopped first: looking up names takes a while, and would be most of the samples.
        drop(self);
        let mut counts = BTreeMap::new();
        for (stack, count) in report.data {
            let count = u64::try_from(count).unwrap_or(0);
            *counts.entry(folded(&Frames::from(stack))).or_default() += count;
        }
        // The debug information of the whole program: 84 MiB of file pages, and what was parsed of it.
        backtrace::clear_symbol_cache();
        Ok(counts)
    }
}

/// Takes a first sample at a safe moment, so that the unwind tables are read: `pprof` 0.15 reads
/// them in the handler, where a sample that interrupts the allocator would damage it.
fn prepare() -> Result<(), ProfileError> {
    // The caller's `Place` orders the accesses.
    static PREPARED: AtomicBool = AtomicBool::new(false);
    if !PREPARED.load(Ordering::Relaxed) {
        let _listening = guard(NEVER)?;
        // The signal is delivered to this thread before `raise` returns.
        raise(Signal::SIGPROF).map_err(|e| ProfileError::Failed(e.to_string()))?;
        PREPARED.store(true, Ordering::Relaxed);
    }
    Ok(())
}

fn guard(hz: c_int) -> Result<ProfilerGuard<'static>, ProfileError> {
    ProfilerGuardBuilder::default()
        .frequency(hz)
        .blocklist(&BLOCKED)
        .build()
        .map_err(failed)
}

fn failed(error: pprof::Error) -> ProfileError {
    ProfileError::Failed(error.to_string())
}

/// A stack as one line of the collapsed form: the thread first, the innermost function last.
fn folded(frames: &Frames) -> String {
    let mut stack = word(&frames.thread_name_or_id());
    // The kernel's code page for reading the clock has neither names nor tables.
    if frames.frames.iter().all(Vec::is_empty) {
        stack.push_str(";[unknown]");
    }
    for symbol in frames.frames.iter().rev().flat_map(|one| one.iter().rev()) {
        let name = symbol.name();
        let name = without_arguments(&name);
        stack.push(';');
        // For inlined functions the tables of a release have only the bare name and the file.
        if !name.contains("::") && !name.starts_with('<') {
            stack.push_str(&module(&symbol.filename()));
        }
        stack.push_str(&word(name));
    }
    stack
}

/// A name without the separators of frames and lines; `[u8; 4]` occurs in names of functions too.
fn word(name: &str) -> String {
    name.replace(';', ":").replace(['\n', '\r'], " ")
}

/// A function's name without its own generic arguments, which may fill pages.
fn without_arguments(name: &str) -> &str {
    if !name.ends_with('>') {
        return name;
    }
    let mut depth = 0_u32;
    for (at, byte) in name.bytes().enumerate().rev() {
        match byte {
            // The end of an arrow.
            b'>' if at > 0 && matches!(name.as_bytes().get(at - 1), Some(b'-')) => {}
            b'>' => depth += 1,
            b'<' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 && byte == b'<' {
            let before = name.get(..at).unwrap_or(name);
            return if before.is_empty() { name } else { before };
        }
    }
    name
}

/// The module of a source file, as the beginning of a path; empty if unknown.
fn module(file: &str) -> String {
    let own = file.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/src/"));
    let (krate, inside) = match (own, file.rsplit_once("/src/")) {
        (Some(inside), _) => ("millrace", inside),
        (None, Some((before, inside))) => {
            let folder = before.rsplit('/').next().unwrap_or(before);
            // Folders of registry crates end with the version.
            let named = folder
                .rsplit_once('-')
                .filter(|(_, version)| version.starts_with(|first: char| first.is_ascii_digit()));
            (named.map_or(folder, |(name, _)| name), inside)
        }
        (None, None) => return String::new(),
    };
    let Some(inside) = inside.strip_suffix(".rs") else {
        return String::new();
    };
    let mut path = krate.replace('-', "_");
    for part in inside
        .split('/')
        .filter(|part| !matches!(*part, "mod" | "lib"))
    {
        path.push_str("::");
        path.push_str(part);
    }
    path + "::"
}

pub(super) fn draw(folded: &str, subtitle: &str) -> Result<Vec<u8>, ProfileError> {
    let mut options = Options::default();
    options.title = "Millrace: processor time".to_owned();
    options.subtitle = Some(subtitle.to_owned());
    options.colors = Palette::Multi(MultiPalette::Rust);
    // A function has the same colour in every picture.
    options.deterministic = true;
    let mut svg = Vec::new();
    from_lines(&mut options, folded.lines(), &mut svg)
        .map_err(|e| ProfileError::Failed(e.to_string()))?;
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_short_and_whole() {
        assert_eq!(without_arguments("poll<A<fn() -> B>, C>"), "poll");
        assert_eq!(without_arguments("a::<B>::c"), "a::<B>::c");
        assert_eq!(without_arguments("<a::B as C<D>>"), "<a::B as C<D>>");
        assert_eq!(word("[u8; 4]"), "[u8: 4]");
        let own = concat!(env!("CARGO_MANIFEST_DIR"), "/src/pipeline/orders/worker.rs");
        assert_eq!(module(own), "millrace::pipeline::orders::worker::");
        let other = "/home/me/.cargo/registry/src/index/tokio-postgres-0.7.1/src/copy/mod.rs";
        assert_eq!(module(other), "tokio_postgres::copy::");
        assert_eq!(module("/rustc/0/library/core/src/lib.rs"), "core::");
        assert_eq!(module("/build/glibc/recv.c"), "");
    }

    #[test]
    fn a_stack_without_names_is_still_a_stack() {
        for frames in [vec![], vec![vec![]]] {
            let frames = Frames {
                frames,
                thread_name: "millrace".to_owned(),
                thread_id: 1,
                sample_timestamp: std::time::SystemTime::UNIX_EPOCH,
            };
            assert_eq!(folded(&frames), "millrace;[unknown]");
        }
    }
}
