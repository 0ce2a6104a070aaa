//! A simulated PostgreSQL: sessions that speak its protocol, transactions with row locks, and everything that can
//! happen to a server and the way to it.

mod copied;
mod locks;
mod session;
mod statements;
pub mod tables;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use tokio::io::DuplexStream;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::Instant;

use self::locks::Locks;
use self::session::{Session, Statement};
use self::statements::known;
use self::tables::{Committed, Key, Row, Sku, View, Written};

/// What happens to the next COMMIT of a numbered transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitFault {
    /// The connection ends, and nothing is committed.
    CutBefore,
    /// It is committed, and the connection ends without an answer.
    CutAfter,
    /// Nothing more is heard of the session, which keeps its locks.
    HangsBefore,
    /// It is committed, and nothing more is heard of the session.
    HangsAfter,
}

impl CommitFault {
    pub const ALL: [CommitFault; 4] = [
        CommitFault::CutBefore,
        CommitFault::CutAfter,
        CommitFault::HangsBefore,
        CommitFault::HangsAfter,
    ];
}

/// A trigger that somebody has made on `orders`: it does not want orders for so many units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trigger {
    pub quantity: i32,
    /// It drops their rows without an error.
    pub drops: bool,
}

/// The number of no session: who edits rows by hand.
const BY_HAND: i32 = 1;

/// The server.
pub struct Server {
    inner: RefCell<Inner>,
    released: Notify,
}

struct Inner {
    committed: Committed,
    locks: Locks,
    sessions: BTreeMap<i32, (String, Option<AbortHandle>)>,
    next_pid: i32,
    next_payment: i64,
    next_letter: i64,
    /// A check that somebody has added: `held` of a SKU may not exceed this.
    held_max: BTreeMap<i32, i64>,
    trigger: Option<Trigger>,
    /// Orders whose rows were refused.
    refused: BTreeSet<i64>,
    timeline: u32,
    is_away: bool,
    stalled_until: Option<Instant>,
    commit_fault: Option<CommitFault>,
    /// Whether answers to COMMITs of parked orders and dead letters, which are few, get lost by themselves.
    loses_answers: bool,
    random: StdRng,
    commits: u64,
    statements: BTreeMap<String, Statement>,
}

impl Server {
    pub fn new(random: StdRng) -> Rc<Self> {
        let inner = Inner {
            committed: Committed::default(),
            locks: Locks::default(),
            sessions: BTreeMap::new(),
            next_pid: 100,
            next_payment: 1,
            next_letter: 1,
            held_max: BTreeMap::new(),
            trigger: None,
            refused: BTreeSet::new(),
            timeline: 1,
            is_away: false,
            stalled_until: None,
            commit_fault: None,
            loses_answers: false,
            random,
            commits: 0,
            statements: BTreeMap::new(),
        };
        Rc::new(Server {
            inner: RefCell::new(inner),
            released: Notify::new(),
        })
    }

    /// Puts SKUs on sale, before any process is there.
    pub fn sell(&self, skus: impl IntoIterator<Item = Sku>) {
        let rows = (1..).map(Key::Sku).zip(skus);
        let rows = rows.map(|(key, sku)| (key, Some(Rc::new(Row::Sku(sku)))));
        let mut inner = self.inner.borrow_mut();
        inner.committed.commit(rows.collect());
        inner.committed.replicate();
    }

    /// Serves a new connection, unless the server is away.
    pub fn accept(self: &Rc<Self>, stream: DuplexStream) {
        let mut inner = self.inner.borrow_mut();
        if inner.is_away {
            return;
        }
        inner.next_pid += 1;
        let pid = inner.next_pid;
        let session = Session::new(Rc::clone(self), pid);
        // Spawned before it is entered, and polled after both.
        let task = spawn_local(session.serve(stream)).abort_handle();
        inner.sessions.insert(pid, (String::new(), Some(task)));
    }

    // --- What a simulation does to it ---

    /// Nobody is heard before this moment.
    pub fn stall_until(&self, until: Instant) {
        self.inner.borrow_mut().stalled_until = Some(until);
    }

    pub fn set_commit_fault(&self, fault: CommitFault) {
        self.inner.borrow_mut().commit_fault = Some(fault);
    }

    pub fn set_loses_answers(&self, loses: bool) {
        self.inner.borrow_mut().loses_answers = loses;
    }

    /// Ends every session; with `away` none is let in until [`Server::back`].
    pub fn cut_all(&self, away: bool) {
        let pids: Vec<i32> = {
            let mut inner = self.inner.borrow_mut();
            inner.is_away |= away;
            inner.sessions.keys().copied().collect()
        };
        pids.into_iter()
            .for_each(|pid| _ = self.end_session(pid, None));
    }

    /// Ends one session, if there is any.
    pub fn cut_one(&self) -> bool {
        let pid = {
            let mut inner = self.inner.borrow_mut();
            let pids: Vec<i32> = inner.sessions.keys().copied().collect();
            if pids.is_empty() {
                return false;
            }
            pids[inner.random.random_range(0..pids.len())]
        };
        self.end_session(pid, None)
    }

    pub fn back(&self) {
        self.inner.borrow_mut().is_away = false;
    }

    /// A standby that lags by so many commits is promoted. Returns the rows that these had changed.
    pub fn fail_over(&self, lag: usize) -> BTreeSet<Key> {
        self.cut_all(false);
        let mut inner = self.inner.borrow_mut();
        inner.timeline += 1;
        inner.committed.lose(lag)
    }

    /// Adds a check to the counters of a SKU, or drops it.
    pub fn check_held(&self, sku: i32, most: Option<i64>) {
        let held_max = &mut self.inner.borrow_mut().held_max;
        match most {
            Some(most) => drop(held_max.insert(sku, most)),
            None => drop(held_max.remove(&sku)),
        }
    }

    /// Edits the row of a SKU, as soon as no transaction has it.
    pub async fn edit(&self, sku: i32, edit: impl FnOnce(&mut Sku)) {
        let key = Key::Sku(sku);
        while !self.take_lock(&key, BY_HAND) {
            self.released().await;
        }
        let Some(mut row) = self.look(|rows| rows.sku(&key)) else {
            return self.rolled_back(BY_HAND);
        };
        edit(&mut row);
        let written = Written::from([(key, Some(Rc::new(Row::Sku(row))))]);
        self.commit(BY_HAND, written);
    }

    pub fn set_trigger(&self, trigger: Option<Trigger>) {
        self.inner.borrow_mut().trigger = trigger;
    }

    /// Whether the row of an order was refused at some time.
    pub fn has_refused(&self, order: i64) -> bool {
        self.inner.borrow().refused.contains(&order)
    }

    pub fn commits(&self) -> u64 {
        self.inner.borrow().commits
    }

    /// Looks at the committed rows.
    pub fn look<T>(&self, look: impl FnOnce(&View<'_>) -> T) -> T {
        self.view(&Written::new(), look)
    }

    // --- For its sessions ---

    fn view<T>(&self, written: &Written, look: impl FnOnce(&View<'_>) -> T) -> T {
        let inner = self.inner.borrow();
        let committed = &inner.committed.rows;
        look(&View { committed, written })
    }

    fn named(&self, pid: i32, name: String) {
        if let Some(session) = self.inner.borrow_mut().sessions.get_mut(&pid) {
            session.0 = name;
        }
    }

    /// The way to the server and back takes its time.
    async fn delay(&self) {
        let micros = {
            let mut inner = self.inner.borrow_mut();
            match inner.random.random_range(0..100) {
                0 => inner.random.random_range(5_000..80_000),
                1..10 => inner.random.random_range(1_000..5_000),
                _ => inner.random.random_range(100..1_000),
            }
        };
        tokio::time::sleep(Duration::from_micros(micros)).await;
        loop {
            let until = self.inner.borrow().stalled_until;
            match until.filter(|until| *until > Instant::now()) {
                Some(until) => tokio::time::sleep_until(until).await,
                None => return,
            }
        }
    }

    fn commit(&self, pid: i32, written: Written) {
        let mut inner = self.inner.borrow_mut();
        inner.commits += u64::from(!written.is_empty());
        inner.committed.commit(written);
        inner.locks.release_rows(pid);
        drop(inner);
        self.released.notify_waiters();
    }

    fn rolled_back(&self, pid: i32) {
        self.inner.borrow_mut().locks.release_rows(pid);
        self.released.notify_waiters();
    }

    /// A session's task is gone.
    fn ended(&self, pid: i32) {
        let mut inner = self.inner.borrow_mut();
        inner.locks.release(pid);
        inner.sessions.remove(&pid);
        drop(inner);
        self.released.notify_waiters();
    }

    /// Ends a session, if it bears this name.
    fn end_session(&self, pid: i32, name: Option<&str>) -> bool {
        let task = {
            let mut inner = self.inner.borrow_mut();
            let Some(session) = inner.sessions.get_mut(&pid) else {
                return false;
            };
            if name.is_some_and(|name| session.0 != name) {
                return false;
            }
            session.1.take()
        };
        if let Some(task) = task {
            task.abort();
        }
        true
    }

    /// The statement of a text, if it is one of ours.
    fn statement(&self, text: &str) -> Option<Statement> {
        let mut inner = self.inner.borrow_mut();
        if let Some(statement) = inner.statements.get(text) {
            return Some(statement.clone());
        }
        let statement = known(text)?;
        inner.statements.insert(text.to_owned(), statement.clone());
        Some(statement)
    }

    fn take_lock(&self, key: &Key, pid: i32) -> bool {
        self.inner.borrow_mut().locks.take(key, pid)
    }

    fn released(&self) -> Notified<'_> {
        self.released.notified()
    }

    fn lock_out(&self, pid: i32) -> bool {
        self.inner.borrow_mut().locks.take_node(pid)
    }

    fn mark(&self, mark: i64, pid: i32) {
        self.inner.borrow_mut().locks.mark(mark, pid);
    }

    fn marked_by(&self, mark: i64) -> Option<i32> {
        self.inner.borrow().locks.marked_by(mark)
    }

    fn next_payment(&self) -> i64 {
        let mut inner = self.inner.borrow_mut();
        inner.next_payment += 1;
        inner.next_payment - 1
    }

    fn next_letter(&self) -> i64 {
        let mut inner = self.inner.borrow_mut();
        inner.next_letter += 1;
        inner.next_letter - 1
    }

    fn held_max(&self, sku: i32) -> Option<i64> {
        self.inner.borrow().held_max.get(&sku).copied()
    }

    fn trigger(&self) -> Option<Trigger> {
        self.inner.borrow().trigger
    }

    fn note_refused(&self, order: i64) {
        self.inner.borrow_mut().refused.insert(order);
    }

    fn timeline(&self) -> String {
        format!("{:08X}", self.inner.borrow().timeline)
    }

    /// What happens to a COMMIT. `is_numbered`: it has the number of its writer.
    fn take_commit_fault(&self, is_numbered: bool) -> Option<CommitFault> {
        let mut inner = self.inner.borrow_mut();
        if is_numbered {
            return inner.commit_fault.take();
        }
        let is_lost = inner.loses_answers && inner.random.random_ratio(1, 8);
        let number = inner.random.random_range(0..CommitFault::ALL.len());
        is_lost.then_some(CommitFault::ALL[number])
    }
}
