//! Processes of the lab's own: what is measured never shares one with what measures it.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::machine::{Usage, usage};

const PATIENCE: Duration = Duration::from_secs(120);

/// A child that is ended with this, by its own id.
pub struct Process(Child);

impl Process {
    /// Its id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// What it has used.
    ///
    /// # Errors
    /// Where it has ended.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        usage(self.id())
    }

    /// Ends it without a word, as a crash does.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Asks it to stop and waits until it has.
    ///
    /// # Errors
    /// Where it does not.
    pub fn terminate(mut self) -> anyhow::Result<bool> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status.success());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("process {} does not stop", self.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// A service of this very program, `lab serve KIND`, on a port of its own.
pub struct Service {
    /// Where it listens.
    pub address: SocketAddr,
    /// The process.
    pub process: Process,
}

impl Service {
    /// Starts one and waits until it takes connections.
    ///
    /// # Errors
    /// Where it does not.
    pub fn start(
        kind: &str,
        database_url: Option<&str>,
        redis: Option<SocketAddr>,
    ) -> anyhow::Result<Self> {
        let address = free_address()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["serve", kind, &address.to_string()]);
        if let Some(url) = database_url {
            command.args(["--database", url]);
        }
        if let Some(redis) = redis {
            command.args(["--redis", &redis.to_string()]);
        }
        let process = Process(command.stdin(Stdio::null()).spawn()?);
        wait_for(address)?;
        Ok(Service { address, process })
    }
}

/// A `millrace serve` as users run it.
pub struct Server {
    /// Its data plane.
    pub data: SocketAddr,
    /// Its control plane.
    pub control: SocketAddr,
    /// The process.
    pub process: Process,
}

impl Server {
    /// Starts one on `data_dir`, with settings as environment variables without their `MILLRACE_`,
    /// and waits until it takes orders.
    ///
    /// # Errors
    /// Where it does not.
    pub fn start(data_dir: &Path, settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let addresses = data_dir.join("addresses.json");
        // One of a process that was killed.
        let _ = std::fs::remove_file(&addresses);
        let program = std::env::current_exe()?.with_file_name("millrace");
        ensure!(
            program.exists(),
            "there is no {}: build it first, as ./x perf does",
            program.display()
        );
        let log = std::fs::File::create(data_dir.join("millrace.log"))?;
        let mut command = Command::new(program);
        command
            .arg("serve")
            .env("MILLRACE_DATA_DIR", data_dir)
            .env("MILLRACE_DATA_PLANE__LISTEN", "127.0.0.1:0")
            .env("MILLRACE_CONTROL_PLANE__LISTEN", "127.0.0.1:0")
            .envs(
                settings
                    .iter()
                    .map(|(name, value)| (format!("MILLRACE_{name}"), value)),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut process = Process(command.spawn()?);
        let deadline = Instant::now() + PATIENCE * 5;
        loop {
            if let Some((data, control)) = read_addresses(&addresses)
                && get(control, "/readyz").is_ok_and(|(status, _)| status == 200)
            {
                return Ok(Server {
                    data,
                    control,
                    process,
                });
            }
            if let Some(status) = process.0.try_wait()? {
                let log =
                    std::fs::read_to_string(data_dir.join("millrace.log")).unwrap_or_default();
                bail!("millrace ended with {status} while it started:\n{log}");
            }
            ensure!(Instant::now() < deadline, "millrace does not become ready");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Puts a SKU on sale.
    ///
    /// # Errors
    /// Where it is refused.
    pub fn put_sku(&self, sku: &str, total: u32) -> anyhow::Result<()> {
        let body = json!({ "unit_price": 100, "currency": "EUR", "total": total }).to_string();
        let (status, answer) = call(self.control, "PUT", &format!("/admin/v1/skus/{sku}"), &body)?;
        ensure!(status / 100 == 2, "PUT of a SKU: {status} {answer}");
        Ok(())
    }

    /// The value of a metric without labels.
    ///
    /// # Errors
    /// Where there is none.
    pub fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let (_, text) = get(self.control, "/metrics")?;
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .with_context(|| format!("there is no metric {name}"))
    }

    /// Waits until nothing is in flight, and checks every promise that the database can show.
    ///
    /// # Errors
    /// Where one is broken: a fast wrong answer is no result.
    pub fn audit(&self) -> anyhow::Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (_, text) = get(self.control, "/admin/v1/audit")?;
            let audit: Value = serde_json::from_str(&text)?;
            ensure!(audit["ok"] == true, "the audit failed: {audit:#}");
            if audit["orders_in_flight"] == 0 {
                return Ok(audit);
            }
            ensure!(
                Instant::now() < deadline,
                "orders stay in flight: {audit:#}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn read_addresses(file: &Path) -> Option<(SocketAddr, SocketAddr)> {
    let text = std::fs::read_to_string(file).ok()?;
    let found: Value = serde_json::from_str(&text).ok()?;
    let address = |name: &str| found[name].as_str()?.parse().ok();
    Some((address("data_plane")?, address("control_plane")?))
}

/// An address on loopback that nobody uses.
///
/// # Errors
/// Where there is none.
pub fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Waits until somebody listens.
///
/// # Errors
/// Where nobody comes.
pub fn wait_for(address: SocketAddr) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while std::net::TcpStream::connect(address).is_err() {
        ensure!(Instant::now() < deadline, "nobody listens on {address}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// `GET`, on a connection of its own.
///
/// # Errors
/// Where no answer comes.
pub fn get(address: SocketAddr, target: &str) -> anyhow::Result<(u16, String)> {
    call(address, "GET", target, "")
}

/// One request, on a connection of its own.
///
/// # Errors
/// Where no answer comes.
pub fn call(
    address: SocketAddr,
    method: &str,
    target: &str,
    body: &str,
) -> anyhow::Result<(u16, String)> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "{method} {target} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer without an end")?;
    let status = head
        .get(9..12)
        .and_then(|text| text.parse().ok())
        .context("an answer without a status")?;
    Ok((status, body.to_owned()))
}

/// A program of the system's, such as `redis-server`; its output is thrown away.
///
/// # Errors
/// Where it is not installed.
pub fn spawn(program: &str, arguments: &[&str]) -> anyhow::Result<Process> {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}; ./x perf installs what the lab needs"))?;
    Ok(Process(child))
}
