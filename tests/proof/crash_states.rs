//! What a crash or a failing medium can make of a journal's files, and what is made of them.
//!
//! A journal runs on a disk that records; processes are stopped, killed, and lose their power in
//! between. Then, at every point of the recording, the power is lost, with different choices of
//! what was not synced: the journal must open, have every order that was durable and not decided
//! then, exactly as it was, and nothing else than what was written. Afterwards the files are
//! damaged in ways that no crash explains: every order is there, or the journal refuses to
//! start and says where; it is never silently short.

use std::collections::BTreeSet;
use std::sync::Arc;

use millrace::queue::journal::record::Record;
use millrace::queue::journal::sector::SECTOR;
use millrace::queue::journal::{JournalError, scan, segment};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng, SeedableRng};

use super::journal_rig::{Handed, Notes, Rig, SharedNotes, open, orders_in};
use super::outcome::{Why, seed};
use super::sim_disk::{Image, Kept, Recording, SimDisk};

/// Each journal has this id, and a foreign one another.
const ID: u8 = 7;
const FOREIGN_ID: u8 = 8;
/// Orders in memory; few, so that some wait on the disk.
const CAPACITY: usize = 16;
const LIVES: usize = 4;
/// Crash states for each point of a recording, each with other choices.
const CHOICES: usize = 10;
/// One in so many crash states has to go on, too.
const GOES_ON: u64 = 5;

#[derive(Default)]
struct Figures {
    histories: u64,
    operations: u64,
    orders: u64,
    states: u64,
    resumed: u64,
    flips: u64,
    cuts: u64,
    exchanges: u64,
    refused: u64,
}

/// `count` crash states, flipped bytes and cut files each, as far as there are so many.
pub fn run(count: u64) -> Result<String, Why> {
    let seed = seed();
    let mut figures = Figures::default();
    let repeat = |why| format!("seed={seed} {why}");
    crash(seed, count, &mut figures).map_err(repeat)?;
    let all = damage(seed, count, &mut figures).map_err(repeat)?;
    let Figures {
        histories,
        operations,
        orders,
        states,
        resumed,
        flips,
        cuts,
        exchanges,
        refused,
    } = figures;
    Ok(format!(
        "histories={histories} operations={operations} orders={orders} states={states} \
         resumed={resumed} flips={flips} cuts={cuts} of={all} exchanges={exchanges} \
         refused={refused} silently_short=0 seed={seed}"
    ))
}

// --- Crashes --------------------------------------------------------------------------------

fn crash(seed: u64, count: u64, figures: &mut Figures) -> Result<(), String> {
    while figures.states < count {
        let seed = seed.wrapping_add(figures.histories);
        let mut rng = StdRng::seed_from_u64(seed);
        let (recording, notes) =
            history(&mut rng).map_err(|why| format!("history={} {why}", figures.histories))?;
        let notes = notes.lock();
        figures.histories += 1;
        figures.operations += recording.ops.len() as u64;
        figures.orders += notes.orders.len() as u64;
        let points = recording.ops.len() + 1;
        let mut chosen: Vec<(usize, usize)> = (0..points)
            .flat_map(|point| (0..CHOICES).map(move |choice| (point, choice)))
            .collect();
        let left = (count - figures.states) as usize;
        if left < chosen.len() {
            chosen.shuffle(&mut rng);
            chosen.truncate(left);
        }
        let chosen: BTreeSet<_> = chosen.into_iter().collect();
        let mut result = Ok(());
        recording.states(|point, state| {
            for (_, choice) in chosen.range((point, 0)..(point + 1, 0)) {
                let kept = *Kept::ALL.get(*choice).unwrap_or(&Kept::Random);
                let image = state.crash(kept, &mut rng);
                figures.states += 1;
                let resume = figures.states % GOES_ON == 0;
                figures.resumed += u64::from(resume);
                result = survives(&image, point, &notes, resume, &mut rng).map_err(|why| {
                    let last = point.checked_sub(1).map(|last| &recording.ops[last]);
                    let last = format!("{last:.0?}").chars().take(80).collect::<String>();
                    format!(
                        "history={} after operation {point} ({last}), {kept:?} kept: {why}",
                        figures.histories - 1
                    )
                });
                if result.is_err() {
                    return false;
                }
            }
            true
        });
        result?;
    }
    Ok(())
}

/// The journal opens after a crash, has what it owes, and goes on where it is asked to.
fn survives(
    image: &Image,
    point: usize,
    notes: &Notes,
    resume: bool,
    rng: &mut StdRng,
) -> Result<(), String> {
    let disk = SimDisk::of(image);
    let opened = open(&disk.process(), ID).map_err(|error| format!("refused: {error}"))?;
    let found = orders_in(&opened).map_err(|error| format!("unreadable: {error}"))?;
    notes.check(&found, point)?;
    drop(opened);
    if resume { goes_on(image, rng) } else { Ok(()) }
}

/// A process starts on what a crash left, and what it acknowledges survives the next crash.
fn goes_on(image: &Image, rng: &mut StdRng) -> Result<(), String> {
    let disk = SimDisk::of(image);
    let notes = SharedNotes::default();
    // What is there was checked; these notes are of what comes now, which has to come last.
    let handle = disk.process();
    let opened = open(&handle, ID).map_err(|error| format!("refused: {error}"))?;
    let before = orders_in(&opened).map_err(|error| error.to_string())?;
    drop(opened);
    notes.lock().know(before);
    let rig = Rig::start(&disk, &notes, ID, CAPACITY, true)?
        .map_err(|error| format!("does not start again: {error}"))?;
    let mut orders = Vec::new();
    for _ in 0..3 {
        if let Handed::Over(order) = rig.hand_over(rng, 300)? {
            orders.push(order);
        }
    }
    rig.until_told(&orders)?;
    if orders.is_empty() || !orders.iter().all(|order| order.slot.is_durable()) {
        return Err("started again, it does not acknowledge".to_owned());
    }
    rig.kill();
    let at = disk.ops();
    let kept = Kept::ALL[rng.random_range(0..Kept::ALL.len())];
    let after = SimDisk::of(&disk.state().crash(kept, rng));
    let opened = open(&after.process(), ID)
        .map_err(|error| format!("the crash after the crash, {kept:?} kept: refused: {error}"))?;
    let found = orders_in(&opened).map_err(|error| error.to_string())?;
    notes.lock().check(&found, at)
}

/// Several processes one after the other on one disk, each ended in another way.
fn history(rng: &mut StdRng) -> Result<(Recording, SharedNotes), String> {
    let disk = SimDisk::new(rng.random());
    let notes = SharedNotes::default();
    for life in 0..LIVES {
        let retain = rng.random();
        let mut rig = Rig::start(&disk, &notes, ID, CAPACITY, retain)?
            .map_err(|error| format!("life {life} does not start: {error}"))?;
        let end = rng.random_range(0..3);
        if end == 0 {
            disk.kill_at(disk.ops() + rng.random_range(1..150));
        }
        live(&mut rig, rng, retain)?;
        match end {
            1 => {
                rig.handle.die();
                rig.kill();
                let kept = Kept::ALL[rng.random_range(0..Kept::ALL.len())];
                disk.lose_power(kept, rng);
            }
            2 => rig.finish()?,
            _ => rig.kill(),
        }
        notes.lock().fault()?;
    }
    Ok((disk.recording(), notes))
}

/// A process's life: orders come in, alone and many at once, small and large; most are decided
/// soon, some only after their segment and others are full.
fn live(rig: &mut Rig, rng: &mut StdRng, retain: bool) -> Result<(), String> {
    let mut open = Vec::new();
    for step in 1..=60 {
        for _ in 0..rng.random_range(1..8) {
            let attributes = [0, 40, 400, 1_024][rng.random_range(0..4)];
            match rig.hand_over(rng, attributes)? {
                Handed::Over(order) => open.push(order),
                // The workers take, and it goes on below.
                Handed::Refused(_) => break,
            }
        }
        if rng.random_ratio(4, 5) {
            rig.until_told(&open)?;
            open.clear();
        }
        if rig.is_killed() {
            return Ok(());
        }
        rig.take();
        if step % 20 == 0 {
            rig.decide(|_| true);
        } else {
            rig.decide(|_| rng.random_ratio(19, 20));
        }
        if retain && step % 10 == 0 {
            rig.queue.confirm(rig.queue.decided_up_to());
        }
    }
    rig.until_told(&open)
}

// --- Damage ---------------------------------------------------------------------------------

/// A journal of two processes, of which nothing was deleted, and everything in it is owed.
struct Whole {
    image: Image,
    notes: SharedNotes,
    recording: Recording,
    /// Where its last group begins: in which segment, at which sector.
    last_group: (u64, u64),
}

fn whole(rng: &mut StdRng, id: u8) -> Result<Whole, String> {
    let disk = SimDisk::new(rng.random());
    let notes = SharedNotes::default();
    for life in 0..2 {
        let mut rig = Rig::start(&disk, &notes, id, CAPACITY, true)?
            .map_err(|error| format!("life {life} does not start: {error}"))?;
        let bytes = rig.queue.bytes();
        while rig.queue.bytes() < bytes + (1 << 17) {
            let mut open = Vec::new();
            for _ in 0..rng.random_range(1..5) {
                if let Handed::Over(order) = rig.hand_over(rng, 900)? {
                    open.push(order);
                }
            }
            rig.until_told(&open)?;
            rig.take();
        }
        rig.kill();
        disk.lose_power(Kept::Nothing, rng);
    }
    for noted in notes.lock().orders.values_mut() {
        noted.decided_at = None;
    }
    let image = disk.state().image();
    let opened = open(&SimDisk::of(&image).process(), id).map_err(|error| error.to_string())?;
    let last = opened.scanned.groups.last().ok_or("an empty journal")?;
    Ok(Whole {
        last_group: (last.segment.number, last.place),
        image,
        notes,
        recording: disk.recording(),
    })
}

/// How many places there were to damage.
fn damage(seed: u64, count: u64, figures: &mut Figures) -> Result<u64, String> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0xda3a6e);
    let whole = whole(&mut rng, ID)?;
    let notes = whole.notes.lock();
    intact_or_refused(&whole.image, &notes, None).map_err(|why| format!("undamaged: {why}"))?;
    let mut places: Vec<(&String, usize)> = whole
        .image
        .iter()
        .flat_map(|(name, content)| (0..content.len()).map(move |at| (name, at)))
        .collect();
    let all = places.len() as u64;
    places.shuffle(&mut rng);
    let chosen = places.len().min(count as usize);
    for (name, at) in &places[..chosen] {
        let with: u8 = rng.random_range(1..=255);
        let image = changed(&whole.image, name, |content| content[*at] ^= with);
        let refused = intact_or_refused(&image, &notes, Some(name))
            .map_err(|why| format!("byte {at} of {name} changed by {with:#04x}: {why}"))?;
        shows_nothing_else(&image, &notes)?;
        figures.flips += 1;
        figures.refused += u64::from(refused);
    }
    places.shuffle(&mut rng);
    for (name, at) in &places[..chosen] {
        let image = changed(&whole.image, name, |content| content.truncate(*at));
        let refused = intact_or_refused(&image, &notes, Some(name))
            .map_err(|why| format!("{name} cut at {at}: {why}"))?;
        figures.cuts += 1;
        figures.refused += u64::from(refused);
    }
    drop(notes);
    exchanges(&whole, count, &mut rng, figures)?;
    Ok(all)
}

/// Sectors and segments that are whole, and not where they belong.
fn exchanges(
    whole: &Whole,
    count: u64,
    rng: &mut StdRng,
    figures: &mut Figures,
) -> Result<(), String> {
    let notes = whole.notes.lock();
    let mut try_one = |image: &Image, what: String| {
        let refused = intact_or_refused(image, &notes, None);
        figures.refused += u64::from(refused.map_err(|why| format!("{what}: {why}"))?);
        figures.exchanges += 1;
        Ok::<(), String>(())
    };
    let number_of = |name: &str| segment::file_number(name).unwrap_or(0);
    let sectors: Vec<(&String, usize)> = whole
        .image
        .iter()
        .flat_map(|(name, content)| (0..content.len() / SECTOR).map(move |at| (name, at)))
        .collect();
    let sector = |image: &Image, (name, at): (&String, usize)| {
        image[name][at * SECTOR..(at + 1) * SECTOR].to_vec()
    };
    let put = |image: &Image, (name, at): (&String, usize), with: &[u8]| {
        changed(image, name, |content| {
            content[at * SECTOR..(at + 1) * SECTOR].copy_from_slice(with);
        })
    };
    // Zeroed. Not the last group: there it is what a crash leaves of a write that nobody was told
    // about, and nothing can tell the two apart.
    let before_last =
        |(name, at): &(&String, usize)| (number_of(name), *at as u64) < whole.last_group;
    let mut earlier: Vec<_> = sectors.iter().copied().filter(before_last).collect();
    earlier.shuffle(rng);
    for place in earlier.iter().take((count as usize).max(20)) {
        let image = put(&whole.image, *place, &[0; SECTOR]);
        shows_nothing_else(&image, &notes)?;
        try_one(&image, format!("sector {place:?} zeroed"))?;
    }
    for _ in 0..count.max(20) {
        let (a, b) = (
            sectors[rng.random_range(0..sectors.len())],
            sectors[rng.random_range(0..sectors.len())],
        );
        let image = put(&whole.image, a, &sector(&whole.image, b));
        let image = put(&image, b, &sector(&whole.image, a));
        try_one(&image, format!("sectors {a:?} and {b:?} exchanged"))?;
    }
    let foreign = self::whole(rng, FOREIGN_ID)?;
    let names: Vec<&String> = whole.image.keys().collect();
    for (place, name) in names.iter().enumerate() {
        let inside = place > 0 && place + 1 < names.len();
        if inside {
            let mut image = whole.image.clone();
            image.remove(*name);
            try_one(&image, format!("{name} removed"))?;
        }
        if number_of(name) < whole.last_group.0 {
            let image = changed(&whole.image, name, |content| content[SECTOR..].fill(0));
            try_one(&image, format!("{name} emptied"))?;
        }
        if let Some(other) = foreign.image.get(*name) {
            let image = changed(&whole.image, name, |content| content.clone_from(other));
            try_one(&image, format!("{name} of another journal"))?;
        }
        for other in &names {
            let image = changed(&whole.image, name, |content| {
                content.clone_from(&whole.image[*other]);
            });
            try_one(&image, format!("{name} replaced by {other}"))?;
        }
    }
    // Copies from earlier. Of the segment with the last group one is what a crash might have left.
    let mut stale = Vec::new();
    whole.recording.states(|point, state| {
        if point % 7 == 0 {
            for (name, content) in state.image() {
                let now = whole.image.get(&name);
                let complete = number_of(&name) < whole.last_group.0;
                if complete && now.is_some_and(|now| *now != content) {
                    stale.push((point, name, content));
                }
            }
        }
        true
    });
    stale.shuffle(rng);
    for (point, name, content) in stale.iter().take((count as usize).max(20)) {
        let image = changed(&whole.image, name, |now| now.clone_from(content));
        try_one(&image, format!("{name} as it was after operation {point}"))?;
    }
    Ok(())
}

fn changed(image: &Image, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Image {
    let mut image = image.clone();
    let content = image.get_mut(name).map(Arc::make_mut);
    change(content.expect("the file"));
    image
}

/// Everything is there, or it is refused with a place. True: refused.
fn intact_or_refused(image: &Image, notes: &Notes, where_: Option<&str>) -> Result<bool, String> {
    let disk = SimDisk::of(image);
    let handle = disk.process();
    match open(&handle, ID) {
        Ok(opened) => {
            let found = orders_in(&opened).map_err(|error| format!("unreadable: {error}"))?;
            notes.check(&found, usize::MAX).map(|()| false)
        }
        Err(JournalError::Damaged {
            segment, offset, ..
        }) => {
            let length = image.get(&segment).map(|content| content.len() as u64);
            if where_.is_some_and(|name| name != segment) {
                return Err(format!("refused because of {segment}"));
            }
            match length {
                Some(length) if offset <= length => Ok(true),
                _ => Err(format!("refused because of {segment}, offset {offset}")),
            }
        }
        Err(JournalError::Missing { segment }) if !image.contains_key(&segment) => Ok(true),
        Err(other) => Err(format!("refused without a place: {other}")),
    }
}

/// What people are shown of a damaged journal is what was written, or nothing.
fn shows_nothing_else(image: &Image, notes: &Notes) -> Result<(), String> {
    let mut shown = Ok(());
    let handle = SimDisk::of(image).process();
    scan::salvage(&handle, |record| {
        if let Record::Order(order) = record {
            let known = notes.orders.get(&order.id).map(|noted| &noted.order);
            if known != Some(&*order) {
                shown = Err(format!("salvaged, and never written: {order:?}"));
            }
        }
    })
    .map_err(|error| error.to_string())?;
    shown
}
