//! A disk in memory that records what is done to it, crashes at any point of the recording, and
//! fails calls on demand.
//!
//! What a crash leaves: what was synced stays. Of what was written since, any subset of 512-byte
//! sectors. Names that changed since the last sync of the directory may have changed or not, up to
//! any point in their order.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use millrace::queue::log::file::disk::{Disk, DiskFile};
use millrace::queue::log::file::sector::SECTOR;
use rand::Rng;
use rand::rngs::StdRng;

/// One thing that was done to the disk. Files are numbered in the order of their making.
#[derive(Clone, Debug)]
pub enum Done {
    Create(String, usize),
    Allocate(usize, u64),
    Write(usize, u64, Vec<u8>),
    Sync(usize),
    Rename(String, String),
    Remove(String),
    SyncDirectory,
}

/// The calls that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Create,
    Open,
    Read,
    Allocate,
    Write,
    Sync,
    Rename,
    Remove,
    SyncDirectory,
}

impl Call {
    pub const ALL: [Call; 9] = [
        Call::Create,
        Call::Open,
        Call::Read,
        Call::Allocate,
        Call::Write,
        Call::Sync,
        Call::Rename,
        Call::Remove,
        Call::SyncDirectory,
    ];
}

/// Which calls fail, and how.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    pub call: Call,
    /// The N-th, from 1.
    pub nth: u64,
    /// And every one after it.
    pub sticky: bool,
    /// An error number of the system.
    pub errno: i32,
}

#[derive(Debug, Default)]
struct State {
    names: BTreeMap<String, usize>,
    files: Vec<Vec<u8>>,
    done: Vec<Done>,
    failure: Option<Failure>,
    calls: u64,
    /// Files of which a sync has failed: what was not synced then never will be.
    lying: Vec<usize>,
}

/// The disk.
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

#[derive(Debug)]
struct SimFile(SimDisk, usize);

impl SimDisk {
    /// A disk with these files, all of them durable.
    pub fn with(files: &BTreeMap<String, Vec<u8>>) -> Self {
        let disk = SimDisk::default();
        {
            let mut state = disk.0.lock().unwrap();
            for (name, bytes) in files {
                let number = state.files.len();
                state.files.push(bytes.clone());
                state.names.insert(name.clone(), number);
            }
        }
        disk
    }

    /// From now on calls fail like this.
    pub fn fail(&self, failure: Failure) {
        let mut state = self.0.lock().unwrap();
        state.failure = Some(failure);
        state.calls = 0;
    }

    /// Calls succeed again.
    pub fn mend(&self) {
        self.0.lock().unwrap().failure = None;
    }

    /// How many things were done so far.
    pub fn now(&self) -> usize {
        self.0.lock().unwrap().done.len()
    }

    /// Everything that was done.
    pub fn done(&self) -> Vec<Done> {
        self.0.lock().unwrap().done.clone()
    }

    /// The files as a living process sees them.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.0.lock().unwrap();
        let content =
            |(name, number): (&String, &usize)| (name.clone(), state.files[*number].clone());
        state.names.iter().map(content).collect()
    }

    fn check(&self, call: Call) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let Some(failure) = state.failure.filter(|failure| failure.call == call) else {
            return Ok(());
        };
        state.calls += 1;
        if state.calls == failure.nth || (failure.sticky && state.calls > failure.nth) {
            return Err(io::Error::from_raw_os_error(failure.errno));
        }
        Ok(())
    }

    fn note(&self, done: Done) {
        self.0.lock().unwrap().done.push(done);
    }
}

impl Disk for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().unwrap().names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.check(Call::Create)?;
        let number = {
            let mut state = self.0.lock().unwrap();
            let number = state.files.len();
            state.files.push(Vec::new());
            state.names.insert(name.to_owned(), number);
            number
        };
        self.note(Done::Create(name.to_owned(), number));
        Ok(Arc::new(SimFile(self.clone(), number)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.check(Call::Open)?;
        let number = self.0.lock().unwrap().names.get(name).copied();
        let number = number.ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile(self.clone(), number)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.check(Call::Rename)?;
        {
            let mut state = self.0.lock().unwrap();
            let number = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
            state.names.insert(to.to_owned(), number);
        }
        self.note(Done::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.check(Call::Remove)?;
        let removed = self.0.lock().unwrap().names.remove(name);
        removed.ok_or(io::ErrorKind::NotFound)?;
        self.note(Done::Remove(name.to_owned()));
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.check(Call::SyncDirectory)?;
        self.note(Done::SyncDirectory);
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.0.lock().unwrap().files[self.1].len() as u64)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.0.check(Call::Allocate)?;
        self.0.0.lock().unwrap().files[self.1].resize(bytes as usize, 0);
        self.0.note(Done::Allocate(self.1, bytes));
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // A failed write may have written a part.
        let failed = self.0.check(Call::Write);
        let bytes = match failed {
            Ok(()) => bytes,
            Err(_) => &bytes[..bytes.len() / 2 / SECTOR * SECTOR],
        };
        if !bytes.is_empty() {
            let mut state = self.0.0.lock().unwrap();
            write(&mut state.files[self.1], bytes, offset);
            drop(state);
            self.0.note(Done::Write(self.1, offset, bytes.to_vec()));
        }
        failed
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.check(Call::Read)?;
        let state = self.0.0.lock().unwrap();
        let from = offset as usize;
        let bytes = state.files[self.1].get(from..from + buffer.len());
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let failed = self.0.check(Call::Sync);
        let mut state = self.0.0.lock().unwrap();
        if failed.is_err() {
            state.lying.push(self.1);
            return failed;
        }
        // Pages that a failed sync has called clean are not written by the next.
        if !state.lying.contains(&self.1) {
            state.done.push(Done::Sync(self.1));
        }
        Ok(())
    }
}

fn write(file: &mut Vec<u8>, bytes: &[u8], offset: u64) {
    let (from, to) = (offset as usize, offset as usize + bytes.len());
    if file.len() < to {
        file.resize(to, 0);
    }
    file[from..to].copy_from_slice(bytes);
}

/// How much of the unsynced writes a crash leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// Nothing.
    Nothing,
    /// All of it, as a kill -9 does.
    Everything,
    /// Any subset.
    Some,
}

/// A disk that replays a recording and can crash at each of its points.
#[derive(Default)]
pub struct Replay {
    names: BTreeMap<String, usize>,
    files: Vec<Vec<u8>>,
    durable_names: BTreeMap<String, usize>,
    durable: Vec<Vec<u8>>,
    /// Writes to each file since its last sync.
    unsynced: Vec<Vec<(u64, Vec<u8>)>>,
    /// Changes of names since the last sync of the directory.
    unsynced_names: Vec<Done>,
}

impl Replay {
    /// Begins with these files, all of them durable, as [`SimDisk::with`] does.
    pub fn with(files: &BTreeMap<String, Vec<u8>>) -> Self {
        let mut replay = Replay::default();
        for (number, (name, bytes)) in files.iter().enumerate() {
            replay.names.insert(name.clone(), number);
            replay.files.push(bytes.clone());
            replay.unsynced.push(Vec::new());
        }
        replay.durable_names = replay.names.clone();
        replay.durable = replay.files.clone();
        replay
    }

    /// Does the next thing.
    pub fn step(&mut self, done: &Done) {
        match done {
            Done::Create(name, number) => {
                assert_eq!(*number, self.files.len());
                self.files.push(Vec::new());
                self.durable.push(Vec::new());
                self.unsynced.push(Vec::new());
                self.names.insert(name.clone(), *number);
                self.unsynced_names.push(done.clone());
            }
            Done::Allocate(file, bytes) => {
                self.files[*file].resize(*bytes as usize, 0);
                self.durable[*file].resize(*bytes as usize, 0);
            }
            Done::Write(file, offset, bytes) => {
                write(&mut self.files[*file], bytes, *offset);
                self.unsynced[*file].push((*offset, bytes.clone()));
            }
            Done::Sync(file) => {
                self.durable[*file] = self.files[*file].clone();
                self.unsynced[*file].clear();
            }
            Done::Rename(from, to) => {
                let number = self.names.remove(from).expect("a name");
                self.names.insert(to.clone(), number);
                self.unsynced_names.push(done.clone());
            }
            Done::Remove(name) => {
                self.names.remove(name);
                self.unsynced_names.push(done.clone());
            }
            Done::SyncDirectory => {
                self.durable_names = self.names.clone();
                self.unsynced_names.clear();
            }
        }
    }

    /// What a crash leaves now.
    pub fn crash(&self, crash: Crash, rng: &mut StdRng) -> BTreeMap<String, Vec<u8>> {
        let mut names = self.durable_names.clone();
        let kept = match crash {
            Crash::Nothing => 0,
            Crash::Everything => self.unsynced_names.len(),
            Crash::Some => rng.random_range(0..=self.unsynced_names.len()),
        };
        for change in &self.unsynced_names[..kept] {
            match change {
                Done::Create(name, number) => drop(names.insert(name.clone(), *number)),
                Done::Rename(from, to) => {
                    if let Some(number) = names.remove(from) {
                        names.insert(to.clone(), number);
                    }
                }
                Done::Remove(name) => drop(names.remove(name)),
                _ => {}
            }
        }
        let content = |(name, number): (String, usize)| {
            let mut file = self.durable[number].clone();
            for (offset, bytes) in &self.unsynced[number] {
                for (place, sector) in bytes.chunks(SECTOR).enumerate() {
                    let keep = match crash {
                        Crash::Nothing => false,
                        Crash::Everything => true,
                        Crash::Some => rng.random_bool(0.5),
                    };
                    if keep {
                        write(&mut file, sector, offset + (place * SECTOR) as u64);
                    }
                }
            }
            (name, file)
        };
        let mut rngless: Vec<(String, usize)> = names.into_iter().collect();
        rngless.sort();
        rngless.into_iter().map(content).collect()
    }
}
