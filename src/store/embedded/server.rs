//! The server's process: starting it, ending it, and ending one that an earlier Millrace left.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::{ffi::OsStrExt, ffi::OsStringExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Stdio},
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
    ("wal_level", "logical"),
    ("max_wal_size", "4GB"),
    ("min_wal_size", "256MB"),
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

/// Starts `postgres`; later entries of `settings` win.
pub(super) fn spawn(
    home: &Home,
    installation: &Installation,
    socket_dir: &Path,
    settings: &[(String, String)],
) -> Result<Child, EmbeddedError> {
    let log = home.log();
    bound_log(&log)?;
    let output = open_options()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(io("open", &log))?;
    let errors = output.try_clone().map_err(io("open", &log))?;
    let mut command = home.user.command(installation.bin.join("postgres"));
    command.arg("-D").arg(home.data());
    for (name, value) in SETTINGS {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    command
        .arg("-c")
        .arg(socket_setting(socket_dir.as_os_str()));
    for (name, value) in settings {
        command.arg("-c").arg(format!("{name}={value}"));
    }
    command
        .current_dir(&home.dir)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        // A Ctrl-C in the terminal reaches the foreground group: Millrace drains first and then
        // stops PostgreSQL itself.
        .process_group(0)
        .spawn()
        .map_err(io("start PostgreSQL in", &home.dir))
}

/// The setting is a list of quoted names.
fn socket_setting(dir: &OsStr) -> OsString {
    let mut setting = b"unix_socket_directories=\"".to_vec();
    for &byte in dir.as_bytes() {
        if byte == b'"' {
            setting.push(b'"');
        }
        setting.push(byte);
    }
    setting.push(b'"');
    OsString::from_vec(setting)
}

/// How a server is ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shutdown {
    /// Disconnects everyone and writes a checkpoint; after this time, immediately.
    Fast(Duration),
    /// Ends at once; the next start recovers.
    Immediate,
}

/// Ends our own server and collects it. Blocks.
pub(super) fn stop(child: &mut Child, how: Shutdown) {
    let ended = |child: &mut Child| !matches!(child.try_wait(), Ok(None));
    if ended(child) {
        return;
    }
    let pid = Pid::from_child(child);
    if let Shutdown::Fast(patience) = how {
        ask_to_end(pid, Signal::INT);
        if wait_until(patience, || ended(child)) {
            return;
        }
        tracing::warn!("PostgreSQL did not stop in time and is ended without a checkpoint");
    }
    ask_to_end(pid, Signal::QUIT);
    if !wait_until(IMMEDIATE, || ended(child)) {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Ends whatever an earlier, killed Millrace left running on `data`. Blocks.
///
/// The caller holds the cluster's lock, so no living Millrace manages that server.
/// `socket_lock` is the file that PostgreSQL keeps beside its socket.
pub(super) fn take_over(
    data: &Path,
    socket_lock: &Path,
    patience: Duration,
) -> Result<(), EmbeddedError> {
    let postmaster_pid = data.join("postmaster.pid");
    let named = named_in(&postmaster_pid);
    if let Some(pid) = named
        && runs_on(pid, data)
    {
        tracing::info!(
            pid = pid.as_raw_nonzero().get(),
            "stopping the PostgreSQL that an earlier, killed Millrace left running"
        );
        let gone = || !runs_on(pid, data);
        ask_to_end(pid, Signal::INT);
        if !wait_until(patience, gone) {
            ask_to_end(pid, Signal::QUIT);
            if !wait_until(IMMEDIATE, gone) {
                return Err(EmbeddedError::WouldNotStop {
                    pid: pid.as_raw_nonzero().get(),
                    data: data.to_owned(),
                });
            }
        }
    }
    // The children of a killed postmaster end by themselves, mostly at once. One that cannot
    // (stopped, or deep in a system call) would share memory with the next server.
    if !wait_until(IMMEDIATE, || processes_on(data).is_empty()) {
        for pid in processes_on(data) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        if let Some(pid) = wait_for_none(data) {
            return Err(EmbeddedError::WouldNotStop {
                pid: pid.as_raw_nonzero().get(),
                data: data.to_owned(),
            });
        }
    }
    // After a reboot the number in a stale file, that of the cluster or that of its socket, can belong to any other process, and PostgreSQL
    // would then refuse to start. Where every process was looked at, the file is known to be
    // stale; with a number that belongs to nobody it is left for PostgreSQL's own checks.
    if cfg!(target_os = "linux") {
        for path in [postmaster_pid.as_path(), socket_lock] {
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

fn wait_for_none(data: &Path) -> Option<Pid> {
    wait_until(IMMEDIATE, || processes_on(data).is_empty());
    processes_on(data).first().copied()
}

/// Signals, and wakes the process up if somebody had stopped it.
fn ask_to_end(pid: Pid, signal: Signal) {
    // It may be gone meanwhile, which is what is wanted.
    let _ = rustix::process::kill_process(pid, signal);
    let _ = rustix::process::kill_process(pid, Signal::CONT);
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
fn runs_on(pid: Pid, data: &Path) -> bool {
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

/// Elsewhere the command line of the postmaster has to do: Millrace starts it with `-D`.
#[cfg(not(target_os = "linux"))]
fn runs_on(pid: Pid, data: &Path) -> bool {
    std::process::Command::new("ps")
        .args(["-ww", "-o", "command=", "-p"])
        .arg(pid.as_raw_nonzero().to_string())
        .output()
        .is_ok_and(|output| {
            let line = String::from_utf8_lossy(&output.stdout);
            line.contains("postgres") && line.contains(&format!("-D {}", data.display()))
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
        .filter(|line| !line.is_empty())
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
        assert_eq!(
            socket_setting(OsStr::new("/a,b/\"c\"")),
            "unix_socket_directories=\"/a,b/\"\"c\"\"\""
        );
    }

    #[test]
    fn a_process_that_is_no_server_of_the_cluster_is_never_taken_for_one() {
        let own = rustix::process::getpid();
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        assert!(!runs_on(own, &here));
        assert!(processes_on(&here).is_empty());
    }
}
