//! Making a cluster, and knowing it again.
//!
//! The marker beside PGDATA holds the cluster's system identifier, and its appearance is the
//! point from which the cluster exists:
//!
//! ```text
//! (nothing) ── initdb ──► data.initdb ── marker ──► marker + data.initdb ── rename ──► marker + data
//!     ▲                        │                                                  (ready)
//!     └──── killed: redone ────┘
//! ```
//!
//! So a PGDATA without a marker, or with another identifier, was made by somebody else.

use std::{
    fs::{File, TryLockError},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    process::Stdio,
};

use serde::{Deserialize, Serialize};

use super::{
    binaries::Installation,
    error::{EmbeddedError, io},
    place::{Home, make_private, open_options, sync_dir_of, write_atomically},
};

/// The superuser of the cluster.
pub(super) const SUPERUSER: &str = "millrace";

const MARKER: &str = "millrace-cluster.json";

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    made_by: String,
    millrace_version: String,
    postgres_version: String,
    created: String,
    /// PostgreSQL's own random name of the cluster, as a string: it needs all 64 bits.
    system_identifier: String,
}

/// What was found in a home.
#[derive(Debug)]
pub(super) enum Found {
    /// Millrace's cluster, of this major version.
    Ours { major: u32 },
    /// Nothing, or an unfinished `initdb` of ours.
    Nothing,
}

/// Takes the lock of a home, for as long as the file is kept open. The kernel releases it however
/// this process ends, and the server does not inherit it.
pub(super) fn lock(home: &Home) -> Result<File, EmbeddedError> {
    let path = home.dir.join("lock");
    let mut file = open_options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io("open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // Only for the message.
            let _ = file.read_to_string(&mut pid);
            return Err(EmbeddedError::InUse {
                home: home.dir.clone(),
                pid: pid.trim().parse().ok(),
            });
        }
        Err(TryLockError::Error(error)) => return Err(io("lock", &path)(error)),
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(io("write", &path))?;
    Ok(file)
}

/// Looks at what is in the home, finishes what was interrupted, and refuses what is not ours.
pub(super) fn inspect(home: &Home) -> Result<Found, EmbeddedError> {
    let foreign = |path: PathBuf, reason| EmbeddedError::Foreign { path, reason };
    if home.dir.join("PG_VERSION").exists() {
        return Err(foreign(home.dir.clone(), "it is a PGDATA itself"));
    }
    let data = home.data();
    let marker_path = home.dir.join(MARKER);
    let there = std::fs::symlink_metadata(&data).is_ok();
    let Some(marker) = read_marker(&marker_path)? else {
        return if there {
            Err(foreign(data, "there is no millrace-cluster.json beside it"))
        } else {
            Ok(Found::Nothing)
        };
    };
    if !there {
        let unfinished = unfinished(home);
        if identifier(&unfinished).ok().as_ref() != Some(&marker.system_identifier) {
            return Err(EmbeddedError::DataGone {
                marker: marker_path,
            });
        }
        publish(&unfinished, &data)?;
    }
    if identifier(&data)? != marker.system_identifier {
        return Err(foreign(
            data,
            "its system identifier is not the one in millrace-cluster.json",
        ));
    }
    let path = data.join("PG_VERSION");
    let text = std::fs::read_to_string(&path).map_err(io("read", &path))?;
    match text.trim().parse() {
        Ok(major) => Ok(Found::Ours { major }),
        Err(_) => Err(foreign(data, "its PG_VERSION is not a number")),
    }
}

/// Makes a fresh cluster in a home without one.
pub(super) fn make(home: &Home, installation: &Installation) -> Result<(), EmbeddedError> {
    let unfinished = unfinished(home);
    match std::fs::remove_dir_all(&unfinished) {
        Ok(()) => tracing::info!("an unfinished initdb was found and is done again"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("remove", &unfinished)(error)),
    }
    make_private(&unfinished, &home.user)?;
    let output = home
        .user
        .command(installation.bin.join("initdb"))
        .arg("--pgdata")
        .arg(&unfinished)
        .arg(format!("--username={SUPERUSER}"))
        .args(["--encoding=UTF8", "--locale=C", "--data-checksums"])
        // Nobody but the server's user and root can reach the socket; nothing listens on TCP.
        .args(["--auth-local=trust", "--auth-host=reject"])
        .current_dir(&home.dir)
        .stdin(Stdio::null())
        .output()
        .map_err(io("run initdb in", &unfinished))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        return Err(EmbeddedError::Initdb {
            data: unfinished,
            output: super::server::last_lines(&String::from_utf8_lossy(&text)),
        });
    }
    let marker = Marker {
        made_by: "Millrace made the cluster in `data` and manages it; without this file it leaves that cluster alone.".to_owned(),
        millrace_version: env!("CARGO_PKG_VERSION").to_owned(),
        postgres_version: installation.version.to_string(),
        created: jiff::Timestamp::now().to_string(),
        system_identifier: identifier(&unfinished)?,
    };
    let path = home.dir.join(MARKER);
    let mut text = serde_json::to_vec_pretty(&marker)
        .map_err(std::io::Error::from)
        .map_err(io("write", &path))?;
    text.push(b'\n');
    write_atomically(&path, &text)?;
    publish(&unfinished, &home.data())
}

/// Removes the cluster and everything beside it. The lock goes last, by its owner's closing it.
pub(super) fn erase(home: &Home) -> Result<(), EmbeddedError> {
    if let Some(pointer) = &home.pointer {
        std::fs::remove_file(pointer).map_err(io("remove", pointer))?;
    }
    std::fs::remove_dir_all(&home.dir).map_err(io("remove", &home.dir))
}

fn unfinished(home: &Home) -> PathBuf {
    home.dir.join("data.initdb")
}

fn publish(unfinished: &Path, data: &Path) -> Result<(), EmbeddedError> {
    std::fs::rename(unfinished, data).map_err(io("create", data))?;
    sync_dir_of(data)
}

fn read_marker(path: &Path) -> Result<Option<Marker>, EmbeddedError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(std::io::Error::from)
            .map_err(io("read", path)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("read", path)(error)),
    }
}

/// The first field of `pg_control`, in the machine's byte order, in every version.
fn identifier(data: &Path) -> Result<String, EmbeddedError> {
    let path = data.join("global/pg_control");
    let mut bytes = [0; 8];
    File::open(&path)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(io("read", &path))?;
    Ok(u64::from_ne_bytes(bytes).to_string())
}
