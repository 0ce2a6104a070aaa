//! What the journal asks of a file system. Behind a trait, so that the tests can put a disk there
//! that tears, reorders and fails.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One directory that belongs to a journal alone.
pub trait Disk: Send + Sync + fmt::Debug {
    /// The names in the directory, in no particular order.
    ///
    /// # Errors
    /// As the file system says; so everywhere here.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Makes a new, empty file; an older one of this name is replaced.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Opens a file that is there.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Gives a file another name. Durable after [`Disk::sync_directory`].
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes the names in the directory durable.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn sync_directory(&self) -> io::Result<()>;
}

/// One file. A caller writes each place once and reads only what it wrote.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Its length in bytes.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn length(&self) -> io::Result<u64>;

    /// Reserves its first `bytes` bytes on the disk, so that writing them cannot find it full.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn allocate(&self, bytes: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// See [`Disk::list`]; `UnexpectedEof` where the file is too short.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Returns once everything written so far is on the disk (`fdatasync`).
    ///
    /// # Errors
    /// See [`Disk::list`]. What was written may or may not be durable then, and another call may
    /// lie about it: the kernel marks the pages clean when it reports the error once ("Can
    /// Applications Recover from fsync Failures?", Rebello et al., 2020).
    fn sync(&self) -> io::Result<()>;
}

/// A directory of the real file system, locked against other processes.
#[derive(Debug)]
pub struct RealDisk {
    directory: PathBuf,
    /// Its lock goes with it. `None`: only read.
    _lock: Option<File>,
}

impl RealDisk {
    /// The name of the file that is locked while a process uses the directory.
    pub const LOCK: &str = "lock";

    /// `directory` without a lock, to be read only: another process may be writing there.
    pub fn unlocked(directory: &Path) -> Self {
        RealDisk {
            directory: directory.to_owned(),
            _lock: None,
        }
    }

    /// Locks `directory`, which is made where it is missing. `None`: another process uses it.
    ///
    /// # Errors
    /// Where it cannot be made or locked.
    pub fn lock(directory: &Path) -> io::Result<Option<Self>> {
        std::fs::create_dir_all(directory)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(directory.join(Self::LOCK))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Ok(None),
            Err(std::fs::TryLockError::Error(error)) => return Err(error),
        }
        // The directory's own name has to survive a power loss as well.
        if let Some(parent) = directory.parent().filter(|p| !p.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
        Ok(Some(RealDisk {
            directory: directory.to_owned(),
            _lock: Some(lock),
        }))
    }
}

impl Disk for RealDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        std::fs::read_dir(&self.directory)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.directory.join(name))?;
        Ok(Arc::new(RealFile(file)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = File::open(self.directory.join(name))?;
        Ok(Arc::new(RealFile(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.directory.join(from), self.directory.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.directory.join(name))
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }
}

#[derive(Debug)]
struct RealFile(File);

impl DiskFile for RealFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{FallocateFlags, fallocate};
            match fallocate(&self.0, FallocateFlags::empty(), 0, bytes) {
                Ok(()) => return Ok(()),
                // Some file systems cannot; then the zeros that follow reserve the space.
                Err(rustix::io::Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.0.set_len(bytes)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn sync(&self) -> io::Result<()> {
        // On macOS the standard library uses F_FULLFSYNC here.
        self.0.sync_data()
    }
}
