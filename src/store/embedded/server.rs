//! The server's process, started and stopped by `pg_ctl`, and one that an earlier Millrace left.
//!
//! `pg_ctl` daemonizes the server, waits until it is ready, and waits until it has stopped. It
//! trusts the number in `postmaster.pid`, so this module checks whose process that is; the reasons
//! are in `docs/DECISIONS.md`.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::{ffi::OsStrExt, ffi::OsStringExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

use super::{
    binaries::Installation,
    error::{EmbeddedError, io},
    place::{Home, open_options},
};

/// Above this the log is set aside as `server.log.1`, so both together stay below twice this
/// (plus what is written between two looks).
const LOG_BYTES_MAX: u64 = 16 << 20;

/// How soon a condition is looked at again, at first and at last: most servers end at once, and a
/// look at every process is not free.
const LOOKS: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));

/// How long an immediate shutdown may take. The postmaster itself kills what is left after 5 s.
const IMMEDIATE: Duration = Duration::from_secs(10);

/// Settings of the cluster. `fsync`, `synchronous_commit` and `full_page_writes` are left at
/// their defaults, which are on.
const SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", ""),
    ("port", "5432"),
    ("unix_socket_permissions", "0700"),
    ("max_connections", "100"),
    ("shared_buffers", "256MB"),
    // A sale is a burst of WAL: few checkpoints in it, and the space for that.
    ("max_wal_size", "8GB"),
    ("checkpoint_timeout", "15min"),
    ("wal_compression", "on"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("log_line_prefix", "%m [%p] "),
    ("log_checkpoints", "on"),
    // A refused row must not copy whole batches into the log.
    ("log_parameter_max_length_on_error", "0"),
    ("cluster_name", "millrace"),
];

/// How long a start may take. Nearly all of it is crash recovery, and ending it would only make the
/// next start begin again.
const START_MAX: Duration = Duration::from_secs(30 * 60);

/// How long the processes of a killed postmaster may take to end by themselves.
const CHILDREN_END: Duration = Duration::from_secs(10);

/// `pg_ctl` for the cluster of a home, in a process group of its own: a Ctrl-C in the terminal
/// reaches the foreground group, and Millrace drains first and then stops PostgreSQL itself.
fn pg_ctl(home: &Home, installation: &Installation, mode: &str) -> Command {
    let mut command = home.user.command(installation.bin.join("pg_ctl"));
    // The name of PGDATA is relative, because `pg_ctl` gives it to a shell in double quotes.
    command
        .args([mode, "--wait", "--silent", "--pgdata", "data"])
        .current_dir(&home.dir)
        .stdin(Stdio::null())
        .process_group(0);
    command
}

/// Begins to start the server; later entries of `settings` win. Returns a `pg_ctl` that ends once
/// the server takes connections or has ended, and the length of the log before the start.
pub(super) fn start(
    home: &Home,
    installation: &Installation,
    socket_dir: &Path,
    settings: &[(String, String)],
) -> Result<(Child, u64), EmbeddedError> {
    let log = home.log();
    bound_log(&log)?;
    // Opened here and inherited by the server: `pg_ctl --log` would follow a link, and the server's
    // user may not write in a home of root's.
    let output = open_options()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(io("open", &log))?;
    let errors = output.try_clone().map_err(io("open", &log))?;
    let from = output.metadata().map_err(io("look at", &log))?.len();

    let mut options = OsString::new();
    let mut set = |name: &str, value: &OsStr| {
        options.push(" -c ");
        options.push(shell_quoted(OsStr::new(name)));
        options.push("=");
        options.push(shell_quoted(value));
    };
    // Also the mark by which a system without `/proc` tells the process.
    set("data_directory", home.data().as_os_str());
    for (name, value) in SETTINGS {
        set(name, OsStr::new(value));
    }
    set(
        "unix_socket_directories",
        &quoted_name(socket_dir.as_os_str()),
    );
    for (name, value) in settings {
        set(name, OsStr::new(value));
    }
    let starting = pg_ctl(home, installation, "start")
        .arg(format!("--timeout={}", START_MAX.as_secs()))
        .arg("--options")
        .arg(options)
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(io("start PostgreSQL in", &home.dir))?;
    Ok((starting, from))
}

/// A word of a shell's command.
fn shell_quoted(text: &OsStr) -> OsString {
    surrounded(text, b'\'', b"'\\''")
}

/// An entry of a setting that is a list of names.
fn quoted_name(text: &OsStr) -> OsString {
    surrounded(text, b'"', b"\"\"")
}

fn surrounded(text: &OsStr, quote: u8, escaped: &[u8]) -> OsString {
    let mut word = vec![quote];
    for &byte in text.as_bytes() {
        match byte == quote {
            true => word.extend_from_slice(escaped),
            false => word.push(byte),
        }
    }
    word.push(quote);
    OsString::from_vec(word)
}

/// How a server is ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shutdown {
    /// Disconnects everyone and writes a checkpoint; after this time, immediately.
    Fast(Duration),
    /// Ends at once; the next start recovers.
    Immediate,
}

/// Ends the server of the cluster, if one runs. Blocks.
///
/// The process is looked at first: `pg_ctl` signals whatever process has the number in
/// `postmaster.pid`.
pub(super) fn stop(
    home: &Home,
    installation: &Installation,
    how: Shutdown,
) -> Result<(), EmbeddedError> {
    let data = home.data();
    let Some(pid) = running(&data) else {
        return Ok(());
    };
    // Somebody may have stopped it. It may also be gone meanwhile, as desired.
    let _ = rustix::process::kill_process(pid, Signal::CONT);
    let ended = |mode: &str, patience: Duration| {
        let outcome = pg_ctl(home, installation, "stop")
            .arg(format!("--mode={mode}"))
            .arg(format!("--timeout={}", patience.as_secs()))
            .output();
        // `pg_ctl` waits for the end of `postmaster.pid`, a moment before that of the process.
        let stopped = outcome.is_ok_and(|output| output.status.success());
        let patience = if stopped { IMMEDIATE } else { Duration::ZERO };
        wait_until(patience, || !runs_on(pid, &data))
    };
    if let Shutdown::Fast(patience) = how {
        if ended("fast", patience) {
            return Ok(());
        }
        tracing::warn!("PostgreSQL did not stop in time and is ended without a checkpoint");
    }
    if ended("immediate", IMMEDIATE) {
        return Ok(());
    }
    Err(would_not_stop(pid, &data))
}

fn would_not_stop(pid: Pid, data: &Path) -> EmbeddedError {
    EmbeddedError::WouldNotStop {
        pid: pid.as_raw_nonzero().get(),
        data: data.to_owned(),
    }
}

/// Ends whatever an earlier, killed Millrace left running on the cluster. Blocks.
///
/// The caller holds the cluster's lock, so no living Millrace manages that server.
/// `socket_lock` is the file that PostgreSQL keeps beside its socket.
pub(super) fn take_over(
    home: &Home,
    installation: &Installation,
    socket_lock: &Path,
    patience: Duration,
) -> Result<(), EmbeddedError> {
    let data = home.data();
    if let Some(pid) = running(&data) {
        tracing::info!(
            pid = pid.as_raw_nonzero().get(),
            "stopping the PostgreSQL that an earlier, killed Millrace left running"
        );
        stop(home, installation, Shutdown::Fast(patience))?;
    }
    // The children of a killed postmaster end by themselves, mostly at once. One that cannot
    // (stopped, or deep in a system call) would share memory with the next server, and PostgreSQL
    // refuses to start beside it.
    let none_left = || processes_on(&data).is_empty();
    if !wait_until(CHILDREN_END, none_left) {
        for pid in processes_on(&data) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        wait_until(CHILDREN_END, none_left);
        if let Some(pid) = processes_on(&data).first() {
            return Err(would_not_stop(*pid, &data));
        }
    }
    // After a reboot the number in a stale file, that of the cluster or that of its socket, can
    // belong to any other process, and PostgreSQL would then refuse to start. Where every process
    // was looked at, the file is known to be stale; with a number that belongs to nobody it is left
    // for PostgreSQL's own checks.
    if cfg!(target_os = "linux") {
        for path in [data.join("postmaster.pid").as_path(), socket_lock] {
            let alive = |pid| rustix::process::test_kill_process(pid).is_ok();
            if !named_in(path).is_some_and(alive) {
                continue;
            }
            match std::fs::remove_file(path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(io("remove", path)(error)),
            }
        }
    }
    Ok(())
}

/// Waits until [`stop`] can see the server that `starting` has begun to start, or it has ended.
pub(super) fn wait_for_process(starting: &mut Child, data: &Path) {
    wait_until(IMMEDIATE, || {
        running(data).is_some() || !matches!(starting.try_wait(), Ok(None))
    });
}

fn wait_until(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    let (mut pause, longest) = LOOKS;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(longest);
    }
}

/// The postmaster of the cluster, if it lives.
pub(super) fn running(data: &Path) -> Option<Pid> {
    named_in(&data.join("postmaster.pid")).filter(|&pid| runs_on(pid, data))
}

/// The process named by `postmaster.pid`, alive or not.
fn named_in(path: &Path) -> Option<Pid> {
    let text = std::fs::read_to_string(path).ok()?;
    let pid: i32 = text.lines().next()?.trim().parse().ok()?;
    // A negative number marks a standalone backend.
    Pid::from_raw(pid.checked_abs()?)
}

/// Whether `pid` is a living PostgreSQL process of this very cluster: all of them have PGDATA as
/// their working directory. A zombie has none.
#[cfg(target_os = "linux")]
pub(super) fn runs_on(pid: Pid, data: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    let named = std::fs::read(process.join("comm"))
        .is_ok_and(|name| name.starts_with(b"postgres") || name.starts_with(b"postmaster"));
    named && std::fs::read_link(process.join("cwd")).is_ok_and(|dir| dir == data)
}

/// Every process of this cluster.
#[cfg(target_os = "linux")]
fn processes_on(data: &Path) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(Pid::from_raw)
        .filter(|&pid| runs_on(pid, data))
        .collect()
}

/// Elsewhere the command line of the postmaster has to do: [`start`] names the cluster in it.
#[cfg(not(target_os = "linux"))]
pub(super) fn runs_on(pid: Pid, data: &Path) -> bool {
    std::process::Command::new("ps")
        .args(["-ww", "-o", "command=", "-p"])
        .arg(pid.as_raw_nonzero().to_string())
        .output()
        .is_ok_and(|output| {
            let line = String::from_utf8_lossy(&output.stdout);
            line.contains("postgres")
                && line.contains(&format!("data_directory={}", data.display()))
        })
}

/// Elsewhere PostgreSQL's own check of the shared memory has to do.
#[cfg(not(target_os = "linux"))]
fn processes_on(_data: &Path) -> Vec<Pid> {
    Vec::new()
}

/// Sets a log that has grown aside. The server appends, so cutting the file under it is safe; the
/// few lines written between the copy and the cut are lost.
pub(super) fn bound_log(log: &Path) -> Result<(), EmbeddedError> {
    let length = std::fs::metadata(log).map_or(0, |meta| meta.len());
    if length > LOG_BYTES_MAX {
        let aside = log.with_extension("log.1");
        // A fresh file each time, so that a link in its place is not followed.
        let _ = std::fs::remove_file(&aside);
        std::fs::copy(log, &aside).map_err(io("write", &aside))?;
        open_options()
            .write(true)
            .open(log)
            .and_then(|file| file.set_len(0))
            .map_err(io("shorten", log))?;
    }
    Ok(())
}

/// The end of the log, written since `from` (a length in bytes), for an error message.
pub(super) fn tail(log: &Path, from: u64) -> String {
    const TAIL_BYTES: u64 = 4096;
    let mut bytes = Vec::new();
    let read = File::open(log).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(
            from.max(length.saturating_sub(TAIL_BYTES)).min(length),
        ))?;
        file.take(TAIL_BYTES).read_to_end(&mut bytes)
    });
    match read {
        Ok(_) => last_lines(&String::from_utf8_lossy(&bytes)),
        Err(error) => format!("(unreadable: {error})"),
    }
}

/// The last lines of an output as one line.
pub(super) fn last_lines(text: &str) -> String {
    let lines = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("pg_ctl: "))
        .filter(|line| *line != "Examine the log output.")
        .collect::<Vec<_>>();
    let start = lines.len().saturating_sub(6);
    match lines.get(start..) {
        Some([]) | None => "(empty)".to_owned(),
        Some(last) => last.join(" | "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_has_grown_is_set_aside_and_an_appending_writer_goes_on() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("server.log");
        let mut writer = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap();
        writer.set_len(LOG_BYTES_MAX + 1).unwrap();
        bound_log(&log).unwrap();
        writer.write_all(b"after\n").unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"after\n");
        let aside = dir.path().join("server.log.1");
        assert_eq!(std::fs::metadata(aside).unwrap().len(), LOG_BYTES_MAX + 1);
    }

    #[test]
    fn a_socket_directory_with_commas_and_quotes_stays_one_directory() {
        let name = quoted_name(OsStr::new("/a,b/\"c\""));
        assert_eq!(name, "\"/a,b/\"\"c\"\"\"");
    }

    #[test]
    fn a_setting_reaches_the_server_through_a_shell_as_it_is() {
        let text = "a 'b' \"c\" $d `e` \\f";
        let output = Command::new("/bin/sh")
            .arg("-c")
            .arg({
                let mut line = OsString::from("printf %s ");
                line.push(shell_quoted(OsStr::new(text)));
                line
            })
            .output()
            .unwrap();
        assert_eq!(output.stdout, text.as_bytes());
    }

    #[test]
    fn a_process_that_is_no_server_of_the_cluster_is_never_taken_for_one() {
        let own = rustix::process::getpid();
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        assert!(!runs_on(own, &here));
        assert!(processes_on(&here).is_empty());
    }
}
