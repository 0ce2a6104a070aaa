//! A proxy in front of any server: it cuts connections at a chosen byte, goes silent, holds what a client sends, and may
//! lead to another server. For PostgreSQL and its transactions there is `proxy.rs`.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::brokers::{Broker, Kind, Setup, not_run};

/// A host at which proxies wait. All of 127.0.0.0/8 is this machine, at least on Linux.
const HOST: &str = "127.0.0.2";

/// The direction in which bytes are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From clients to the server.
    Up,
    /// From the server to clients.
    Down,
}

/// What happens once the bytes are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every connection is closed.
    Cut,
    /// Nothing passes any more, in either direction, and nothing is closed.
    Silence,
}

struct Rule {
    server: SocketAddr,
    armed: Option<(Way, u64, Fault)>,
    is_silent: bool,
    is_shut: bool,
    /// Bytes that have passed up and down.
    passed: [u64; 2],
    /// Connections with a lower number are held.
    held_below: usize,
    /// Bytes that are held.
    held: u64,
    /// Number of the next connection, and the sockets that may be open.
    next: usize,
    open: Vec<TcpStream>,
}

/// A running proxy. It ends with its process.
#[derive(Clone)]
pub struct Wire {
    rule: Arc<(Mutex<Rule>, Condvar)>,
    address: SocketAddr,
}

impl Wire {
    /// Whether a broker behind a proxy can be had here. If not, that is said loudly.
    pub fn finds_broker(kind: Kind) -> bool {
        match kind.prepared() {
            Ok(()) if cfg!(target_os = "linux") => return true,
            Ok(()) => not_run("not run: only Linux has 127.0.0.2, where the proxy is"),
            Err(reason) => not_run(reason),
        }
        false
    }

    /// Starts a broker that sends its clients through a proxy. `None`, said loudly, if that cannot be had here.
    pub fn before_broker(kind: Kind, setup: Setup) -> Option<(Self, Broker)> {
        if !Self::finds_broker(kind) {
            return None;
        }
        let advertise = Some(HOST);
        let broker = Broker::start_with(kind, Setup { advertise, ..setup })?;
        let server = *broker.addresses().last().expect("an address");
        let at = SocketAddr::new(HOST.parse().expect("an address"), server.port());
        Some((Wire::start(at, server), broker))
    }

    /// Waits at `at` for clients of `server`.
    pub fn start(at: SocketAddr, server: SocketAddr) -> Self {
        let listener = TcpListener::bind(at).unwrap_or_else(|error| panic!("{at}: {error}"));
        let rule = Rule {
            server,
            armed: None,
            is_silent: false,
            is_shut: false,
            passed: [0; 2],
            held_below: 0,
            held: 0,
            next: 0,
            open: Vec::new(),
        };
        let wire = Wire {
            rule: Arc::new((Mutex::new(rule), Condvar::new())),
            address: listener.local_addr().expect("an address"),
        };
        let door = wire.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                door.accept(client);
            }
        });
        wire
    }

    /// Where clients come in.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn rule(&self) -> MutexGuard<'_, Rule> {
        self.rule.0.lock().expect("no thread panics with it")
    }

    fn accept(&self, client: TcpStream) {
        let mut rule = self.rule();
        if rule.is_shut {
            return;
        }
        let Ok(server) = TcpStream::connect(rule.server) else {
            return;
        };
        let number = rule.next;
        rule.next += 1;
        let copy = |socket: &TcpStream| socket.try_clone().expect("a handle of the socket");
        for socket in [&client, &server] {
            socket.set_nodelay(true).expect("no delay");
            rule.open.push(copy(socket));
        }
        drop(rule);
        for (way, from, to) in [
            (Way::Up, copy(&client), copy(&server)),
            (Way::Down, server, client),
        ] {
            let wire = self.clone();
            std::thread::spawn(move || wire.pass(number, way, from, to));
        }
    }

    /// Strikes after `bytes` more in this direction, on whichever connections. With 0 the first byte strikes.
    pub fn arm(&self, way: Way, bytes: u64, fault: Fault) {
        self.rule().armed = Some((way, bytes, fault));
    }

    /// Whether it has struck.
    pub fn has_struck(&self) -> bool {
        self.rule().armed.is_none()
    }

    /// Passes everything on again, on new connections: those that are there are closed. Says whether it has struck.
    pub fn heal(&self) -> bool {
        let mut rule = self.rule();
        let struck = rule.armed.take().is_none();
        (rule.is_silent, rule.is_shut, rule.held_below) = (false, false, 0);
        rule.close();
        drop(rule);
        self.rule.1.notify_all();
        struck
    }

    /// Bytes that `action` sends up and gets down.
    pub fn measure(&self, action: impl FnOnce()) -> [u64; 2] {
        let before = self.rule().passed;
        action();
        let after = self.rule().passed;
        [after[0] - before[0], after[1] - before[1]]
    }

    /// Takes in what clients of the present connections send, and passes it on only after [`Wire::release`].
    pub fn hold(&self) {
        let mut rule = self.rule();
        (rule.held_below, rule.held) = (rule.next, 0);
    }

    /// Whether something is held.
    pub fn holds_something(&self) -> bool {
        self.rule().held > 0
    }

    /// Passes on what was held.
    pub fn release(&self) {
        self.rule().held_below = 0;
        self.rule.1.notify_all();
    }

    /// Closes all connections, and every further one until [`Wire::heal`].
    pub fn shut(&self) {
        let mut rule = self.rule();
        rule.is_shut = true;
        rule.close();
    }

    /// Leads to another server from now on.
    pub fn lead_to(&self, server: SocketAddr) {
        let mut rule = self.rule();
        rule.server = server;
        rule.close();
    }

    fn pass(&self, number: usize, way: Way, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let mut rule = self.rule();
            if way == Way::Up && number < rule.held_below {
                rule.held += count as u64;
                let go_on = |rule: &mut Rule| number < rule.held_below;
                rule = self.rule.1.wait_while(rule, go_on).expect("no panic");
            }
            let (allowed, strikes) = rule.admit(way, count as u64);
            drop(rule);
            let passed = to.write_all(&buffer[..allowed as usize]);
            if strikes {
                self.rule().close();
            }
            if passed.is_err() || strikes {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

impl Rule {
    fn close(&mut self) {
        for socket in self.open.drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// The bytes of `count` that pass, and whether all connections are cut then.
    fn admit(&mut self, way: Way, count: u64) -> (u64, bool) {
        if self.is_silent {
            return (0, false);
        }
        let (mut allowed, mut strikes) = (count, false);
        if let Some((armed, left, fault)) = &mut self.armed
            && *armed == way
        {
            allowed = count.min(*left);
            *left -= allowed;
            if *left == 0 {
                strikes = *fault == Fault::Cut;
                self.is_silent = !strikes;
                self.armed = None;
            }
        }
        self.passed[usize::from(way == Way::Down)] += allowed;
        (allowed, strikes)
    }
}
