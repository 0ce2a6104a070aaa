//! The same names as `src/sync.rs`, of shuttle: every access is a place at which another thread
//! may go on.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

pub use std::task::Waker;

pub use shuttle::hint::spin_loop as spin;
pub use shuttle::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
// Never waits inside; what is before and after it are accesses to the atomics above.
pub use tokio::sync::Notify;

pub mod thread {
    use std::sync::Arc;

    pub use shuttle::thread::{Builder, JoinHandle};

    use super::{Condvar, Mutex};

    shuttle::thread_local! {
        static CURRENT: Thread = Thread::default();
    }

    /// As std's, but it never wakes for no reason, as shuttle's own does: that would hide a wake-up
    /// that is lost.
    #[derive(Clone, Debug, Default)]
    pub struct Thread(Arc<(Mutex<bool>, Condvar)>);

    impl Thread {
        pub fn unpark(&self) {
            *self.0.0.lock() = true;
            self.0.1.notify_all();
        }
    }

    pub fn current() -> Thread {
        CURRENT.with(Thread::clone)
    }

    pub fn park() {
        let Thread(place) = current();
        let mut may_go_on = place.0.lock();
        while !std::mem::take(&mut *may_go_on) {
            place.1.wait(&mut may_go_on);
        }
    }

    /// Time may pass at any moment.
    pub fn park_timeout(_limit: std::time::Duration) {
        shuttle::thread::yield_now();
    }
}

/// A place at which another thread may go on.
#[derive(Debug, Default)]
pub struct Switch(AtomicU8);

impl Switch {
    pub fn here(&self) {
        self.0.load(Ordering::SeqCst);
    }
}

/// crossbeam's ring, whose calls each are one step.
#[derive(Debug)]
pub struct ArrayQueue<T> {
    items: crossbeam::queue::ArrayQueue<T>,
    switch: Switch,
}

impl<T> ArrayQueue<T> {
    pub fn new(capacity: usize) -> Self {
        ArrayQueue {
            items: crossbeam::queue::ArrayQueue::new(capacity),
            switch: Switch::default(),
        }
    }

    fn items(&self) -> &crossbeam::queue::ArrayQueue<T> {
        self.switch.here();
        &self.items
    }

    pub fn push(&self, item: T) -> Result<(), T> {
        self.items().push(item)
    }

    pub fn pop(&self) -> Option<T> {
        self.items().pop()
    }

    pub fn len(&self) -> usize {
        self.items().len()
    }

    pub fn is_empty(&self) -> bool {
        self.items().is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.items().is_full()
    }

    pub fn capacity(&self) -> usize {
        self.items.capacity()
    }
}

#[derive(Debug, Default)]
pub struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    switch: Switch,
}

impl<T> OnceLock<T> {
    pub fn new() -> Self {
        OnceLock {
            value: std::sync::OnceLock::new(),
            switch: Switch::default(),
        }
    }

    pub fn get(&self) -> Option<&T> {
        self.switch.here();
        self.value.get()
    }

    pub fn set(&self, value: T) -> Result<(), T> {
        self.switch.here();
        self.value.set(value)
    }
}

/// As parking_lot's.
#[derive(Debug, Default)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

/// `None` only while its thread waits for a [`Condvar`].
#[derive(Debug)]
pub struct MutexGuard<'a, T>(Option<shuttle::sync::MutexGuard<'a, T>>, &'a Mutex<T>);

impl<T> Mutex<T> {
    pub fn new(value: T) -> Self {
        Mutex(shuttle::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().expect("nobody panicked")), self)
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("locked")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("locked")
    }
}

/// As parking_lot's.
#[derive(Debug, Default)]
pub struct Condvar(shuttle::sync::Condvar);

impl Condvar {
    pub fn new() -> Self {
        Condvar::default()
    }

    pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let locked = guard.0.take().expect("locked");
        guard.0 = Some(self.0.wait(locked).expect("nobody panicked"));
    }

    /// Time may pass at any moment.
    pub fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _limit: Duration) {
        guard.0 = None;
        shuttle::thread::yield_now();
        guard.0 = Some(guard.1.0.lock().expect("nobody panicked"));
    }

    pub fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[derive(Debug, Default)]
pub struct Guarded<T>(Mutex<T>);

impl<T> Guarded<T> {
    pub fn new(value: T) -> Self {
        Guarded(Mutex::new(value))
    }

    pub fn with<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut self.0.lock())
    }
}

/// Hashes alike in each run, so that a seed repeats what it has shown.
type Alike = BuildHasherDefault<DefaultHasher>;

/// A map in two shards, of which a walk sees one after the other, as dashmap's does.
#[derive(Debug)]
pub struct DashMap<K, V, S = Alike> {
    shards: [Mutex<HashMap<K, V, Alike>>; 2],
    hasher: PhantomData<S>,
}

/// What a look-up or a walk finds.
#[derive(Debug)]
pub struct Found<V>(V);

impl<V> Found<V> {
    pub fn value(&self) -> &V {
        &self.0
    }
}

impl<V> Deref for Found<V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.0
    }
}

impl<K: Hash + Eq, V: Clone, S> DashMap<K, V, S> {
    pub fn with_capacity_and_hasher(_capacity: usize, _hasher: S) -> Self {
        DashMap {
            shards: Default::default(),
            hasher: PhantomData,
        }
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, HashMap<K, V, Alike>> {
        let shard = Alike::default().hash_one(key) as usize % self.shards.len();
        self.shards[shard].lock()
    }

    pub fn insert(&self, key: K, value: V) -> Option<V> {
        self.shard(&key).insert(key, value)
    }

    pub fn get(&self, key: &K) -> Option<Found<V>> {
        self.shard(key).get(key).cloned().map(Found)
    }

    pub fn remove(&self, key: &K) -> Option<V> {
        self.shard(key).remove(key)
    }

    pub fn remove_if(&self, key: &K, condition: impl FnOnce(&K, &V) -> bool) -> Option<V> {
        let mut shard = self.shard(key);
        match shard.get(key) {
            Some(value) if condition(key, value) => shard.remove(key),
            _ => None,
        }
    }

    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = Found<V>> {
        let values = |shard: &Mutex<HashMap<K, V, Alike>>| -> Vec<V> {
            shard.lock().values().cloned().collect()
        };
        self.shards.iter().flat_map(values).map(Found)
    }
}

impl<'a, K: Hash + Eq, V: Clone, S> IntoIterator for &'a DashMap<K, V, S> {
    type Item = Found<V>;
    type IntoIter = Box<dyn Iterator<Item = Found<V>> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}
