//! The file system's interface, as a trait: tests replace it with a disk that tears, reorders and
//! fails.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory that belongs to one journal.
pub trait Disk: Send + Sync + fmt::Debug {
    /// The names in the directory, in no particular order.
    ///
    /// # Errors
    /// The error of the file system; the same for every method here.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Creates an empty file. It replaces a file of the same name.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Opens an existing file.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;

    /// Renames a file. Durable after [`Disk::sync_directory`].
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

/// One file. A caller writes each offset once and reads only its own writes.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Its length in bytes.
    ///
    /// # Errors
    /// See [`Disk::list`].
    fn length(&self) -> io::Result<u64>;

    /// Reserves the first `bytes` bytes on the disk, so that writing them cannot find it full.
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
    /// See [`Disk::list`]; `UnexpectedEof` if the file is too short.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Returns once everything written so far is on the disk (`fdatasync`).
    ///
    /// # Errors
    /// See [`Disk::list`]. The data may or may not be durable after an error, and another call may
    /// falsely succeed: the kernel marks the pages clean when it reports the error once ("Can
    /// Applications Recover from fsync Failures?", Rebello et al., 2020).
    fn sync(&self) -> io::Result<()>;
}

/// Creates `directory` and its missing parents. After this returns, every name on its path survives
/// a power loss, even a name created by a process that was killed before it could sync.
///
/// # Errors
/// See [`Disk::list`].
pub fn make_directory(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    // A relative path has parents that it does not name.
    sync_names(&directory.canonicalize()?, |parent| {
        File::open(parent)?.sync_all()
    })
}

/// Syncs every ancestor directory of an absolute path.
fn sync_names(path: &Path, mut sync: impl FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    for parent in path.ancestors().skip(1) {
        match sync(parent) {
            // The directory belongs to another user, with its content; or it cannot be synced.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput
                ) => {}
            other => other?,
        }
    }
    Ok(())
}

/// A directory of the real file system, locked against other processes.
#[derive(Debug)]
pub struct RealDisk {
    directory: PathBuf,
    /// The lock is released when this is dropped. `None`: read only.
    _lock: Option<File>,
}

impl RealDisk {
    /// Name of the file that is locked while a process uses the directory.
    pub const LOCK: &str = "lock";

    /// `directory` without a lock, read only: another process may be writing there.
    pub fn unlocked(directory: &Path) -> Self {
        RealDisk {
            directory: directory.to_owned(),
            _lock: None,
        }
    }

    /// Locks `directory`, and creates it if missing. `None`: another process uses it.
    ///
    /// # Errors
    /// If it cannot be created or locked.
    pub fn lock(directory: &Path) -> io::Result<Option<Self>> {
        make_directory(directory)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_on_the_way_to_a_directory_is_synced() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("a/b/c");
        make_directory(&directory).unwrap();
        assert!(directory.is_dir());
        let mut synced = Vec::new();
        sync_names(&directory.canonicalize().unwrap(), |parent| {
            synced.push(parent.to_owned());
            match parent.parent() {
                Some(_) => Ok(()),
                // Root's directories look like this to most users.
                None => Err(io::ErrorKind::PermissionDenied.into()),
            }
        })
        .unwrap();
        let base = base.path().canonicalize().unwrap();
        for parent in [base.join("a/b"), base.join("a"), base] {
            assert!(synced.contains(&parent), "{}", parent.display());
        }
        assert!(synced.contains(&PathBuf::from("/")));
        let failed = sync_names(&directory, |_| Err(io::Error::other("EIO")));
        assert!(failed.is_err(), "what is not synced is not promised");
    }
}
