//! Where a figure comes from, and what the kernel counts for a process.

use std::path::Path;
use std::process::Command;

use anyhow::Context;

/// The commit, with a plus where the tree has changes.
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let done = Command::new("git").args(arguments).output().ok()?;
        done.status
            .success()
            .then(|| String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    let head = git(&["rev-parse", "--short", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|it| !it.is_empty());
    if changed { format!("{head}+") } else { head }
}

/// Cores, their kind, and memory.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let read = |file| std::fs::read_to_string(file).unwrap_or_default();
    let model = read("/proc/cpuinfo");
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, name)| name.trim());
    let memory = read("/proc/meminfo");
    let gib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|text| text.trim().split(' ').next()?.parse::<f64>().ok())
        .map_or(0.0, |kib| kib / 1024.0 / 1024.0);
    format!("{cores} cores of {model}, {gib:.0} GiB")
}

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Seconds of processor time.
    pub cpu_seconds: f64,
    /// Times that one of its threads gave a core up or was taken off it.
    pub switches: u64,
    /// Resident bytes now.
    pub resident_bytes: u64,
    /// Open descriptors now.
    pub descriptors: u64,
}

/// Reads it from `/proc`.
///
/// # Errors
/// Where there is no such process, or no `/proc`.
pub fn usage(pid: u32) -> anyhow::Result<Usage> {
    let root = format!("/proc/{pid}");
    let root = Path::new(&root);
    let stat = std::fs::read_to_string(root.join("stat")).context("the process has ended")?;
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace()
        .collect();
    // utime and stime, in hundredths of a second (proc(5)).
    let ticks = |at: usize| {
        fields
            .get(at)
            .and_then(|text| text.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    let mut switches = 0;
    for task in std::fs::read_dir(root.join("task"))? {
        let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else {
            continue;
        };
        switches += status
            .lines()
            .filter(|line| line.contains("ctxt_switches"))
            .filter_map(|line| line.rsplit('\t').next()?.trim().parse::<u64>().ok())
            .sum::<u64>();
    }
    let status = std::fs::read_to_string(root.join("status"))?;
    let resident_kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|text| text.trim().split(' ').next()?.parse::<u64>().ok())
        .unwrap_or(0);
    Ok(Usage {
        cpu_seconds: (ticks(11) + ticks(12)) / 100.0,
        switches,
        resident_bytes: resident_kib << 10,
        descriptors: std::fs::read_dir(root.join("fd"))?.count() as u64,
    })
}
