//! The disk under the database is full for a while.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;

use super::fixture::{Fixture, PATIENCE, runtime};
use super::{Figures, LONG, Terms};
use crate::outcome::Why;
use crate::support::postgres::test_dir;
use crate::support::standby::Server;

/// A small file system of its own, in memory.
struct Disk {
    path: PathBuf,
}

impl Disk {
    fn mount(path: PathBuf, mebibytes: u32) -> Result<Self, Why> {
        if !rustix::process::geteuid().is_root() {
            return Err(Why::NotRun("only root can mount a small disk".into()));
        }
        std::fs::create_dir_all(&path).expect("make a mount point");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o"])
            .arg(format!("size={mebibytes}m"))
            .arg("tmpfs")
            .arg(&path)
            .output();
        match mounted {
            Ok(output) if output.status.success() => Ok(Disk { path }),
            Ok(output) => Err(Why::NotRun(format!(
                "cannot mount a small disk: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ))),
            Err(error) => Err(Why::NotRun(format!("cannot run mount: {error}"))),
        }
    }

    /// Takes all that is left of it.
    fn fill(&self) {
        let mut ballast = File::create(self.ballast()).expect("make the ballast");
        for size in [1 << 20, 1 << 12, 1] {
            let part = vec![1; size];
            while ballast.write_all(&part).is_ok() {}
        }
    }

    fn empty(&self) {
        std::fs::remove_file(self.ballast()).expect("remove the ballast");
    }

    fn ballast(&self) -> PathBuf {
        self.path.join("ballast")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a server may not have closed its last file yet.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// There is no room for another page of orders.
pub fn full_for_data(terms: Terms<'_>) -> Result<Figures, Why> {
    let (runtime, dir) = (runtime(), test_dir());
    let disk = Disk::mount(dir.path().join("disk"), 64)?;
    let server = runtime.block_on(Server::start_in(dir.path(), &[]));
    let space = disk.path.join("space");
    std::fs::create_dir(&space).expect("make the tablespace's directory");
    server.give(&space);
    runtime.block_on(server.sql(&format!(
        "CREATE TABLESPACE small LOCATION '{}'",
        space.display()
    )));
    // Whatever Millrace makes is made there.
    runtime.block_on(server.sql("ALTER DATABASE millrace SET default_tablespace = small"));
    let mut fixture = Fixture::start(runtime, &server, terms)?;
    fixture.under_load(|fixture, _| {
        disk.fill();
        // What is left of the last pages is used up first.
        fixture.until("the disk to be full", || {
            Ok(server.has_logged("No space left on device"))
        })?;
        sleep(LONG);
        disk.empty();
        Ok(())
    })?;
    let findings = fixture.finish(&server)?;
    Ok(Figures {
        findings,
        ..Figures::default()
    })
}

/// There is no room for another segment of the WAL: the server panics, and does not come back
/// before there is.
pub fn full_for_wal(terms: Terms<'_>) -> Result<Figures, Why> {
    let (runtime, dir) = (runtime(), test_dir());
    let disk = Disk::mount(dir.path().join("disk"), 128)?;
    let wal_sizes = [("min_wal_size", "32MB"), ("max_wal_size", "64MB")];
    let mut server = runtime.block_on(Server::start_in(dir.path(), &wal_sizes));
    server.stop_immediately();
    move_wal(&server, &disk.path.join("wal"));
    runtime.block_on(server.start());
    let mut fixture = Fixture::start(runtime, &server, terms)?;
    fixture.under_load(|fixture, _| {
        disk.fill();
        let deadline = std::time::Instant::now() + PATIENCE;
        while !server.has_logged("No space left on device") {
            if std::time::Instant::now() > deadline {
                return Err(Why::Failed("the WAL does not fill its disk".into()));
            }
            fixture.runtime.block_on(async {
                let config = server.config("postgres");
                if let Ok((client, connection)) = config.connect(tokio_postgres::NoTls).await {
                    let connection = tokio::spawn(connection);
                    // Wants another segment; fails together with the server.
                    let _ = client.batch_execute("SELECT pg_switch_wal()").await;
                    connection.abort();
                }
            });
        }
        sleep(LONG);
        disk.empty();
        // It may have given up, as an administrator would find it.
        if !server.is_running() {
            fixture.runtime.block_on(server.start());
        }
        Ok(())
    })?;
    let findings = fixture.finish(&server)?;
    Ok(Figures {
        findings,
        ..Figures::default()
    })
}

fn move_wal(server: &Server, to: &Path) {
    let from = server.data.join("pg_wal");
    let moved = Command::new("cp").arg("-a").arg(&from).arg(to).status();
    assert!(moved.is_ok_and(|status| status.success()), "move the WAL");
    std::fs::remove_dir_all(&from).expect("remove the old WAL");
    std::os::unix::fs::symlink(to, &from).expect("leave a link");
}
