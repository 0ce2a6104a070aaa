//! A network of machines in network namespaces, whose links are cut one by one.
//!
//! ```text
//!   machine 1 ─┬─ clients ───┐
//!              ├─ database ──┼─ a bridge each ─┬─ clients, PostgreSQL, Redis: the outside
//!              ├─ broker ────┤                 │
//!              └─ peers ─────┘                 └─ the other machines
//! ```
//!
//! A link is cut by setting its port of the bridge down. What is sent is lost, and connections stay open.
//!
//! The namespaces have no names. They end with the processes that are in them, however those end.

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// What a machine is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Clients,
    Database,
    Broker,
    Peers,
}

impl Link {
    const ALL: [Self; 4] = [Link::Clients, Link::Database, Link::Broker, Link::Peers];

    /// The address of a machine on it; 254 is the outside.
    fn address(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self as u8, host)
    }

    /// The address of the outside on it.
    pub fn outside(self) -> Ipv4Addr {
        self.address(OUTSIDE)
    }

    /// The address of a machine on it, with a port.
    pub fn at(self, machine: u8, port: u16) -> SocketAddr {
        (self.address(machine), port).into()
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Link::Clients => "clients",
            Link::Database => "database",
            Link::Broker => "broker",
            Link::Peers => "peers",
        })
    }
}

const OUTSIDE: u8 = 254;
/// Time in which a machine that is connected is answered.
const ANSWER: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(10);

/// A network namespace.
pub struct Space(File);

impl Space {
    /// An empty one.
    pub fn new() -> std::io::Result<Self> {
        let made = std::thread::spawn(|| {
            #[expect(
                deprecated,
                reason = "of all flags, only FILES needs its caller's care"
            )]
            rustix::thread::unshare(UnshareFlags::NEWNET)?;
            File::open("/proc/thread-self/ns/net").map(Space)
        });
        made.join().expect("the thread of a new namespace")
    }

    /// Does something on a thread in it. Processes and threads that it starts are in it too.
    pub fn within<T: Send>(&self, what: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("enter a namespace");
                what()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Its name for `ip`, as long as this process lives.
    fn name(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// The machines, and what connects them.
pub struct Network {
    /// Where clients, the database and the broker are.
    pub outside: Space,
    /// Machine 1 is the first.
    pub machines: Vec<Space>,
}

impl Network {
    /// So many machines, all connected. An error: this system does not let us make them.
    pub fn new(machines: u8) -> Result<Self, String> {
        let space = || Space::new().map_err(|error| format!("a network namespace: {error}"));
        let network = Network {
            outside: space()?,
            machines: (0..machines).map(|_| space()).collect::<Result<_, _>>()?,
        };
        let mut outside = vec!["link set lo up".to_owned()];
        for link in Link::ALL {
            let address = link.outside();
            outside.push(format!("link add {link} type bridge"));
            outside.push(format!("addr add {address}/24 dev {link}"));
            outside.push(format!("link set {link} up"));
        }
        for (number, machine) in (1..).zip(&network.machines) {
            let mut inside = vec!["link set lo up".to_owned()];
            for link in Link::ALL {
                let (port, name) = (port(link, number), machine.name());
                outside.push(format!(
                    "link add {port} type veth peer name {link} netns {name}"
                ));
                outside.push(format!("link set {port} master {link} up"));
                let address = link.address(number);
                inside.push(format!("addr add {address}/24 dev {link}"));
                inside.push(format!("link set {link} up"));
            }
            network
                .outside
                .within(|| ip(&std::mem::take(&mut outside)))?;
            machine.within(|| ip(&inside))?;
        }
        Ok(network)
    }

    /// Cuts these links of a machine, or mends them.
    pub fn cut(&self, machine: u8, links: &[Link], is_cut: bool) -> Result<(), String> {
        let state = if is_cut { "down" } else { "up" };
        let lines = links.iter().map(|link| {
            let port = port(*link, machine);
            format!("link set {port} {state}")
        });
        let lines: Vec<String> = lines.collect();
        self.outside.within(|| ip(&lines))?;
        let space = &self.machines[usize::from(machine) - 1];
        for link in links {
            // Nobody listens there, which a machine that is connected is told at once.
            let nobody = SocketAddr::from((link.outside(), 1));
            let ask = || TcpStream::connect_timeout(&nobody, ANSWER);
            let answered = || {
                let answer = space.within(ask);
                answer.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
            };
            let deadline = Instant::now() + PATIENCE;
            while answered() == is_cut {
                if Instant::now() >= deadline {
                    return Err(format!(
                        "the link of machine {machine} to {link} is not {state}"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The port of a bridge that a machine is at.
fn port(link: Link, machine: u8) -> String {
    format!("{link}{machine}")
}

/// Runs commands of `ip` in the namespace of this thread.
fn ip(lines: &[String]) -> Result<(), String> {
    let run = || {
        let mut child = Command::new("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut input = child.stdin.take().expect("its input");
        input.write_all((lines.join("\n") + "\n").as_bytes())?;
        drop(input);
        child.wait_with_output()
    };
    let output = run().map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip: {}", String::from_utf8_lossy(&output.stderr))),
    }
}
