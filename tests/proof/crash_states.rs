//! Every state that a crash can leave a journal in, and every byte of it damaged: it is recovered
//! exactly, or refused with the place of the damage; never silently short of an acknowledged order.

use std::collections::BTreeMap;

use millrace::queue::log::file::JournalError;
use millrace::queue::log::file::sector::SECTOR;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::journal_fixture::{Fixture, open, segments};
use super::outcome::{Why, seed};
use super::sim_disk::{Crash, Replay, SimDisk};

/// Crash states taken of one recording.
const STATES: u64 = 300;
/// Orders of one recording.
const ORDERS: usize = 500;

type Files = BTreeMap<String, Vec<u8>>;

pub fn run(count: u64) -> Result<String, Why> {
    let seed = seed();
    let mut figures = Figures::default();
    for recording in 0..count.div_ceil(STATES) {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_add(recording));
        let states = STATES.min(count - recording * STATES);
        one(states, &mut rng, &mut figures)
            .map_err(|why| Why::Failed(format!("seed={} {why}", seed.wrapping_add(recording))))?;
    }
    Ok(format!("{figures} seed={seed}"))
}

#[derive(Default)]
struct Figures {
    states: u64,
    torn: u64,
    restarted: u64,
    flips: u64,
    cuts: u64,
    other: u64,
    refused: u64,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "states={} torn={} restarted={} flips={} cuts={} other_damage={} refused_loudly={} silently_short=0",
            self.states, self.torn, self.restarted, self.flips, self.cuts, self.other, self.refused
        )
    }
}

fn one(states: u64, rng: &mut StdRng, figures: &mut Figures) -> Result<(), String> {
    let fixture = record(rng)?;
    let done = fixture.disk.done();
    // A seeded choice of points, in order, so that one replay serves them all.
    let mut points: Vec<usize> = (0..states)
        .map(|_| rng.random_range(0..=done.len()))
        .collect();
    points.sort_unstable();
    let mut replay = Replay::default();
    let mut at = 0;
    for point in points {
        while at < point {
            replay.step(&done[at]);
            at += 1;
        }
        let crash = match rng.random_range(0..6) {
            0 => Crash::Nothing,
            1 => Crash::Everything,
            _ => Crash::Some,
        };
        let files = replay.crash(crash, rng);
        let disk = SimDisk::with(&files);
        let context = |why| {
            format!(
                "crash at {point} of {} leaving {crash:?}: {why}",
                done.len()
            )
        };
        let opened = open(&disk).map_err(|error| context(format!("refused: {error}")))?;
        fixture.compare(&opened, point).map_err(context)?;
        figures.states += 1;
        figures.torn += u64::from(opened.scanned.torn_sectors > 0);
        drop(opened);
        if rng.random_bool(0.1) {
            go_on(disk, fixture.next_id(), rng).map_err(context)?;
            figures.restarted += 1;
        }
    }
    damage(&fixture.disk.files(), states, rng, figures)
}

/// Lets a journal run through rotations, a backlog on the disk and deletions.
fn record(rng: &mut StdRng) -> Result<Fixture, String> {
    let mut fixture =
        Fixture::start(SimDisk::default(), 1, 40).map_err(|error| error.to_string())?;
    while fixture.known.len() < ORDERS {
        for _ in 0..rng.random_range(1..30) {
            // Full, or more at once than the memory takes: others are decided first.
            let _ = fixture.append(rng);
        }
        if rng.random_bool(0.5) {
            fixture.settle()?;
        }
        let undecided = fixture.undecided();
        if undecided > 80 || rng.random_bool(0.3) {
            while fixture.undecided() > undecided / 2 {
                fixture.decide(rng.random_range(1..40))?;
            }
        }
    }
    fixture.settle()?;
    let left = fixture.queue.stop();
    assert!(left.is_empty(), "orders were not written");
    Ok(fixture)
}

/// A journal starts on what a crash left, goes on, and can be read again.
fn go_on(disk: SimDisk, next_id: u64, rng: &mut StdRng) -> Result<(), String> {
    let mut fixture =
        Fixture::start(disk.clone(), next_id, 40).map_err(|error| error.to_string())?;
    for _ in 0..5 {
        fixture.append(rng).map_err(|why| format!("{why:?}"))?;
    }
    fixture.settle()?;
    drop(fixture.queue.stop());
    let opened = open(&disk).map_err(|error| format!("after going on: {error}"))?;
    let mut found = 0;
    opened
        .records(|_| found += 1)
        .map_err(|error| error.to_string())?;
    if found < 5 {
        return Err("what was appended after the crash is not there".to_owned());
    }
    Ok(())
}

/// Whether a refusal says where the damage is.
pub fn names_the_place(error: &JournalError) -> bool {
    let text = error.to_string();
    match error {
        JournalError::Damaged { .. } => text.contains("offset"),
        JournalError::Missing { .. } | JournalError::Version { .. } => text.contains(".segment"),
        JournalError::Io { .. } | JournalError::InUse(_) => false,
    }
}

/// Damages a journal in many ways; a start has to refuse each of them.
fn damage(
    sound: &Files,
    count: u64,
    rng: &mut StdRng,
    figures: &mut Figures,
) -> Result<(), String> {
    let Some(sound) = Sound::of(sound)? else {
        // Almost everything is decided and deleted; there is nothing to damage.
        return Ok(());
    };
    for _ in 0..count {
        let (what, files) = sound.flip_a_bit(rng);
        refused(&what, &files, figures)?;
        figures.flips += 1;
    }
    for _ in 0..count / 3 {
        let (what, files) = sound.cut_a_file(rng);
        refused(&what, &files, figures)?;
        figures.cuts += 1;
    }
    for _ in 0..count / 3 {
        if let Some((what, files)) = sound.lose_a_sector(rng) {
            refused(&what, &files, figures)?;
            figures.other += 1;
        }
    }
    Ok(())
}

/// A start refuses damaged files, and names the place.
fn refused(what: &str, files: &Files, figures: &mut Figures) -> Result<(), String> {
    match open(&SimDisk::with(files)) {
        Ok(_) => Err(format!("{what}: accepted")),
        Err(error) => {
            figures.refused += 1;
            match names_the_place(&error) {
                true => Ok(()),
                false => Err(format!("{what}: {error}")),
            }
        }
    }
}

/// The files of a journal without damage.
struct Sound<'a> {
    files: &'a Files,
    /// The segments.
    names: Vec<String>,
    /// Segment, first sector and sectors of each group, so that most damage hits one.
    groups: Vec<(String, u64, u64)>,
}

/// Its description, and the files with it.
type Damage = (String, Files);

impl<'a> Sound<'a> {
    /// None: there are too few groups.
    fn of(files: &'a Files) -> Result<Option<Self>, String> {
        let opened = open(&SimDisk::with(files)).map_err(|error| error.to_string())?;
        let groups = opened.scanned.groups.iter().map(|at| {
            (
                format!("{:016}.segment", at.span),
                at.place,
                u64::from(at.length),
            )
        });
        let groups: Vec<(String, u64, u64)> = groups.collect();
        Ok((groups.len() >= 3).then(|| Sound {
            names: segments(files),
            files,
            groups,
        }))
    }

    /// A sector of one of these groups, by its segment.
    fn pick(rng: &mut StdRng, groups: &[(String, u64, u64)]) -> (String, usize) {
        let (name, place, sectors) = groups[rng.random_range(0..groups.len())].clone();
        (name, (place + rng.random_range(0..sectors)) as usize)
    }

    fn flip_a_bit(&self, rng: &mut StdRng) -> Damage {
        let mut files = self.files.clone();
        let (name, offset) = if rng.random_bool(0.8) {
            let (name, sector) = Self::pick(rng, &self.groups);
            (name, sector * SECTOR + rng.random_range(0..SECTOR))
        } else {
            let name = self.names[rng.random_range(0..self.names.len())].clone();
            let length = self.files[&name].len();
            (name, rng.random_range(0..length))
        };
        let bit = 1 << rng.random_range(0..8);
        files.get_mut(&name).expect("a file")[offset] ^= bit;
        (
            format!("bit {bit} of byte {offset} of {name} flipped"),
            files,
        )
    }

    fn cut_a_file(&self, rng: &mut StdRng) -> Damage {
        let mut files = self.files.clone();
        let name = &self.names[rng.random_range(0..self.names.len())];
        let length = rng.random_range(0..self.files[name].len());
        files.get_mut(name).expect("a file").truncate(length);
        (format!("{name} cut to {length} bytes"), files)
    }

    /// Zeroes a sector, exchanges two, or removes a segment; none where the choice has no such place.
    fn lose_a_sector(&self, rng: &mut StdRng) -> Option<Damage> {
        let mut files = self.files.clone();
        // A crash may lose a sector of the very last group, so that one is left alone.
        let but_last = &self.groups[..self.groups.len() - 1];
        let (name, sector) = Self::pick(rng, but_last);
        let range = sector * SECTOR..(sector + 1) * SECTOR;
        let what = match rng.random_range(0..3) {
            0 => {
                files.get_mut(&name).expect("a file")[range].fill(0);
                format!("sector {sector} of {name} zeroed")
            }
            1 => {
                let (other, second) = Self::pick(rng, but_last);
                if (&other, second) == (&name, sector) {
                    return None;
                }
                let second_range = second * SECTOR..(second + 1) * SECTOR;
                let a = files[&name][range.clone()].to_vec();
                let b = files[&other][second_range.clone()].to_vec();
                files.get_mut(&name).expect("a file")[range].copy_from_slice(&b);
                files.get_mut(&other).expect("a file")[second_range].copy_from_slice(&a);
                format!("sectors {sector} of {name} and {second} of {other} exchanged")
            }
            _ => {
                let inner = &self.names[1..self.names.len().max(2) - 1];
                if inner.is_empty() {
                    return None;
                }
                let name = &inner[rng.random_range(0..inner.len())];
                files.remove(name);
                format!("{name} removed")
            }
        };
        Some((what, files))
    }
}
