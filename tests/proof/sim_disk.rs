//! A disk in memory that forgets what was not synced, and fails when it is told to.
//!
//! It records every operation that changes it, in order. [`Recording::states`] walks through the
//! recording again, and at each point the disk can lose its power ([`State::crash`]):
//!
//! * a file's content is durable once its `sync` returned. Of each sector of 512 bytes that was
//!   written since, the crash keeps the old content or any of the newer ones, each sector for
//!   itself: that is dropping, tearing and reordering;
//! * a name is durable once `sync_directory` returned. Of later changes of names the crash keeps
//!   the first few, as a journaling file system does;
//! * a sync that fails leaves some of the sectors on the disk and the others not, and for each it
//!   is decided: a later sync of the file succeeds and changes nothing about them, as on Linux
//!   ("Can Applications Recover from fsync Failures?", Rebello et al., 2020). Reading still
//!   shows what was written, as the page cache does.
//!
//! A process uses the disk through a [`Handle`], which can die: from then on it changes nothing, as
//! after kill -9. What it wrote stays, synced or not, as in the page cache.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use millrace::queue::journal::disk::{Disk, DiskFile};
use millrace::queue::journal::sector::SECTOR;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng, SeedableRng};

type FileId = usize;

/// What is found on a disk after a crash: each file's name and content.
pub type Image = BTreeMap<String, Arc<Vec<u8>>>;

/// One operation that changes the disk.
#[derive(Clone, Debug)]
pub enum Op {
    Create {
        name: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Remove {
        name: String,
    },
    SyncDirectory,
    Allocate {
        file: FileId,
        bytes: u64,
    },
    Write {
        file: FileId,
        offset: u64,
        bytes: Arc<[u8]>,
    },
    Sync {
        file: FileId,
    },
    /// What was not synced is decided by `seed`, for good.
    FailedSync {
        file: FileId,
        seed: u64,
    },
    /// The power was lost, and this is what was there afterwards.
    PowerLoss(Arc<Image>),
}

/// The kinds of calls that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Call {
    Write,
    Read,
    Sync,
    Create,
    Open,
    Rename,
    Remove,
    Allocate,
    SyncDirectory,
}

impl Call {
    pub const ALL: [Call; 9] = [
        Call::Write,
        Call::Read,
        Call::Sync,
        Call::Create,
        Call::Open,
        Call::Rename,
        Call::Remove,
        Call::Allocate,
        Call::SyncDirectory,
    ];
}

/// Which call fails, and how.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub call: Call,
    /// Which one, counted from 1 since the fault was set.
    pub nth: u64,
    /// All later ones as well.
    pub sticky: bool,
    /// `EIO` or `ENOSPC`.
    pub errno: rustix::io::Errno,
}

#[derive(Clone, Debug, Default)]
struct FileState {
    /// What a reader sees.
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors written since the last sync, with all that was written there, oldest first.
    unsynced: BTreeMap<usize, Vec<Vec<u8>>>,
}

impl FileState {
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        if self.now.len() < end {
            self.now.resize(end, 0);
        }
        self.now[offset..end].copy_from_slice(bytes);
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let content = part(&self.now, sector);
            self.unsynced.entry(sector).or_default().push(content);
        }
    }

    fn sync(&mut self) {
        self.durable.resize(self.now.len(), 0);
        for (sector, versions) in std::mem::take(&mut self.unsynced) {
            put(&mut self.durable, sector, versions.last());
        }
    }

    /// What may be found after a crash. `keep` chooses for each unsynced sector.
    fn crash(&self, keep_length: bool, keep: &mut Keep<'_>) -> Vec<u8> {
        let mut found = self.durable.clone();
        if keep_length {
            found.resize(self.now.len(), 0);
        }
        for (number, (sector, versions)) in self.unsynced.iter().enumerate() {
            put(&mut found, *sector, keep.choose(number, versions));
        }
        found
    }
}

fn part(bytes: &[u8], sector: usize) -> Vec<u8> {
    bytes[sector * SECTOR..bytes.len().min((sector + 1) * SECTOR)].to_vec()
}

/// Writes a sector where the file is long enough to have it.
fn put(bytes: &mut [u8], sector: usize, content: Option<&Vec<u8>>) {
    if let Some(content) = content
        && let Some(place) = bytes.get_mut(sector * SECTOR..)
    {
        let length = place.len().min(content.len());
        place[..length].copy_from_slice(&content[..length]);
    }
}

/// What a crash keeps of what was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Nothing at all.
    Nothing,
    /// Everything.
    Everything,
    /// Names only.
    Names,
    /// Content only.
    Content,
    /// Of each file all sectors but one, and all names.
    AllButOne,
    /// Of each file one sector, and all names.
    OnlyOne,
    /// Of each file the first few sectors, and all names: a write that was cut off.
    Torn,
    /// Whatever chance says.
    Random,
}

impl Kept {
    pub const ALL: [Kept; 8] = [
        Kept::Nothing,
        Kept::Everything,
        Kept::Names,
        Kept::Content,
        Kept::AllButOne,
        Kept::OnlyOne,
        Kept::Torn,
        Kept::Random,
    ];
}

struct Keep<'a> {
    kept: Kept,
    chosen: usize,
    rng: &'a mut StdRng,
}

impl Keep<'_> {
    fn choose<'v>(&mut self, number: usize, versions: &'v [Vec<u8>]) -> Option<&'v Vec<u8>> {
        let keeps = match self.kept {
            Kept::Nothing | Kept::Names => false,
            Kept::Everything | Kept::Content => true,
            Kept::AllButOne => number != self.chosen,
            Kept::OnlyOne => number == self.chosen,
            Kept::Torn => number < self.chosen,
            Kept::Random => self.rng.random(),
        };
        match self.kept {
            Kept::Random if keeps => versions.choose(self.rng),
            _ if keeps => versions.last(),
            _ => None,
        }
    }
}

#[derive(Clone, Debug)]
enum NameOp {
    Set(String, FileId),
    Unset(String),
}

impl NameOp {
    fn apply(&self, names: &mut BTreeMap<String, FileId>) {
        match self {
            NameOp::Set(name, file) => names.insert(name.clone(), *file),
            NameOp::Unset(name) => names.remove(name),
        };
    }
}

/// A disk at one moment: what is durable, and what is not yet.
#[derive(Clone, Debug, Default)]
pub struct State {
    files: Vec<FileState>,
    names: BTreeMap<String, FileId>,
    durable_names: BTreeMap<String, FileId>,
    /// Each operation on names as one: a rename unsets and sets.
    unsynced_names: Vec<Vec<NameOp>>,
}

impl State {
    fn of(image: &Image) -> Self {
        let mut state = State::default();
        state.load(image);
        state
    }

    /// Handles of files from before stay valid, and are nobody's any more.
    fn load(&mut self, image: &Image) {
        self.names.clear();
        self.unsynced_names.clear();
        for (name, content) in image {
            self.names.insert(name.clone(), self.files.len());
            self.files.push(FileState {
                now: content.to_vec(),
                durable: content.to_vec(),
                unsynced: BTreeMap::new(),
            });
        }
        self.durable_names = self.names.clone();
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Create { name } => {
                let file = self.files.len();
                self.files.push(FileState::default());
                self.rename(vec![NameOp::Set(name.clone(), file)]);
            }
            Op::Rename { from, to } => {
                let file = self.names[from];
                self.rename(vec![
                    NameOp::Unset(from.clone()),
                    NameOp::Set(to.clone(), file),
                ]);
            }
            Op::Remove { name } => self.rename(vec![NameOp::Unset(name.clone())]),
            Op::SyncDirectory => {
                self.unsynced_names.clear();
                self.durable_names = self.names.clone();
            }
            // Beyond what was written a file reads as zeros, also after a crash.
            Op::Allocate { file, bytes } => {
                let now = &mut self.files[*file].now;
                now.resize(now.len().max(*bytes as usize), 0);
            }
            Op::Write {
                file,
                offset,
                bytes,
            } => self.files[*file].write(*offset as usize, bytes),
            Op::Sync { file } => self.files[*file].sync(),
            Op::FailedSync { file, seed } => {
                let mut rng = StdRng::seed_from_u64(*seed);
                let file = &mut self.files[*file];
                let keep_length = rng.random();
                let mut keep = Keep {
                    kept: Kept::Random,
                    chosen: 0,
                    rng: &mut rng,
                };
                file.durable = file.crash(keep_length, &mut keep);
                file.unsynced.clear();
            }
            Op::PowerLoss(image) => self.load(image),
        }
    }

    fn rename(&mut self, ops: Vec<NameOp>) {
        ops.iter().for_each(|op| op.apply(&mut self.names));
        self.unsynced_names.push(ops);
    }

    /// What may be found after the power was lost now.
    pub fn crash(&self, kept: Kept, rng: &mut StdRng) -> Image {
        let mut names = self.durable_names.clone();
        let count = match kept {
            Kept::Nothing | Kept::Content => 0,
            Kept::Random => rng.random_range(0..=self.unsynced_names.len()),
            _ => self.unsynced_names.len(),
        };
        for op in self.unsynced_names[..count].iter().flatten() {
            op.apply(&mut names);
        }
        let mut image = Image::new();
        for (name, file) in names {
            let file = &self.files[file];
            let keep_length = match kept {
                Kept::Nothing | Kept::Names => false,
                Kept::Random => rng.random(),
                _ => true,
            };
            let chosen = rng.random_range(0..=file.unsynced.len().saturating_sub(1));
            let mut keep = Keep { kept, chosen, rng };
            image.insert(name, Arc::new(file.crash(keep_length, &mut keep)));
        }
        image
    }

    /// What a process sees that starts now, without a crash.
    pub fn image(&self) -> Image {
        let content = |file: &FileId| Arc::new(self.files[*file].now.clone());
        let names = self.names.iter();
        names
            .map(|(name, file)| (name.clone(), content(file)))
            .collect()
    }
}

/// Everything that was done to a disk, from the beginning.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    begin: State,
    pub ops: Vec<Op>,
}

impl Recording {
    /// Hands `each` the state before the first operation and after each, with how many there were.
    /// It says whether to go on.
    pub fn states(&self, mut each: impl FnMut(usize, &State) -> bool) {
        let mut state = self.begin.clone();
        if !each(0, &state) {
            return;
        }
        for (number, op) in (1..).zip(&self.ops) {
            state.apply(op);
            if !each(number, &state) {
                return;
            }
        }
    }
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    recording: Recording,
    faults: Vec<Fault>,
    calls: HashMap<Call, u64>,
    /// Chance in failed writes and syncs.
    rng: Option<StdRng>,
    /// A write or sync of a file with a segment's final name has failed.
    segment_failed: bool,
    /// The handles that live die at this length of the recording.
    dies_at: Option<usize>,
}

/// The disk.
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<Inner>>);

impl SimDisk {
    /// An empty one.
    pub fn new(seed: u64) -> Self {
        Self::with(State::default(), seed)
    }

    /// One with files on it, all durable.
    pub fn of(image: &Image) -> Self {
        Self::with(State::of(image), 0)
    }

    /// One in the midst of its life.
    pub fn with(state: State, seed: u64) -> Self {
        SimDisk(Arc::new(Mutex::new(Inner {
            recording: Recording {
                begin: state.clone(),
                ops: Vec::new(),
            },
            state,
            rng: Some(StdRng::seed_from_u64(seed)),
            ..Inner::default()
        })))
    }

    /// The disk as a process sees it, until it dies.
    pub fn process(&self) -> Handle {
        self.0.lock().dies_at = None;
        Handle {
            disk: self.clone(),
            alive: Arc::new(AtomicBool::new(true)),
        }
    }

    /// Operations so far.
    pub fn ops(&self) -> usize {
        self.0.lock().recording.ops.len()
    }

    /// Everything that was done.
    pub fn recording(&self) -> Recording {
        self.0.lock().recording.clone()
    }

    /// How it is now.
    pub fn state(&self) -> State {
        self.0.lock().state.clone()
    }

    /// Whether a segment that is in use could not be written or synced.
    pub fn segment_failed(&self) -> bool {
        self.0.lock().segment_failed
    }

    /// Sets what fails from now on; calls count from 1 again.
    pub fn fail(&self, faults: Vec<Fault>) {
        let mut inner = self.0.lock();
        inner.faults = faults;
        inner.calls.clear();
    }

    /// How often each kind of call was made since [`SimDisk::fail`].
    pub fn calls(&self) -> HashMap<Call, u64> {
        self.0.lock().calls.clone()
    }

    /// Kills the process that uses it, once the recording has so many operations.
    pub fn kill_at(&self, ops: usize) {
        self.0.lock().dies_at = Some(ops);
    }

    /// Whether that has come to pass.
    pub fn is_killed(&self) -> bool {
        let inner = self.0.lock();
        inner
            .dies_at
            .is_some_and(|at| inner.recording.ops.len() >= at)
    }

    /// Loses power. Whoever uses it has to be gone.
    pub fn lose_power(&self, kept: Kept, rng: &mut StdRng) {
        let mut inner = self.0.lock();
        let image = inner.state.crash(kept, rng);
        inner.perform(Op::PowerLoss(Arc::new(image)));
    }
}

impl Inner {
    fn perform(&mut self, op: Op) {
        self.state.apply(&op);
        self.recording.ops.push(op);
    }

    /// Counts a call; the error that it is to fail with.
    fn call(&mut self, call: Call) -> Option<io::Error> {
        let count = self.calls.entry(call).or_default();
        *count += 1;
        let count = *count;
        let fault = self.faults.iter().find(|fault| {
            fault.call == call && (fault.nth == count || fault.sticky && fault.nth < count)
        });
        fault.map(|fault| fault.errno.into())
    }

    fn chance(&mut self) -> u64 {
        self.rng.as_mut().map_or(0, Rng::random)
    }

    fn note_failure(&mut self, file: FileId) {
        let mut names = self.state.names.iter();
        self.segment_failed |= names.any(|(name, id)| *id == file && name.ends_with(".segment"));
    }
}

/// The disk as one process sees it.
#[derive(Clone, Debug)]
pub struct Handle {
    disk: SimDisk,
    alive: Arc<AtomicBool>,
}

impl Handle {
    /// The process is gone: nothing that is left of it reaches the disk any more.
    pub fn die(&self) {
        // Under the lock, so that nothing is on its way.
        let _inner = self.disk.0.lock();
        self.alive.store(false, Ordering::SeqCst);
    }

    fn enter<T>(&self, run: impl FnOnce(&mut Inner) -> io::Result<T>) -> io::Result<T> {
        let mut inner = self.disk.0.lock();
        let dead = inner
            .dies_at
            .is_some_and(|at| inner.recording.ops.len() >= at);
        if dead || !self.alive.load(Ordering::SeqCst) {
            return Err(io::Error::other("this process is dead"));
        }
        run(&mut inner)
    }

    fn name(&self, call: Call, op: Op) -> io::Result<()> {
        self.enter(|inner| {
            let missing = match &op {
                Op::Rename { from: name, .. } | Op::Remove { name } => {
                    !inner.state.names.contains_key(name)
                }
                _ => false,
            };
            match inner.call(call) {
                Some(error) => Err(error),
                None if missing => Err(io::ErrorKind::NotFound.into()),
                None => {
                    inner.perform(op);
                    Ok(())
                }
            }
        })
    }

    fn file(&self, id: FileId) -> Arc<dyn DiskFile> {
        Arc::new(SimFile {
            handle: self.clone(),
            id,
        })
    }
}

impl Disk for Handle {
    fn list(&self) -> io::Result<Vec<String>> {
        self.enter(|inner| Ok(inner.state.names.keys().cloned().collect()))
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let name = name.to_owned();
        self.name(Call::Create, Op::Create { name: name.clone() })?;
        self.enter(|inner| Ok(inner.state.names[&name]))
            .map(|id| self.file(id))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.enter(|inner| match inner.call(Call::Open) {
            Some(error) => Err(error),
            None => inner
                .state
                .names
                .get(name)
                .copied()
                .ok_or_else(|| io::ErrorKind::NotFound.into()),
        })
        .map(|id| self.file(id))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (from.to_owned(), to.to_owned());
        self.name(Call::Rename, Op::Rename { from, to })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let name = name.to_owned();
        self.name(Call::Remove, Op::Remove { name })
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.name(Call::SyncDirectory, Op::SyncDirectory)
    }
}

#[derive(Debug)]
struct SimFile {
    handle: Handle,
    id: FileId,
}

impl DiskFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        self.handle
            .enter(|inner| Ok(inner.state.files[self.id].now.len() as u64))
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        let file = self.id;
        self.handle
            .name(Call::Allocate, Op::Allocate { file, bytes })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let file = self.id;
        let write = |bytes: &[u8]| Op::Write {
            file,
            offset,
            bytes: bytes.into(),
        };
        self.handle.enter(|inner| {
            let Some(error) = inner.call(Call::Write) else {
                inner.perform(write(bytes));
                return Ok(());
            };
            // What came first may have been written.
            let sectors = bytes.len().div_ceil(SECTOR) as u64;
            let length = (inner.chance() % (sectors + 1)) as usize * SECTOR;
            if length > 0 {
                inner.perform(write(&bytes[..length.min(bytes.len())]));
            }
            inner.note_failure(file);
            Err(error)
        })
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.handle.enter(|inner| {
            if let Some(error) = inner.call(Call::Read) {
                return Err(error);
            }
            let content = inner.state.files[self.id].now.get(offset as usize..);
            match content.and_then(|content| content.get(..buffer.len())) {
                Some(content) => {
                    buffer.copy_from_slice(content);
                    Ok(())
                }
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        })
    }

    fn sync(&self) -> io::Result<()> {
        let file = self.id;
        self.handle.enter(|inner| match inner.call(Call::Sync) {
            None => {
                inner.perform(Op::Sync { file });
                Ok(())
            }
            Some(error) => {
                let seed = inner.chance();
                inner.perform(Op::FailedSync { file, seed });
                inner.note_failure(file);
                Err(error)
            }
        })
    }
}
