//! The disk of a process: calls take time, fail now and then, and come to nothing once the process is dead.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use millrace::queue::log::file::disk::{Disk, DiskFile};
use rand::Rng;
use rand::rngs::StdRng;

use super::here;
use crate::sim_disk::{Call, Crash, Failure, Replay, SimDisk};

/// The files of a machine, by their names.
pub type Files = BTreeMap<String, Vec<u8>>;

/// A disk in the hands of one process.
#[derive(Clone, Debug)]
pub struct LivingDisk {
    disk: SimDisk,
    before: Arc<Files>,
    is_dead: Arc<AtomicBool>,
    /// How long a sync takes, in milliseconds.
    sync_ms: Arc<AtomicU64>,
}

impl LivingDisk {
    /// A disk with these files.
    pub fn with(files: Files) -> Self {
        LivingDisk {
            disk: SimDisk::with(&files),
            before: Arc::new(files),
            is_dead: Arc::default(),
            sync_ms: Arc::new(AtomicU64::new(1)),
        }
    }

    /// The process is dead. Returns what it leaves behind.
    pub fn crash(&self, crash: Crash, random: &mut StdRng) -> Files {
        self.is_dead.store(true, Ordering::SeqCst);
        let mut replay = Replay::with(&self.before);
        self.disk.done().iter().for_each(|done| replay.step(done));
        replay.crash(crash, random)
    }

    /// The next call of this kind fails.
    pub fn fail(&self, call: Call, errno: i32) {
        self.disk.fail(Failure {
            call,
            nth: 1,
            sticky: false,
            errno,
        });
    }

    /// Nothing fails any more.
    pub fn mend(&self) {
        self.disk.mend();
        self.sync_ms.store(1, Ordering::SeqCst);
    }

    pub fn set_sync_ms(&self, ms: u64) {
        self.sync_ms.store(ms, Ordering::SeqCst);
    }

    fn take_time(&self, ms: u64) -> io::Result<()> {
        if ms > 0 {
            here(|world| world.sleep_here(Duration::from_millis(ms)));
        }
        if self.is_dead.load(Ordering::SeqCst) {
            return Err(io::Error::other("the process is dead"));
        }
        Ok(())
    }
}

impl Disk for LivingDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.take_time(1)?;
        let file = self.disk.create(name)?;
        Ok(Arc::new(LivingFile(self.clone(), file)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.open(name)?;
        Ok(Arc::new(LivingFile(self.clone(), file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.take_time(1)?;
        self.disk.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.take_time(1)?;
        self.disk.remove(name)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.take_time(self.sync_ms.load(Ordering::SeqCst))?;
        self.disk.sync_directory()
    }
}

#[derive(Debug)]
struct LivingFile(LivingDisk, Arc<dyn DiskFile>);

impl DiskFile for LivingFile {
    fn length(&self) -> io::Result<u64> {
        self.1.length()
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.0.take_time(0)?;
        self.1.allocate(bytes)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.take_time(1)?;
        self.1.write_at(bytes, offset)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.1.read_at(buffer, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.take_time(self.0.sync_ms.load(Ordering::SeqCst))?;
        let synced = self.1.sync();
        // A sync that has returned to nobody.
        self.0.take_time(0)?;
        synced
    }
}

/// A moment at which a disk fails: the call, and the error of the system.
pub fn any_failure(random: &mut StdRng) -> (Call, i32) {
    let (eio, enospc) = (5, 28);
    match random.random_range(0..6) {
        0 => (Call::Write, eio),
        1 => (Call::Sync, eio),
        2 => (Call::Create, enospc),
        3 => (Call::Allocate, enospc),
        4 => (Call::Remove, eio),
        _ => (Call::Read, eio),
    }
}
