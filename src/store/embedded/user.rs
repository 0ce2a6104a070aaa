//! As whom the server runs.
//!
//! PostgreSQL refuses to run as root. As root, Millrace therefore starts it as the owner of the
//! cluster, else as `postgres`, else as `nobody`; otherwise as itself.

use std::{
    ffi::OsStr,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

use super::error::{EmbeddedError, io};

/// The server's user and primary group.
#[derive(Debug, Clone)]
pub(super) struct ServerUser {
    pub uid: u32,
    pub gid: u32,
    pub name: String,
    /// Whether it is somebody else than this process.
    switch: bool,
}

impl ServerUser {
    /// The user for the cluster in `data`, which need not exist.
    pub fn of_cluster(data: &Path) -> Result<Self, EmbeddedError> {
        let own = rustix::process::geteuid();
        let owner = match std::fs::symlink_metadata(data) {
            Ok(meta) => Some((meta.uid(), meta.gid())),
            // Root can look everywhere; for anyone else an unreadable place counts as foreign
            // and is found out when it is used.
            Err(_) => None,
        };
        match owner {
            Some((uid, _)) if !own.is_root() && uid != own.as_raw() => Err(EmbeddedError::Owner {
                data: data.to_owned(),
                owner: uid,
                own: own.as_raw(),
            }),
            Some((uid, gid)) if own.is_root() && uid != 0 => Ok(Self {
                uid,
                gid,
                name: uid.to_string(),
                switch: true,
            }),
            _ if own.is_root() => ["postgres", "nobody"]
                .into_iter()
                .find_map(look_up)
                .ok_or(EmbeddedError::NoServerUser),
            _ => Ok(Self {
                uid: own.as_raw(),
                gid: rustix::process::getegid().as_raw(),
                name: own.as_raw().to_string(),
                switch: false,
            }),
        }
    }

    /// Whether the server runs as somebody else than this process.
    pub fn is_other(&self) -> bool {
        self.switch
    }

    /// A command that will run as this user, with a bare environment: Millrace's own holds
    /// secrets, and `PG…` variables would change what the server does.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("LC_ALL", "C");
        for kept in ["PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"] {
            if let Some(value) = std::env::var_os(kept) {
                command.env(kept, value);
            }
        }
        if self.switch {
            // The standard library also drops root's supplementary groups then, so the server
            // has this user's primary group and no other.
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// Whether this user may enter `dir`. Asked by doing it, since only the kernel knows all of
    /// modes, access lists and mount options.
    pub fn may_enter(&self, dir: &Path) -> bool {
        // The directory is changed after the user is, so a failure shows as a failed spawn.
        self.command("/bin/sh")
            .args(["-c", ":"])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }

    /// Gives `path` to this user.
    pub fn give(&self, path: &Path) -> Result<(), EmbeddedError> {
        if self.switch {
            std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid))
                .map_err(io("change the owner of", path))?;
        }
        Ok(())
    }
}

/// `id` asks every source of users that the machine has, not only `/etc/passwd`.
fn look_up(name: &str) -> Option<ServerUser> {
    let id = |flag: &str| -> Option<u32> {
        let output = Command::new("id").args([flag, name]).output().ok()?;
        String::from_utf8_lossy(&output.stdout).trim().parse().ok()
    };
    let (uid, gid) = (id("-u")?, id("-g")?);
    (uid != 0).then(|| ServerUser {
        uid,
        gid,
        name: name.to_owned(),
        switch: true,
    })
}
