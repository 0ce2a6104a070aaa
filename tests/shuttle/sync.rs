//! The same names as `src/sync.rs`, of shuttle: every access is a place at which another thread
//! may go on.

use std::borrow::Borrow;
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

    pub use shuttle::thread::Builder;
    pub type JoinHandle = shuttle::thread::JoinHandle<()>;

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
pub struct Found<K>(K);

impl<K> Found<K> {
    pub fn key(&self) -> &K {
        &self.0
    }
}

impl<K: Hash + Eq + Clone, V, S> DashMap<K, V, S> {
    pub fn with_capacity_and_hasher(_capacity: usize, _hasher: S) -> Self {
        DashMap {
            shards: Default::default(),
            hasher: PhantomData,
        }
    }

    fn shard<Q: Hash + ?Sized>(&self, key: &Q) -> Shard<'_, K, V> {
        let shard = Alike::default().hash_one(key) as usize % self.shards.len();
        self.shards[shard].lock()
    }

    pub fn entry(&self, key: K) -> Entry<'_, K, V> {
        let shard = self.shard(&key);
        let is_there = shard.contains_key(&key);
        let place = Place { shard, key };
        if is_there {
            Entry::Occupied(place)
        } else {
            Entry::Vacant(place)
        }
    }

    pub fn get<Q>(&self, key: &Q) -> Option<Found<K>>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let shard = self.shard(key);
        let (key, _) = shard.get_key_value(key)?;
        Some(Found(key.clone()))
    }

    pub fn remove<Q>(&self, key: &Q) -> Option<(K, V)>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.shard(key).remove_entry(key)
    }

    pub fn remove_if<Q>(&self, key: &Q, condition: impl FnOnce(&K, &V) -> bool) -> Option<(K, V)>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let mut shard = self.shard(key);
        match shard.get_key_value(key) {
            Some((known, value)) if condition(known, value) => shard.remove_entry(key),
            _ => None,
        }
    }

    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn iter(&self) -> impl Iterator<Item = Found<K>> {
        let keys = |shard: &Mutex<HashMap<K, V, Alike>>| -> Vec<K> {
            shard.lock().keys().cloned().collect()
        };
        self.shards.iter().flat_map(keys).map(Found)
    }
}

impl<'a, K: Hash + Eq + Clone, V, S> IntoIterator for &'a DashMap<K, V, S> {
    type Item = Found<K>;
    type IntoIter = Box<dyn Iterator<Item = Found<K>> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}

type Shard<'a, K, V> = MutexGuard<'a, HashMap<K, V, Alike>>;

/// Where a key is or would be; its shard stays locked.
pub enum Entry<'a, K, V> {
    Occupied(Place<'a, K, V>),
    Vacant(Place<'a, K, V>),
}

pub struct Place<'a, K, V> {
    shard: Shard<'a, K, V>,
    key: K,
}

impl<K: Hash + Eq, V> Place<'_, K, V> {
    /// Where it is vacant.
    pub fn insert(mut self, value: V) {
        self.shard.insert(self.key, value);
    }

    /// Where it is occupied. Unlike an insertion it replaces the key as well.
    pub fn replace_entry(mut self, value: V) -> (K, V) {
        let old = self.shard.remove_entry(&self.key);
        self.shard.insert(self.key, value);
        old.expect("it is occupied")
    }
}
