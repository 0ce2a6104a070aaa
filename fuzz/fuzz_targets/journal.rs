//! The journal's readers on any bytes, and on journals that were written and then damaged: they
//! never panic, take no more memory than what they read, return no record that was not written,
//! and take nothing for the trace of a crash but zeros.

#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use millrace::order::{
    Currency, KeyHash, Order, OrderId, PayloadHash, Quantity, SkuId, SkuNumber, UnixMillis, UserId,
};
use millrace::queue::log::file::disk::{Disk, DiskFile};
use millrace::queue::log::file::sector::{self, GROUP_SECTORS_MAX, PAYLOAD, SECTOR, Seal};
use millrace::queue::log::file::segment::{Segment, prepare};
use millrace::queue::log::file::{Identity, JournalError, Opened, Writer, recovery};
use millrace::queue::log::record::{self, GroupBytes, Record, order_bytes};

/// Small, so that a journal soon has several segments. A group fits in by far.
const SECTORS: u64 = 12;
/// Far more than any input and any segment here.
const ALLOCATION_MAX: usize = 4 << 20;

/// Refuses what no reader of so little may ask for.
struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

// SAFETY: the system's allocator does all the work.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > ALLOCATION_MAX {
            // Not a panic: it would allocate, and may not unwind from here.
            std::process::abort();
        }
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[derive(Debug, Default)]
struct MemoryDisk(Mutex<BTreeMap<String, Arc<MemoryFile>>>);

#[derive(Debug, Default)]
struct MemoryFile(Mutex<Vec<u8>>);

impl MemoryDisk {
    /// The segment with the given place among all, counted around.
    fn segment(&self, number: u8) -> Option<(String, Arc<MemoryFile>)> {
        let files = self.0.lock().unwrap();
        let place = usize::from(number).checked_rem(files.len())?;
        let (name, file) = files.iter().nth(place)?;
        Some((name.clone(), Arc::clone(file)))
    }

    fn content(&self) -> BTreeMap<String, Vec<u8>> {
        let files = self.0.lock().unwrap();
        let copy = |(name, file): (&String, &Arc<MemoryFile>)| {
            (name.clone(), file.0.lock().unwrap().clone())
        };
        files.iter().map(copy).collect()
    }
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for MemoryDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().unwrap().keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = Arc::<MemoryFile>::default();
        let mut files = self.0.lock().unwrap();
        files.insert(name.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.0.lock().unwrap().get(name).cloned();
        Ok(file.ok_or_else(not_found)?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.0.lock().unwrap();
        let file = files.remove(from).ok_or_else(not_found)?;
        files.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let removed = self.0.lock().unwrap().remove(name);
        removed.map(drop).ok_or_else(not_found)
    }

    fn sync_directory(&self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for MemoryFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn allocate(&self, bytes: u64) -> io::Result<()> {
        self.0.lock().unwrap().resize(bytes as usize, 0);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let offset = offset as usize;
        self.0.lock().unwrap()[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.0.lock().unwrap();
        let part = content.get(offset as usize..).unwrap_or_default();
        let part = part.get(..buffer.len());
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A journal's id is random, and nobody who sends orders knows it. Here every other input has
/// another, so that the fuzzer cannot carry a checksum over, as it does with what it sees compared.
fn identity(input: &[u8]) -> Identity {
    let mut hash = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    for byte in input {
        hash = (hash ^ u128::from(*byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
    }
    Identity {
        id: hash.to_be_bytes(),
        segment_bytes: SECTORS * SECTOR as u64,
    }
}

/// What a start makes of the journal.
fn open(disk: &Arc<MemoryDisk>) -> Result<Vec<Record>, JournalError> {
    let opened = Opened::on(Arc::clone(disk) as Arc<dyn Disk>, 0, [0; 16], |_, _| {})?;
    let mut records = Vec::new();
    let read = opened.records(|record| records.push(record));
    read.expect("what was scanned can be read");
    assert_eq!(records.len() as u64, opened.scanned.records);
    let high_water = opened.scanned.id_high_water;
    for record in &records {
        match record {
            // The last millisecond that an id can hold has none after it.
            Record::Order(order) => assert!(order.id.millis() < high_water),
            Record::Lease(until) => assert!(*until <= high_water),
        }
    }
    Ok(records)
}

/// What people can save of it, and how much they cannot.
fn salvage(disk: &MemoryDisk) -> (Vec<Record>, usize) {
    let mut records = Vec::new();
    let lost = recovery::salvage(disk, |record| records.push(record));
    let lost = lost.expect("this disk does not fail");
    let _ = recovery::identity(disk);
    (records, lost.len())
}

fn is_subsequence(part: &[Record], whole: &[Record]) -> bool {
    let mut whole = whole.iter();
    part.iter().all(|record| whole.any(|other| other == record))
}

/// A journal of one segment with `content` behind its header.
fn journal_of(identity: &Identity, content: &[u8]) -> Arc<MemoryDisk> {
    let disk = Arc::<MemoryDisk>::default();
    let segment = prepare(&*disk, identity, 1);
    segment.expect("this disk does not fail");
    let (_, file) = disk.segment(0).expect("it was made");
    let room = (identity.segment_bytes as usize - SECTOR).min(content.len());
    let written = file.write_at(&content[..room], SECTOR as u64);
    written.expect("this disk does not fail");
    disk
}

/// Content that nobody who does not know the id can have made.
fn foreign(input: &[u8]) {
    let disk = journal_of(&identity(input), input);
    let zeros = input.iter().take((SECTORS as usize - 1) * SECTOR);
    let zeros = zeros.copied().all(|byte| byte == 0);
    match open(&disk) {
        Ok(records) => assert!(zeros && records.is_empty()),
        Err(error) => assert!(!zeros, "{error}"),
    }
    let (records, lost) = salvage(&disk);
    assert!(records.is_empty());
    assert_eq!(lost == 0, zeros);
}

/// Any payload, rightly sealed.
fn payload(input: &[u8]) {
    let decoded = record::decode(input);
    if let Ok(group) = &decoded {
        let mut again = GroupBytes::default();
        again.begin(group.epoch, group.sequence);
        for record in &group.records {
            match record {
                Record::Order(order) => again.push_order(order),
                Record::Lease(until) => again.push_lease(*until),
            }
        }
        assert_eq!(again.as_bytes(), input, "{group:?}");
    }
    if input.is_empty() || input.len() > GROUP_SECTORS_MAX * PAYLOAD {
        return;
    }
    let mut identity = identity(input);
    let sectors = 1 + sector::sectors_of(input.len());
    identity.segment_bytes = (sectors * SECTOR) as u64;
    let mut content = Vec::new();
    let seal = Seal::new(&identity.id, 1);
    sector::encode(&mut content, seal, 1, 1 << 32 | 1, input);
    let disk = journal_of(&identity, &content);
    let found = open(&disk);
    let (saved, lost) = salvage(&disk);
    match decoded {
        Ok(group) => {
            assert_eq!(saved, group.records);
            // A start also refuses what no process could have come to.
            assert!(found.is_err() || found.is_ok_and(|found| found == saved));
        }
        Err(_) => assert!(found.is_err() && saved.is_empty() && lost > 0),
    }
}

/// A sector that claims to be anything, rightly sealed.
#[derive(Arbitrary, Debug)]
struct Claim {
    skip: bool,
    session: u8,
    group: u8,
    index: u8,
    count: u8,
    /// Beyond the payload, now and then.
    used: u16,
    payload: Vec<u8>,
}

fn claims(input: &[u8], claims: &[Claim]) {
    let identity = identity(input);
    let seal = Seal::new(&identity.id, 1);
    let mut content = Vec::new();
    for (place, claim) in (1..SECTORS).zip(claims) {
        let start = content.len();
        content.resize(start + SECTOR, 0);
        if claim.skip {
            continue;
        }
        let sector = &mut content[start..];
        let group = u64::from(claim.session) << 32 | u64::from(claim.group);
        sector[4..12].copy_from_slice(&group.to_le_bytes());
        sector[12..14].copy_from_slice(&u16::from(claim.index).to_le_bytes());
        sector[14..16].copy_from_slice(&u16::from(claim.count).to_le_bytes());
        sector[16..18].copy_from_slice(&(claim.used % 600).to_le_bytes());
        let length = claim.payload.len().min(PAYLOAD);
        sector[18..18 + length].copy_from_slice(&claim.payload[..length]);
        let crc = seal.of(place, &sector[4..]);
        sector[..4].copy_from_slice(&crc.to_le_bytes());
    }
    let disk = journal_of(&identity, &content);
    let found = open(&disk);
    let (saved, _) = salvage(&disk);
    if let Ok(found) = found {
        assert!(is_subsequence(&found, &saved));
    }
}

#[derive(Arbitrary, Debug)]
enum Step {
    Order(RawOrder),
    Lease(i64),
    Commit,
    /// Another process goes on.
    Restart,
}

#[derive(Arbitrary, Debug)]
struct RawOrder {
    id: u64,
    user: u8,
    quantity: u16,
    amount: i64,
    key: Option<[u8; 16]>,
    /// How long, and what is repeated for so long.
    attributes: Option<(u16, [u8; 8])>,
}

impl RawOrder {
    fn order(&self) -> Order {
        let attributes = self.attributes.map(|(length, part)| {
            let part = part.iter().map(|byte| char::from(b' ' + byte % 95));
            let length = usize::from(length) % 1_025;
            part.cycle().take(length).collect::<String>().into()
        });
        Order {
            id: OrderId::new((self.id >> 1).max(1)).expect("63 bits, not 0"),
            user_id: UserId::new(&"u".repeat(usize::from(self.user) % UserId::LEN_MAX + 1))
                .expect("visible ASCII"),
            sku_id: SkuId::new("A").expect("valid").into(),
            sku: SkuNumber(1),
            quantity: Quantity::new(u32::from(self.quantity) % Quantity::MAX + 1)
                .expect("in range"),
            adjustment: 0,
            amount: self.amount,
            currency: Currency::new("CNY").expect("three capitals"),
            created_at: UnixMillis(self.amount),
            expires_at: UnixMillis(0),
            key: self.key.map(KeyHash),
            payload: PayloadHash(self.id),
            attributes,
        }
    }
}

/// The writing end, as the appender uses it.
struct Appender {
    disk: Arc<MemoryDisk>,
    identity: Identity,
    writer: Writer,
    group: GroupBytes,
    number: u64,
    session: u64,
    /// What the log has committed, and what it has gathered.
    written: Vec<Record>,
    gathered: Vec<Record>,
}

/// A group whose first record has this number.
fn begun(sequence: u64) -> GroupBytes {
    let mut group = GroupBytes::default();
    group.begin(0, sequence);
    group
}

impl Appender {
    fn new(identity: Identity) -> Self {
        let disk = Arc::<MemoryDisk>::default();
        let segment = prepare(&*disk, &identity, 1).expect("this disk does not fail");
        Appender {
            writer: Writer::new(Arc::new(segment), SECTORS, 1),
            group: begun(1),
            disk,
            identity,
            number: 1,
            session: 1,
            written: Vec::new(),
            gathered: Vec::new(),
        }
    }

    fn commit(&mut self) {
        if !self.group.is_empty() {
            let at = self.writer.commit(&self.group.group());
            at.expect("this disk does not fail");
            self.written.append(&mut self.gathered);
            self.group = begun(self.written.len() as u64 + 1);
        }
    }

    fn next_segment(&mut self) -> Arc<Segment> {
        self.number += 1;
        let segment = prepare(&*self.disk, &self.identity, self.number);
        Arc::new(segment.expect("this disk does not fail"))
    }

    fn make_room(&mut self, bytes: usize) {
        if !self.group.fits(bytes, self.writer.room()) {
            self.commit();
            if !self.group.fits(bytes, self.writer.room()) {
                let segment = self.next_segment();
                self.writer.rotate(segment);
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Order(raw) => {
                let order = raw.order();
                self.make_room(order_bytes(order.attributes.as_deref()));
                self.group.push_order(&order);
                self.gathered.push(Record::Order(Box::new(order)));
            }
            Step::Lease(until) => {
                self.make_room(64);
                self.group.push_lease(UnixMillis(*until));
                self.gathered.push(Record::Lease(UnixMillis(*until)));
            }
            Step::Commit => self.commit(),
            Step::Restart => {
                // What it had gathered is lost with it.
                self.gathered.clear();
                self.session += 1;
                let segment = self.next_segment();
                self.group = begun(self.written.len() as u64 + 1);
                self.writer = Writer::new(segment, SECTORS, self.session);
            }
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Damage {
    Flip { segment: u8, at: u16, bit: u8 },
    Cut { segment: u8, length: u16 },
    Zero { segment: u8, place: u8, sectors: u8 },
    Swap { from: (u8, u8), to: (u8, u8) },
    Remove { segment: u8 },
}

impl Damage {
    fn work(&self, disk: &MemoryDisk) {
        let place = |place: u8| usize::from(place) % SECTORS as usize * SECTOR;
        let sector = |(segment, at): (u8, u8)| {
            let (_, file) = disk.segment(segment)?;
            let mut sector = [0; SECTOR];
            file.read_at(&mut sector, place(at) as u64).ok()?;
            Some((file, sector, place(at) as u64))
        };
        match *self {
            Damage::Flip { segment, at, bit } => {
                if let Some((_, file)) = disk.segment(segment) {
                    let mut content = file.0.lock().unwrap();
                    if let Some(at) = usize::from(at).checked_rem(content.len()) {
                        content[at] ^= 1 << (bit % 8);
                    }
                }
            }
            Damage::Cut { segment, length } => {
                if let Some((_, file)) = disk.segment(segment) {
                    file.0.lock().unwrap().truncate(length.into());
                }
            }
            Damage::Zero {
                segment,
                place: at,
                sectors,
            } => {
                if let Some((_, file)) = disk.segment(segment) {
                    let mut content = file.0.lock().unwrap();
                    let end = (place(at) + usize::from(sectors) * SECTOR).min(content.len());
                    if let Some(part) = content.get_mut(place(at)..end) {
                        part.fill(0);
                    }
                }
            }
            Damage::Swap { from, to } => {
                if let (Some((one, a, at)), Some((other, b, to))) = (sector(from), sector(to)) {
                    let swapped = one.write_at(&b, at).and_then(|()| other.write_at(&a, to));
                    swapped.expect("this disk does not fail");
                }
            }
            Damage::Remove { segment } => {
                if let Some((name, _)) = disk.segment(segment) {
                    disk.remove(&name).expect("it is there");
                }
            }
        }
    }
}

fn damaged(input: &[u8], steps: &[Step], damages: &[Damage]) {
    let mut writer = Appender::new(identity(input));
    steps.iter().for_each(|step| writer.step(step));
    writer.commit();
    let Appender { disk, written, .. } = writer;
    let found = open(&disk).expect("an undamaged journal can be read");
    assert_eq!(found, written);
    assert_eq!(salvage(&disk), (found, 0));

    let before = disk.content();
    damages.iter().for_each(|damage| damage.work(&disk));
    let after = disk.content();
    let (saved, _) = salvage(&disk);
    assert!(is_subsequence(&saved, &written), "{saved:?}");
    if let Ok(found) = open(&disk) {
        // Without a gap, and only segments that were retired may be missing before it.
        let is_run = found.is_empty() || written.windows(found.len()).any(|run| run == found);
        assert!(is_run, "{found:?} of {written:?}");
        assert!(is_subsequence(&found, &saved));
        if before == after {
            assert_eq!(found, written);
        }
        for (name, content) in &after {
            let was = &before[name];
            assert_eq!(content.len(), was.len(), "{name} was cut");
            let pairs = content.chunks(SECTOR).zip(was.chunks(SECTOR));
            for (place, (is, was)) in pairs.enumerate() {
                let as_a_crash_leaves_it = place > 0 && is.iter().all(|byte| *byte == 0);
                assert!(is == was || as_a_crash_leaves_it, "{name}: sector {place}");
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    let mut choices = Unstructured::new(rest);
    match kind % 4 {
        0 => foreign(rest),
        1 => payload(rest),
        2 => {
            if let Ok(list) = choices.arbitrary::<Vec<Claim>>() {
                claims(rest, &list);
            }
        }
        _ => {
            if let Ok((steps, damages)) = choices.arbitrary::<(Vec<Step>, Vec<Damage>)>() {
                damaged(rest, &steps, &damages);
            }
        }
    }
});
