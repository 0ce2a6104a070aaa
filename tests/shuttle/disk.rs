//! A disk in memory that knows what of it is durable. Each call is a place at which another thread
//! may go on.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use crate::order::OrderId;
use crate::queue::log::file::disk::{Disk, DiskFile};
use crate::queue::log::file::{Opened, segment};
use crate::queue::log::record::Record;
use crate::sync::Switch;

type Names = BTreeMap<String, Arc<Mutex<Bytes>>>;

#[derive(Debug, Default)]
struct Bytes {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// A sync of it failed: the kernel calls the pages clean, and further syncs do nothing.
    has_failed: bool,
}

#[derive(Debug, Default)]
struct Contents {
    now: Names,
    durable: Names,
    /// Syncs of files until one fails.
    syncs_left: Option<u32>,
}

/// The disk.
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    contents: Arc<Mutex<Contents>>,
    /// `None` where nobody else is there.
    switch: Option<Arc<Switch>>,
}

#[derive(Debug)]
struct MemoryFile {
    disk: MemoryDisk,
    bytes: Arc<Mutex<Bytes>>,
}

impl MemoryDisk {
    pub fn new() -> Self {
        MemoryDisk {
            contents: Arc::default(),
            switch: Some(Arc::default()),
        }
    }

    fn switch(&self) {
        if let Some(switch) = &self.switch {
            switch.here();
        }
    }

    /// Lets so many syncs of files succeed, and the next fail.
    pub fn fail_sync_after(&self, syncs: u32) {
        self.contents.lock().unwrap().syncs_left = Some(syncs);
    }

    /// The orders that a loss of power would leave now, by segment.
    pub fn durable_orders(&self) -> BTreeSet<(u64, OrderId)> {
        let contents = self.contents.lock().unwrap();
        orders_in(&contents.durable, |bytes| &bytes.durable)
    }

    /// The orders that are written, durable or not, by segment.
    pub fn written_orders(&self) -> BTreeSet<(u64, OrderId)> {
        let contents = self.contents.lock().unwrap();
        orders_in(&contents.now, |bytes| &bytes.now)
    }

    /// How many segments there are.
    pub fn segments(&self) -> usize {
        let contents = self.contents.lock().unwrap();
        let segments = contents.now.keys();
        segments
            .filter(|name| segment::file_number(name).is_some())
            .count()
    }
}

fn orders_in(names: &Names, content: fn(&Bytes) -> &Vec<u8>) -> BTreeSet<(u64, OrderId)> {
    let copied = names.iter().map(|(name, bytes)| {
        let now = content(&bytes.lock().unwrap()).clone();
        let durable = now.clone();
        let copy = Bytes {
            now,
            durable,
            has_failed: false,
        };
        (name.clone(), Arc::new(Mutex::new(copy)))
    });
    let copy = MemoryDisk {
        contents: Arc::new(Mutex::new(Contents {
            now: copied.collect(),
            ..Contents::default()
        })),
        switch: None,
    };
    let opened = Opened::on(Arc::new(copy), 1 << 20, [0; 16], |_, _| {})
        .expect("a crash leaves nothing that is refused");
    let mut orders = BTreeSet::new();
    for at in &opened.scanned.groups {
        let group = opened.read(at).expect("it was read before");
        for record in group.records {
            if let Record::Order(order) = record {
                orders.insert((at.span, order.id));
            }
        }
    }
    orders
}

impl Disk for MemoryDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        self.switch();
        Ok(self.contents.lock().unwrap().now.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.switch();
        let bytes = Arc::<Mutex<Bytes>>::default();
        let mut contents = self.contents.lock().unwrap();
        contents.now.insert(name.to_owned(), Arc::clone(&bytes));
        Ok(Arc::new(MemoryFile {
            disk: self.clone(),
            bytes,
        }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.switch();
        let contents = self.contents.lock().unwrap();
        let bytes = contents.now.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(MemoryFile {
            disk: self.clone(),
            bytes: Arc::clone(bytes),
        }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.switch();
        let mut contents = self.contents.lock().unwrap();
        let bytes = contents.now.remove(from).ok_or(io::ErrorKind::NotFound)?;
        contents.now.insert(to.to_owned(), bytes);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.switch();
        let mut contents = self.contents.lock().unwrap();
        contents.now.remove(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.switch();
        let mut contents = self.contents.lock().unwrap();
        contents.durable = contents.now.clone();
        Ok(())
    }
}

impl DiskFile for MemoryFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().now.len() as u64)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.bytes.lock().unwrap().now.resize(bytes as usize, 0);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.switch();
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        let mut file = self.bytes.lock().unwrap();
        let length = file.now.len().max(end);
        file.now.resize(length, 0);
        file.now[start..end].copy_from_slice(bytes);
        Ok(())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.switch();
        let (start, end) = (offset as usize, offset as usize + buffer.len());
        let file = self.bytes.lock().unwrap();
        let bytes = file.now.get(start..end);
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.switch();
        {
            let mut contents = self.disk.contents.lock().unwrap();
            let fails = contents.syncs_left == Some(0);
            contents.syncs_left = contents.syncs_left.and_then(|left| left.checked_sub(1));
            let mut file = self.bytes.lock().unwrap();
            if fails {
                file.has_failed = true;
                return Err(io::Error::from_raw_os_error(5));
            }
            if !file.has_failed {
                file.durable = file.now.clone();
            }
        }
        self.disk.switch();
        Ok(())
    }
}
