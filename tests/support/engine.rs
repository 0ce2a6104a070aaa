//! An engine in a process of its own, for tests that look at its memory, lower its limits, or
//! have to expect it to hang, spin or die.
//!
//! The process is the test binary itself: it holds a test that calls [`child`], and [`Child`] runs
//! that one.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use millrace::http::message::{Request, Response};
use millrace::http::server::Service;
use millrace::http::server::hardened;
use millrace::http::server::limits::{BodyLimits, Limits};
use millrace::http::server::{minihttp, wake};

const ENGINE: &str = "MILLRACE_TEST_ENGINE";
const TIMEOUT_MS: &str = "MILLRACE_TEST_REQUEST_TIMEOUT_MS";
const READY: &str = "listening on ";

/// Answers with what it saw; `/wait` parks for good, `/panic` panics.
struct Echo;

impl Service for Echo {
    fn call(&self, request: &Request<'_>, response: &mut Response) {
        response.header("Content-Type", "text/plain");
        response.header("Location", "/elsewhere");
        match request.path() {
            "/wait" => wake::wait(request, || false),
            "/panic" => panic!("asked for"),
            _ => {
                let _ = write!(
                    response.body_mut(),
                    "{} {}",
                    request.target,
                    String::from_utf8_lossy(request.body)
                );
            }
        }
    }
}

/// The body of the test that [`Child`] runs: serves until its parent is gone. Does nothing in an
/// ordinary run.
pub fn child() {
    let Ok(engine) = std::env::var(ENGINE) else {
        return;
    };
    let timeout_ms = std::env::var(TIMEOUT_MS).expect("a timeout");
    let limits = Limits {
        head_bytes_max: 2048,
        bodies: BodyLimits {
            bytes_max: 1000,
            rules: &[],
        },
        request_timeout: Duration::from_millis(timeout_ms.parse().expect("milliseconds")),
        ..Limits::default()
    };
    let service = Arc::new(Echo);
    let (address, _server) = if engine == "hardened" {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let server = hardened::serve(listener, service, limits).expect("a server");
        (server.local_addr(), Some(server))
    } else {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (_, address) = minihttp::serve(any, service, &limits).expect("a server");
        (address, None)
    };
    println!("\n{READY}{address}");
    // The pipe ends with the parent, however that ends.
    let _ = std::io::stdin().read(&mut [0]);
    // Without waiting for coroutines that may never end.
    std::process::exit(0);
}

/// A running engine; killed when dropped.
pub struct Child {
    /// Where it listens.
    pub address: SocketAddr,
    process: std::process::Child,
}

impl Child {
    /// Starts `engine`, `hardened` or `minihttp`, in a process of its own. `test` is the full name
    /// of the test that calls [`child`]; the process may open `files` descriptors.
    pub fn start(test: &str, engine: &str, request_timeout: Duration, files: Option<u64>) -> Self {
        let myself = std::env::current_exe().expect("the path of this program");
        let mut command = match files {
            // The limit is lowered by the shell on its way, for the child alone.
            Some(files) => {
                let mut shell = Command::new("sh");
                shell
                    .args(["-c", &format!("ulimit -n {files} && exec \"$0\" \"$@\"")])
                    .arg(myself);
                shell
            }
            None => Command::new(myself),
        };
        command
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(ENGINE, engine)
            .env(TIMEOUT_MS, request_timeout.as_millis().to_string());
        Self::spawn(command, |process| {
            let output = process.stdout.take().expect("its output");
            BufReader::new(output)
                .lines()
                .map_while(Result::ok)
                .find_map(|line| line.strip_prefix(READY)?.parse().ok())
                .expect("its address")
        })
    }

    /// Starts the perf lab, or another program of the same command, as a constant service.
    pub fn start_program(program: &str) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = free.local_addr().expect("its address");
        drop(free);
        let mut command = Command::new(program);
        command.args(["serve", "constant", &address.to_string()]);
        Self::spawn(command, |_| {
            while std::net::TcpStream::connect(address).is_err() {
                std::thread::sleep(Duration::from_millis(10));
            }
            address
        })
    }

    fn spawn(
        mut command: Command,
        address: impl FnOnce(&mut std::process::Child) -> SocketAddr,
    ) -> Self {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the engine");
        let address = address(&mut process);
        Self { address, process }
    }

    /// Its resident memory, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = format!("/proc/{}/status", self.process.id());
        let status = std::fs::read_to_string(status).expect("it runs");
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
            .expect("its resident memory")
            * 1024
    }

    /// Processor time that it has used so far, in clock ticks of usually 10 ms.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = format!("/proc/{}/stat", self.process.id());
        let stat = std::fs::read_to_string(stat).expect("it runs");
        // Behind the name in parentheses, which may hold anything: utime and stime.
        let rest = stat.rsplit(')').next().unwrap_or_default();
        let mut fields = rest.split_whitespace().skip(11);
        let mut ticks = || fields.next().and_then(|text| text.parse::<u64>().ok());
        ticks().zip(ticks()).map(|(a, b)| a + b).expect("its times")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
