//! The time that an append to the journal takes, measured in a file of its own beside the segments.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::disk::{Disk, RealDisk};
use super::sector::SECTOR;
use super::segment::UNFINISHED;

/// Writes one sector `count` times, each followed by the same sync as a group's, one begun every `pace`, for at
/// most `longest`. The file is prepared as a segment is, and removed afterwards; one that a killed process leaves
/// is removed by the next start, as an unfinished segment.
///
/// # Errors
/// If the disk is full or fails.
pub fn appends(
    directory: &Path,
    count: u32,
    pace: Duration,
    longest: Duration,
) -> io::Result<Vec<Duration>> {
    // Before the first start there is no journal yet.
    let directory = std::path::absolute(directory)?;
    let there = directory.ancestors().find(|directory| directory.is_dir());
    let disk = RealDisk::unlocked(there.unwrap_or(&directory));
    let name = format!("preflight{UNFINISHED}");
    let measured = measure(&disk, &name, count, pace, longest);
    match disk.remove(&name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => measured,
    }
}

fn measure(
    disk: &dyn Disk,
    name: &str,
    count: u32,
    pace: Duration,
    longest: Duration,
) -> io::Result<Vec<Duration>> {
    let file = disk.create(name)?;
    let bytes = u64::from(count) * SECTOR as u64;
    file.allocate(bytes)?;
    file.write_at(&vec![0; bytes as usize], 0)?;
    file.sync()?;
    let (began, mut took) = (Instant::now(), Vec::new());
    for at in 0..u64::from(count) {
        let started = Instant::now();
        file.write_at(&[0x5a; SECTOR], at * SECTOR as u64)?;
        file.sync()?;
        took.push(started.elapsed());
        if began.elapsed() > longest {
            break;
        }
        std::thread::sleep(pace.saturating_sub(started.elapsed()));
    }
    Ok(took)
}
