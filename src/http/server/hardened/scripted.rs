//! The loop of a connection on a script instead of a socket, for the fuzzer and for tests. The
//! caller decides every split of the input, every short write and the ending; neither time nor
//! another thread is involved.

use std::cell::{Cell, RefCell};
use std::io::{self, ErrorKind};
use std::task::Waker;

use super::conn_state::{Phase, PhaseStamp};
use super::connection::Connection;
use super::counters::CloseReason;
use super::shared::Shared;
use super::transport::Transport;
use crate::http::server::Service;
use crate::http::server::limits::Limits;

// Of epoll(7).
const READABLE: usize = 0x1;
const WRITABLE: usize = 0x4;
const SHUT_DOWN: usize = 0x2000;

/// The events after the last piece of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The client ends its side, later.
    Apart,
    /// The client ended its side together with the last piece; no further event announces it.
    Together,
    /// Silence, until the deadline that applies.
    Silence,
}

/// The output of a scripted connection.
#[derive(Debug)]
pub struct ScriptedRun {
    /// Every byte that the client was sent.
    pub output: Vec<u8>,
    /// Why the connection ended.
    pub reason: CloseReason,
}

/// Runs one connection that receives `pieces`, each with an event of its own. Its client takes
/// output in turns of `takes` bytes, repeated; everything at once if `takes` is empty.
///
/// The service must not park.
///
/// # Panics
///
/// If the loop waits for an event that would never come, or keeps asking a socket that has
/// nothing: with a real socket it would hang or burn a core.
pub fn run<S: Service>(
    service: &S,
    limits: Limits,
    pieces: &[&[u8]],
    takes: &[usize],
    ending: Ending,
) -> ScriptedRun {
    let shared = Shared::new(limits);
    let script = Script {
        pieces,
        takes,
        ending,
        next: Cell::new(0),
        read: Cell::new(0),
        taken: Cell::new(0),
        blocked: Cell::new(false),
        told_nothing: Cell::new(0),
        ended: Cell::new(false),
        unseen: Cell::new(true),
        state: Cell::new(PhaseStamp::new(Phase::Idle, 0)),
        output: RefCell::default(),
    };
    let reason = Connection::new(&shared, &script, service, Waker::noop().clone()).run();
    ScriptedRun {
        output: script.output.into_inner(),
        reason,
    }
}

struct Script<'s> {
    pieces: &'s [&'s [u8]],
    takes: &'s [usize],
    ending: Ending,
    // The piece at hand and how much of it was read.
    next: Cell<usize>,
    read: Cell<usize>,
    // Writes so far, and whether the last one was refused.
    taken: Cell<usize>,
    blocked: Cell<bool>,
    told_nothing: Cell<u32>,
    ended: Cell<bool>,
    // The first piece is read before its event is looked at; the first wait returns at once.
    unseen: Cell<bool>,
    state: Cell<PhaseStamp>,
    output: RefCell<Vec<u8>>,
}

impl Script<'_> {
    fn unread(&self) -> &[u8] {
        let piece = self.pieces.get(self.next.get()).copied();
        piece
            .and_then(|piece| piece.get(self.read.get()..))
            .unwrap_or_default()
    }

    fn is_last(&self) -> bool {
        self.next.get() + 1 >= self.pieces.len()
    }

    fn end_is_here(&self) -> bool {
        self.ended.get() || (self.is_last() && self.ending == Ending::Together)
    }

    /// The event of the piece at hand.
    fn arrival(&self) -> usize {
        READABLE | if self.end_is_here() { SHUT_DOWN } else { 0 }
    }

    fn nothing(&self) -> io::Error {
        self.told_nothing.set(self.told_nothing.get() + 1);
        assert!(self.told_nothing.get() < 3, "asks again without waiting");
        ErrorKind::WouldBlock.into()
    }
}

impl Transport for Script<'_> {
    fn state(&self) -> PhaseStamp {
        self.state.get()
    }

    fn enter(&self, from: PhaseStamp, to: PhaseStamp) -> bool {
        let same = self.state.get() == from;
        if same {
            self.state.set(to);
        }
        same
    }

    fn set_bloated(&self, _: bool) {}

    fn read(&self, space: &mut [u8]) -> io::Result<usize> {
        assert!(!space.is_empty(), "reads into no space");
        let count = {
            let unread = self.unread();
            let count = unread.len().min(space.len());
            if let (Some(space), Some(bytes)) = (space.get_mut(..count), unread.get(..count)) {
                space.copy_from_slice(bytes);
            }
            count
        };
        self.read.set(self.read.get() + count);
        if count == 0 && !self.end_is_here() {
            return Err(self.nothing());
        }
        Ok(count)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        if self.takes.is_empty() {
            self.output.borrow_mut().extend_from_slice(bytes);
            return Ok(bytes.len());
        }
        let turn = self.taken.get();
        // Every other time nothing is taken, so that short writes and waits both occur.
        if turn % 2 == 1 && !self.blocked.get() {
            self.blocked.set(true);
            return Err(self.nothing());
        }
        self.blocked.set(false);
        self.taken.set(turn + 1);
        let most = self.takes.iter().cycle().nth(turn / 2 % self.takes.len());
        let most = most.map_or(1, |most| (*most).max(1));
        let count = bytes.len().min(most);
        self.output
            .borrow_mut()
            .extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn end_writing(&self) -> io::Result<()> {
        Ok(())
    }

    fn wait(&self) -> usize {
        self.told_nothing.set(0);
        if self.blocked.get() {
            return WRITABLE;
        }
        if self.unseen.take() {
            return self.arrival();
        }
        assert!(self.unread().is_empty(), "waits with bytes unread");
        assert!(!self.end_is_here(), "waits after the end");
        if !self.is_last() {
            self.next.set(self.next.get() + 1);
            self.read.set(0);
            return self.arrival();
        }
        if self.ending == Ending::Silence && self.state.get().phase() == Phase::Reading {
            // As the reaper does to a request that is not complete in time.
            self.state.set(PhaseStamp::new(Phase::Late, 1));
            return 0;
        }
        self.ended.set(true);
        READABLE | SHUT_DOWN
    }

    fn let_others_go_first(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::message::{Request, Response};

    struct Echo;

    impl Service for Echo {
        fn call(&self, request: &Request<'_>, response: &mut Response) {
            response.body_mut().extend_from_slice(request.body);
        }
    }

    /// Without what depends on the moment or, rightly, on the split.
    fn answers(pieces: &[&[u8]], ending: Ending) -> Vec<String> {
        let output = run(&Echo, Limits::default(), pieces, &[7, 300], ending).output;
        String::from_utf8(output)
            .expect("ASCII")
            .lines()
            .filter(|line| !line.starts_with("Date: ") && !line.contains("100 Continue"))
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn no_split_changes_an_answer() {
        let inputs: [&[u8]; 5] = [
            b"GET /a HTTP/1.1\r\nHost: h\r\n\r\nPOST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi",
            b"POST /b HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
            b"GET /a HTTP/1.0\r\n\r\nGET /b HTTP/1.0\r\n\r\n",
            b"GET /a HTTP/1.1\r\nHost: h\r\n\r\nGET / HTTP/1.1\r\nHost : h\r\n\r\n",
            // Wrong from its seventh byte on, and never complete.
            b"GET /a\0 HTTP/1.1\r\nHost: h\r\n",
        ];
        for input in inputs {
            let whole = answers(&[input], Ending::Apart);
            assert!(!whole.is_empty());
            assert_eq!(answers(&[input], Ending::Together), whole);
            for at in 1..input.len() {
                let (before, after) = input.split_at(at);
                for ending in [Ending::Apart, Ending::Together] {
                    assert_eq!(
                        answers(&[before, after], ending),
                        whole,
                        "at {at}, {ending:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_began_and_falls_silent_is_told_that_it_is_late() {
        for input in [
            "G",
            "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab",
        ] {
            let limits = Limits::default();
            let scripted = run(&Echo, limits, &[input.as_bytes()], &[], Ending::Silence);
            assert_eq!(scripted.reason, CloseReason::RequestTimeout);
            assert!(
                scripted
                    .output
                    .starts_with(b"HTTP/1.1 408 Request Timeout\r\n")
            );
        }
        let quiet = run(&Echo, Limits::default(), &[b""], &[], Ending::Silence);
        assert!(quiet.output.is_empty());
    }
}
