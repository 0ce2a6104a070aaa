//! What the loop of a connection needs of its client's end.
//!
//! A trait, so that [`super::rehearsal`] can put a script in the place of the socket and drive the
//! very same loop through every split of its input.

use std::io::{self, Read, Write};
use std::net::Shutdown;

use super::peer::{Peer, State};
use crate::http::data_plane::runtime;

/// One connection as its own loop sees it. Nothing here blocks but `wait` and
/// `let_others_go_first`.
pub(super) trait Wire {
    /// The phase as other threads see it.
    fn state(&self) -> State;

    /// Moves the connection on; false when another thread has moved it meanwhile.
    fn enter(&self, from: State, to: State) -> bool;

    /// Says whether large buffers are held while idle.
    fn set_bloated(&self, bloated: bool);

    /// Reads what is there.
    fn read(&self, space: &mut [u8]) -> io::Result<usize>;

    /// Writes what is taken.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Ends our side.
    fn end_writing(&self) -> io::Result<()>;

    /// Waits for any event of the socket, or to be called by the janitor; returns the events.
    fn wait(&self) -> usize;

    /// Gives way to every other connection that has something to do.
    fn let_others_go_first(&self);
}

impl Wire for Peer {
    fn state(&self) -> State {
        Peer::state(self)
    }

    fn enter(&self, from: State, to: State) -> bool {
        Peer::enter(self, from, to)
    }

    fn set_bloated(&self, bloated: bool) {
        Peer::set_bloated(self, bloated);
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
        Peer::wait(self)
    }

    fn let_others_go_first(&self) {
        runtime::yield_to_io();
    }
}
