//! Where clients call: one process, or the nodes that their load balancer has at the moment.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::support::http::{Answer, Connection};

/// Pause of a client that was not answered.
const AGAIN: Duration = Duration::from_millis(5);

/// Addresses that may be called, shared by all clients.
pub struct Doors {
    open: Mutex<Vec<SocketAddr>>,
    /// Whether clients go on where nobody answers.
    endures: bool,
    /// How often each answer was given since they were taken.
    answers: Mutex<BTreeMap<String, u64>>,
}

impl From<SocketAddr> for Doors {
    /// The one door of a process; who finds it closed gives up.
    fn from(address: SocketAddr) -> Self {
        Doors {
            open: Mutex::new(vec![address]),
            endures: false,
            answers: Mutex::default(),
        }
    }
}

impl Doors {
    /// Doors of which any may be closed, for a while all of them.
    pub fn of_nodes(addresses: Vec<SocketAddr>) -> Self {
        Doors {
            open: Mutex::new(addresses),
            endures: true,
            answers: Mutex::default(),
        }
    }

    /// The addresses at the moment; the load balancer may change them.
    pub fn open(&self) -> MutexGuard<'_, Vec<SocketAddr>> {
        self.open.lock().expect("the doors")
    }

    /// The answers since the last call, each with its number.
    pub fn take_answers(&self) -> BTreeMap<String, u64> {
        std::mem::take(&mut self.answers.lock().expect("the answers"))
    }

    fn count(&self, answer: &std::io::Result<Answer>) {
        let name = match answer {
            Ok(answer) if answer.status >= 400 => format!("{} {}", answer.status, answer.code()),
            Ok(answer) => answer.status.to_string(),
            Err(_) => "none".to_owned(),
        };
        if answer.is_err() && self.endures {
            // As a client that waits a moment before it tries again.
            std::thread::sleep(AGAIN);
        }
        let mut answers = self.answers.lock().expect("the answers");
        *answers.entry(name).or_default() += 1;
    }
}

/// The connections of one client, which it keeps.
pub struct Caller<'a> {
    doors: &'a Doors,
    connections: Vec<(SocketAddr, Connection)>,
    patience: Option<Duration>,
}

impl<'a> Caller<'a> {
    /// One without connections.
    pub fn new(doors: &'a Doors) -> Self {
        Caller {
            doors,
            connections: Vec::new(),
            patience: None,
        }
    }

    /// One that waits no longer than this for an answer.
    pub fn with_patience(doors: &'a Doors, patience: Duration) -> Self {
        Caller {
            patience: Some(patience),
            ..Self::new(doors)
        }
    }

    /// Asks at the door of this turn. An error: nobody answers there, or the connection ended before the answer.
    pub fn call(
        &mut self,
        turn: usize,
        ask: impl FnOnce(&mut Connection) -> std::io::Result<Answer>,
    ) -> std::io::Result<Answer> {
        let answer = self.ask(turn, ask);
        self.doors.count(&answer);
        answer
    }

    fn ask(
        &mut self,
        turn: usize,
        ask: impl FnOnce(&mut Connection) -> std::io::Result<Answer>,
    ) -> std::io::Result<Answer> {
        let address = {
            let open = self.doors.open();
            let closed = || std::io::Error::other("no door is open");
            *open.get(turn % open.len().max(1)).ok_or_else(closed)?
        };
        let mut connection = match self.connections.iter().position(|(to, _)| *to == address) {
            Some(at) => self.connections.swap_remove(at).1,
            None => Connection::open(address)?,
        };
        if let Some(patience) = self.patience {
            connection.set_patience(patience)?;
        }
        let answer = ask(&mut connection)?;
        self.connections.push((address, connection));
        Ok(answer)
    }

    /// Whether nobody is there any more, so that a client gives up.
    pub fn gives_up(&mut self) -> bool {
        let address = self.doors.open().first().copied();
        !self.doors.endures
            && address
                .and_then(|address| Some((address, Connection::open(address).ok()?)))
                .map(|connected| self.connections.push(connected))
                .is_none()
    }
}
