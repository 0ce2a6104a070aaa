//! Where the cluster and its socket live.
//!
//! ```text
//! data_dir/postgres/               the home; as root: owned by root, so nobody swaps its parts
//!   lock                           held while a Millrace manages the cluster
//!   millrace-cluster.json          the marker: Millrace made `data`
//!   server.log, server.log.1      what the server says
//!   data/                          PGDATA, owned by the server's user, 0700
//!   run/                           the socket, owned by the server's user, 0700
//! data_dir/postgres.location       instead of the above: the path of a home elsewhere
//! ```
//!
//! As root the server is another user, who may not enter every `data_dir` (`/root` is 0700). The
//! home then is a directory below `/var/lib/millrace`, and a pointer stays in `data_dir`. A
//! directory that Millrace did not make is never opened further.

use std::{
    fs::{DirBuilder, Permissions},
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{
    error::{EmbeddedError, io},
    user::ServerUser,
};

/// The longest socket path: `sun_path` of the system less its terminating zero.
const SOCKET_PATH_MAX: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// The name PostgreSQL gives its socket. The port is only part of that name.
const SOCKET_NAME: &str = ".s.PGSQL.5432";

/// The directory of one cluster and everything that belongs to it.
#[derive(Debug, Clone)]
pub(super) struct Home {
    /// The directory itself, absolute, links resolved.
    pub dir: PathBuf,
    /// The pointer that names it, where it is not below `data_dir`.
    pub pointer: Option<PathBuf>,
    /// The server's user.
    pub user: ServerUser,
}

/// The file of `data_dir` that names the home of a cluster that lives elsewhere.
const POINTER: &str = "postgres.location";

impl Home {
    /// Whether `data_dir` has a home already, with or without a cluster in it.
    pub fn is_there(data_dir: &Path) -> bool {
        data_dir.join(POINTER).exists() || data_dir.join("postgres").exists()
    }

    /// Finds the home of `data_dir`, or makes one that the server's user may enter.
    pub fn find_or_make(data_dir: &Path, fallback_root: &Path) -> Result<Self, EmbeddedError> {
        let root = rustix::process::geteuid().is_root();
        if !data_dir.exists() {
            // Others may pass through a directory that root makes, and see nothing in it.
            make_dirs(data_dir, if root { 0o711 } else { 0o700 })?;
        }
        let data_dir = data_dir
            .canonicalize()
            .map_err(io("find the real path of", data_dir))?;

        let pointer = data_dir.join(POINTER);
        match std::fs::read(&pointer) {
            Ok(bytes) => return Self::elsewhere(pointer, &bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io("read", &pointer)(error)),
        }

        let dir = data_dir.join("postgres");
        let user = ServerUser::of_cluster(&dir.join("data"))?;
        let made = make_dir(&dir, if root { 0o755 } else { 0o700 })?;
        if user.may_enter(&dir) {
            return Ok(Self {
                dir,
                pointer: None,
                user,
            });
        }
        if !made {
            // Something lives here. A second, empty cluster elsewhere would look like lost data.
            return Err(not_enterable(dir, &user));
        }
        std::fs::remove_dir(&dir).map_err(io("remove", &dir))?;
        if !user.is_other() {
            return Err(not_enterable(dir, &user));
        }
        let dir = make_fallback(&data_dir, fallback_root, &user)?;
        write_atomically(&pointer, dir.as_os_str().as_bytes())?;
        Ok(Self {
            dir,
            pointer: Some(pointer),
            user,
        })
    }

    fn elsewhere(pointer: PathBuf, bytes: &[u8]) -> Result<Self, EmbeddedError> {
        let name = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let target = PathBuf::from(std::ffi::OsStr::from_bytes(name));
        if !target.is_absolute() || !target.is_dir() {
            return Err(EmbeddedError::PointerBroken { pointer, target });
        }
        let user = ServerUser::of_cluster(&target.join("data"))?;
        trusted(&target, &user)?;
        if !user.may_enter(&target) {
            return Err(not_enterable(target, &user));
        }
        Ok(Self {
            dir: target,
            pointer: Some(pointer),
            user,
        })
    }

    /// PGDATA.
    pub fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// What the server says.
    pub fn log(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    /// A directory that only the server's user and root can enter, short enough for a socket.
    pub fn socket_dir(&self) -> Result<SocketDir, EmbeddedError> {
        let inside = self.dir.join("run");
        if fits(&inside) {
            make_private(&inside, &self.user)?;
            return Ok(SocketDir {
                path: inside,
                temporary: false,
            });
        }
        let name = format!("millrace-{}", hash(&self.dir));
        let mut tried = inside;
        for parent in [std::env::temp_dir(), PathBuf::from("/tmp")] {
            for attempt in 0..10 {
                // Anyone may have taken a name in a shared directory: then the next one.
                let path = match attempt {
                    0 => parent.join(&name),
                    n => parent.join(format!("{name}-{n}")),
                };
                if fits(&path)
                    && make_private(&path, &self.user).is_ok()
                    && self.user.may_enter(&path)
                {
                    return Ok(SocketDir {
                        path,
                        temporary: true,
                    });
                }
                tried = path;
            }
        }
        Err(EmbeddedError::SocketPath {
            tried,
            limit: SOCKET_PATH_MAX - SOCKET_NAME.len() - 1,
        })
    }
}

/// The directory of the socket.
#[derive(Debug)]
pub(super) struct SocketDir {
    pub path: PathBuf,
    /// Below the system's temporary directory, to be removed in the end.
    temporary: bool,
}

impl SocketDir {
    /// Leaves the directory to a server that goes on.
    pub fn keep(&mut self) {
        self.temporary = false;
    }

    /// The file with which PostgreSQL keeps others off its socket.
    pub fn lock_file(&self) -> PathBuf {
        self.path.join(format!("{SOCKET_NAME}.lock"))
    }

    /// Tidies up once the server is gone; best effort, since the next start copes with what is
    /// left.
    pub fn tidy(&self) {
        if self.temporary {
            let _ = std::fs::remove_file(self.path.join(SOCKET_NAME));
            let _ = std::fs::remove_file(self.lock_file());
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

fn fits(dir: &Path) -> bool {
    dir.as_os_str().len() + 1 + SOCKET_NAME.len() <= SOCKET_PATH_MAX
}

fn not_enterable(dir: PathBuf, user: &ServerUser) -> EmbeddedError {
    EmbeddedError::NotEnterable {
        dir,
        user: user.name.clone(),
    }
}

/// A new home below the fallback root, named after the canonical `data_dir`.
fn make_fallback(
    data_dir: &Path,
    root: &Path,
    user: &ServerUser,
) -> Result<PathBuf, EmbeddedError> {
    make_dirs(root, 0o755)?;
    let root = root
        .canonicalize()
        .map_err(io("find the real path of", root))?;
    trusted(&root, user)?;
    let name = hash(data_dir);
    for attempt in 1..1000 {
        let dir = match attempt {
            1 => root.join(&name),
            n => root.join(format!("{name}-{n}")),
        };
        if !make_dir(&dir, 0o755)? {
            // Its `data_dir` was removed together with the pointer, so a fresh start is wanted;
            // the old database is not ours to delete. An empty one is left from a crash.
            let empty = std::fs::read_dir(&dir)
                .map_err(io("list", &dir))?
                .next()
                .is_none();
            if !empty {
                tracing::warn!(
                    directory = %dir.display(),
                    "a database of an earlier data_dir of this path is still here; remove it if it is not needed"
                );
                continue;
            }
        }
        trusted(&dir, user)?;
        if user.may_enter(&dir) {
            return Ok(dir);
        }
        std::fs::remove_dir(&dir).map_err(io("remove", &dir))?;
        break;
    }
    Err(not_enterable(data_dir.to_owned(), user))
}

/// Refuses a directory whose content somebody else could swap under Millrace.
fn trusted(dir: &Path, user: &ServerUser) -> Result<(), EmbeddedError> {
    let meta = std::fs::symlink_metadata(dir).map_err(io("look at", dir))?;
    let own = rustix::process::geteuid().as_raw();
    if meta.is_dir() && meta.uid() == own && meta.mode() & 0o022 == 0 {
        return Ok(());
    }
    Err(EmbeddedError::Unsafe {
        dir: dir.to_owned(),
        user: user.name.clone(),
    })
}

/// Makes `dir` 0700 and the server's user's, or accepts it where it is exactly that already.
pub(super) fn make_private(dir: &Path, user: &ServerUser) -> Result<(), EmbeddedError> {
    if make_dir(dir, 0o700)? {
        return user.give(dir);
    }
    let meta = std::fs::symlink_metadata(dir).map_err(io("look at", dir))?;
    let own = rustix::process::geteuid().as_raw();
    if meta.is_dir() && meta.mode() & 0o077 == 0 && (meta.uid() == user.uid || meta.uid() == own) {
        // Ours, from a start that was killed between making and giving it.
        return if meta.uid() == user.uid {
            Ok(())
        } else {
            user.give(dir)
        };
    }
    Err(EmbeddedError::Unsafe {
        dir: dir.to_owned(),
        user: user.name.clone(),
    })
}

/// Makes `dir` with exactly this mode, whatever the umask; false if there is something already.
fn make_dir(dir: &Path, mode: u32) -> Result<bool, EmbeddedError> {
    match DirBuilder::new().mode(mode).create(dir) {
        Ok(()) => {
            std::fs::set_permissions(dir, Permissions::from_mode(mode))
                .map_err(io("set the mode of", dir))?;
            sync_dir_of(dir)?;
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(io("create", dir)(error)),
    }
}

/// Makes `dir` and its missing parents, each with this mode.
fn make_dirs(dir: &Path, mode: u32) -> Result<(), EmbeddedError> {
    if let Some(parent) = dir.parent()
        && !parent.as_os_str().is_empty()
        && !parent.exists()
    {
        make_dirs(parent, mode)?;
    }
    make_dir(dir, mode).map(|_| ())
}

/// Sixteen hexadecimal digits of a path: the same on every start.
fn hash(path: &Path) -> String {
    Sha256::digest(path.as_os_str().as_bytes())
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// How the files of a home are opened: never through a link. The home of a user's cluster is that
/// user's, and root must not write where a link in it leads.
pub(super) fn open_options() -> std::fs::OpenOptions {
    let mut options = std::fs::File::options();
    options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed());
    options
}

/// Writes a small file so that a crash leaves the old content or the new, and never a part.
pub(super) fn write_atomically(path: &Path, content: &[u8]) -> Result<(), EmbeddedError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = open_options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&temporary)
        .map_err(io("create", &temporary))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(io("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(io("create", path))?;
    sync_dir_of(path)
}

/// Makes a name that was made, or changed, in `path`'s directory outlive a power loss.
pub(super) fn sync_dir_of(path: &Path) -> Result<(), EmbeddedError> {
    match path.parent() {
        Some(dir) if dir.as_os_str().is_empty() => sync_dir_of(&Path::new(".").join(path)),
        Some(dir) => std::fs::File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(io("sync", dir)),
        None => Ok(()),
    }
}
