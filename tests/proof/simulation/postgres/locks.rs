//! Row locks and advisory locks of the simulated server.

use std::collections::BTreeMap;

use super::tables::Key;

/// Whether a statement waits for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waits {
    /// `SKIP LOCKED`.
    Not,
    /// For `lock_timeout`.
    Long,
}

/// The holder of each lock: the number of a session.
#[derive(Default)]
pub struct Locks {
    rows: BTreeMap<Key, i32>,
    /// The lock that keeps other processes away.
    node: Option<i32>,
    marks: BTreeMap<i64, i32>,
}

impl Locks {
    /// Takes a row's lock, if it is free or the session's already.
    pub fn take(&mut self, key: &Key, pid: i32) -> bool {
        *self.rows.entry(key.clone()).or_insert(pid) == pid
    }

    pub fn take_node(&mut self, pid: i32) -> bool {
        *self.node.get_or_insert(pid) == pid
    }

    pub fn mark(&mut self, mark: i64, pid: i32) {
        self.marks.insert(mark, pid);
    }

    pub fn marked_by(&self, mark: i64) -> Option<i32> {
        self.marks.get(&mark).copied()
    }

    /// A transaction has ended.
    pub fn release_rows(&mut self, pid: i32) {
        self.rows.retain(|_, holder| *holder != pid);
    }

    /// A session has ended.
    pub fn release(&mut self, pid: i32) {
        self.release_rows(pid);
        self.node = self.node.filter(|holder| *holder != pid);
        self.marks.retain(|_, holder| *holder != pid);
    }
}
