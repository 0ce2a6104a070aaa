//! The client's end of a connection, as the loop of the connection uses it.
//!
//! A trait, so that [`super::scripted`] can replace the socket by a script and drive the same loop
//! through every split of its input.

use std::io::{self, Read, Write};
use std::net::Shutdown;

use super::conn_state::{ConnState, PhaseStamp};
use crate::http::server::runtime;

/// One connection as its own loop sees it. Nothing here blocks but `wait` and
/// `let_others_go_first`.
pub(super) trait Transport {
    /// The phase as other threads see it.
    fn state(&self) -> PhaseStamp;

    /// Moves the connection on; false when another thread has moved it meanwhile.
    fn enter(&self, from: PhaseStamp, to: PhaseStamp) -> bool;

    /// Says whether large buffers are held while idle.
    fn set_bloated(&self, bloated: bool);

    /// Reads what is there.
    fn read(&self, space: &mut [u8]) -> io::Result<usize>;

    /// Writes what is taken.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Ends our side.
    fn end_writing(&self) -> io::Result<()>;

    /// Waits for any event of the socket, or to be called by the reaper; returns the events.
    fn wait(&self) -> usize;

    /// Gives way to every other connection that has something to do.
    fn let_others_go_first(&self);
}

impl Transport for ConnState {
    fn state(&self) -> PhaseStamp {
        ConnState::state(self)
    }

    fn enter(&self, from: PhaseStamp, to: PhaseStamp) -> bool {
        ConnState::enter(self, from, to)
    }

    fn set_bloated(&self, bloated: bool) {
        ConnState::set_bloated(self, bloated);
    }

    fn read(&self, space: &mut [u8]) -> io::Result<usize> {
        self.socket().read(space)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.socket().write(bytes)
    }

    fn end_writing(&self) -> io::Result<()> {
        self.socket().shutdown(Shutdown::Write)
    }

    fn wait(&self) -> usize {
        ConnState::wait(self)
    }

    fn let_others_go_first(&self) {
        runtime::yield_to_io();
    }
}
