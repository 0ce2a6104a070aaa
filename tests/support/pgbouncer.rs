//! PgBouncer in front of a [`Listening`].

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use super::listening::{Listening, PASSWORD, PASSWORD_IN_URL, free_port};

/// A running PgBouncer with a database for each mode: `session`, `transaction`, `statement`, and
/// `narrow`, which has one server session for everybody's transactions.
pub struct PgBouncer {
    port: u16,
    process: Child,
}

impl PgBouncer {
    /// Starts one, with more lines for its configuration. `None`, said loudly, where it is not
    /// installed.
    pub fn start(server: &Listening, more: &str) -> Option<Self> {
        let Some(program) = find() else {
            // Not `eprintln!`, which the test harness keeps to itself where a test passes.
            let _ = writeln!(
                std::io::stderr(),
                "\n*** DID NOT RUN: PgBouncer is not installed, so nothing was tested through it; \
                 `./x setup` installs it ***\n"
            );
            return None;
        };
        let port = free_port();
        let target = format!("host=127.0.0.1 port={} dbname=shop", server.port);
        let users = server.write(
            &format!("users-{port}.txt"),
            &format!("\"shop\" \"{PASSWORD}\"\n"),
        );
        let text = format!(
            "[databases]
session = {target} pool_mode=session
transaction = {target} pool_mode=transaction
statement = {target} pool_mode=statement
narrow = {target} pool_mode=transaction pool_size=1
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {}
default_pool_size = 40
max_client_conn = 200
{more}
",
            users.display()
        );
        let configuration = server.write(&format!("pgbouncer-{port}.ini"), &text);
        let log = std::fs::File::create(server.dir.path().join(format!("pgbouncer-{port}.log")))
            .expect("its log");
        let mut process = server
            .as_server(&program)
            .arg(configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start PgBouncer");
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                Instant::now() < deadline && matches!(process.try_wait(), Ok(None)),
                "PgBouncer did not come up"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(PgBouncer { port, process })
    }

    /// How to reach one of its databases.
    pub fn url(&self, database: &str) -> String {
        format!(
            "postgresql://shop:{PASSWORD_IN_URL}@127.0.0.1:{}/{database}",
            self.port
        )
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Debian keeps it where only root looks.
fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"].map(PathBuf::from))
        .map(|dir| dir.join("pgbouncer"))
        .find(|program| Path::is_file(program))
}
