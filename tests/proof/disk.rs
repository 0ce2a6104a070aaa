//! A disk whose power can be cut: ext4 on a loop device.
//!
//! The cut is ext4's own shutdown, an `ioctl` after which nothing reaches the disk any more: what was
//! not synced before is gone, the journal of the file system included. `rustix` offers `ioctl` only
//! as `unsafe`, because it cannot know each driver's protocol; hence the one use of it in this file.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;

/// `EXT4_IOC_SHUTDOWN`, which is `_IOR('X', 125, __u32)`: fs/ext4/ext4.h of Linux.
const EXT4_IOC_SHUTDOWN: rustix::ioctl::Opcode = 0x8004_587D;

/// `EXT4_GOING_FLAGS_NOLOGFLUSH`: not even the file system's journal is written out.
const NO_LOG_FLUSH: u32 = 2;

const PREFIX: &str = "millrace-power-";

/// How long a file system may stay busy after everything on it was killed.
const PATIENCE: Duration = Duration::from_secs(20);

/// A mounted disk. Dropped, it is unmounted and erased, whatever is on it.
pub struct Disk {
    image: PathBuf,
    at: PathBuf,
    _dir: TempDir,
}

impl Disk {
    /// Makes and mounts one. An error says what this machine lacks.
    pub fn make(bytes: u64) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("mounting needs root".to_owned());
        }
        remove_orphans();
        let dir = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .tempdir()
            .map_err(|e| format!("no temporary directory: {e}"))?;
        // PostgreSQL runs as another user than root, and has to come through.
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755))
            .map_err(|e| format!("no temporary directory: {e}"))?;
        let disk = Disk {
            image: dir.path().join("image"),
            at: dir.path().join("disk"),
            _dir: dir,
        };
        std::fs::create_dir(&disk.at).map_err(|e| format!("no place to mount at: {e}"))?;
        File::create(&disk.image)
            .and_then(|image| image.set_len(bytes))
            .map_err(|e| format!("no image of {bytes} bytes: {e}"))?;
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(&disk.image))?;
        disk.mount()?;
        Ok(disk)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Mounts it again after [`Disk::unmount`]; ext4 replays its journal then.
    pub fn mount(&self) -> Result<(), String> {
        // Such a loop device goes by itself with the mount.
        run(Command::new("mount")
            .args(["-t", "ext4", "-o", "loop"])
            .args([&self.image, &self.at]))
    }

    /// Writes out everything, as a machine does that has been running for a while.
    pub fn sync(&self) -> Result<(), String> {
        let root = File::open(&self.at).map_err(|e| format!("cannot open the disk: {e}"))?;
        rustix::fs::syncfs(&root).map_err(|e| format!("cannot sync the disk: {e}"))
    }

    /// Cuts the power. From here on every read and write of a file on it fails.
    pub fn cut_power(&self) -> Result<(), String> {
        let root = File::open(&self.at).map_err(|e| format!("cannot open the disk: {e}"))?;
        // SAFETY: the driver reads one `__u32` through the pointer that a `Setter` hands it, and
        // the file is a directory of an ext4 that we mounted; others do not know this opcode and
        // answer ENOTTY.
        let cut = unsafe {
            let shutdown = rustix::ioctl::Setter::<EXT4_IOC_SHUTDOWN, u32>::new(NO_LOG_FLUSH);
            rustix::ioctl::ioctl(&root, shutdown)
        };
        cut.map_err(|e| format!("ext4 cannot be shut down: {e}"))
    }

    /// The processes that have their working directory on it: those of PostgreSQL do.
    pub fn processes(&self) -> Vec<Pid> {
        at_home(&self.at)
    }

    /// Unmounts it, once nothing uses it any more.
    pub fn unmount(&self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match run(Command::new("umount").arg(&self.at)) {
                Ok(()) => return Ok(()),
                Err(why) if Instant::now() >= deadline => return Err(why),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        erase(&self.at);
    }
}

/// Ends what is at home on the file system that is mounted here, and unmounts it.
fn erase(at: &Path) {
    if !is_mounted(at) {
        return;
    }
    // A PostgreSQL whose millrace was killed: all of its processes have their cluster as working
    // directory.
    for pid in at_home(at) {
        let _ = kill_process(pid, Signal::KILL);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if run(Command::new("umount").arg(at)).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = run(Command::new("umount").arg("-l").arg(at));
}

/// Unmounts the disks of processes that were killed, such as by a Ctrl-C.
fn remove_orphans() {
    let Ok(entries) = std::fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok())
            .and_then(Pid::from_raw);
        let dead =
            owner.is_some_and(|owner| test_kill_process(owner) == Err(rustix::io::Errno::SRCH));
        if !dead {
            continue;
        }
        let at = entry.path().join("disk");
        erase(&at);
        if !is_mounted(&at) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn is_mounted(at: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(1) == at.to_str())
}

/// The processes with a working directory below this one.
fn at_home(at: &Path) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| {
            std::fs::read_link(entry.path().join("cwd")).is_ok_and(|home| home.starts_with(at))
        })
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

/// Runs a program; an error is what it said.
fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| format!("{name}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name}: {}", said.trim()))
}
