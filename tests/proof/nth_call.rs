//! Every call to the disk fails once, or from then on: nothing is acknowledged that a crash would
//! lose, nothing hangs, and orders still reach the workers.

use std::time::Instant;

use millrace::queue::{DurableQueue, NotDurable, OrderQueue};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::journal_fixture::{Fixture, NOTHING, PATIENCE, open};
use super::outcome::{Why, seed};
use super::sim_disk::{Call, Crash, Failure, Replay, SimDisk};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// Orders of one run: more than a segment holds.
const ORDERS: usize = 150;

/// `count` is the greatest N.
pub fn run(count: u64) -> Result<String, Why> {
    let seed = seed();
    let (mut runs, mut not_started, mut failed, mut full) = (0, 0, 0, 0);
    for call in Call::ALL {
        for nth in 1..=count {
            for (sticky, errno) in [(false, EIO), (true, EIO), (false, ENOSPC), (true, ENOSPC)] {
                let failure = Failure {
                    call,
                    nth,
                    sticky,
                    errno,
                };
                let outcome = one(failure, seed)
                    .map_err(|why| Why::Failed(format!("{failure:?} seed={seed}: {why}")))?;
                runs += 1;
                match outcome {
                    Outcome::NotStarted => not_started += 1,
                    Outcome::Failed => failed += 1,
                    Outcome::Full => full += 1,
                    Outcome::Unharmed => {}
                }
            }
        }
    }
    Ok(format!(
        "runs={runs} not_started={not_started} journal_failed={failed} journal_full={full} lost=0 seed={seed}"
    ))
}

enum Outcome {
    NotStarted,
    Failed,
    Full,
    Unharmed,
}

fn one(failure: Failure, seed: u64) -> Result<Outcome, String> {
    let mut rng = StdRng::seed_from_u64(seed);
    // A journal that is there already is opened and read, and a small memory sends orders to the
    // disk, to be read back.
    let reads = matches!(failure.call, Call::Open | Call::Read);
    let disk = if reads {
        left_over()?
    } else {
        SimDisk::default()
    };
    let capacity = if reads { 40 } else { 1_000 };
    disk.fail(failure);
    let Ok(mut fixture) = Fixture::start(disk.clone(), 1, capacity) else {
        // Nobody was promised anything; with a disk that works again it starts.
        disk.mend();
        return match open(&disk) {
            Ok(_) => Ok(Outcome::NotStarted),
            Err(error) => Err(format!("does not open again: {error}")),
        };
    };
    let mut refused = None;
    for number in 0..ORDERS {
        match fixture.append(&mut rng) {
            Ok(_) => {}
            Err(NotDurable::Full) => {
                refused = Some(NotDurable::Full);
                break;
            }
            Err(NotDurable::Failed) => {
                refused = Some(NotDurable::Failed);
                break;
            }
            Err(other) => return Err(format!("refused: {other:?}")),
        }
        if number % 10 == 9 {
            fixture.settle()?;
        }
        // Some are decided on the way, so that segments are deleted.
        if number % 50 == 49 {
            match fixture.decide(20) {
                // All that is left is on the disk, and the reader is slower than the orders were: it comes to the fault now.
                Err(why) if why == NOTHING && failure.call == Call::Read => break,
                Ok(_) => {}
                Err(why) => return Err(why),
            }
        }
    }
    fixture.settle()?;
    let has_failed = fixture.queue.failure().is_some();
    if has_failed && fixture.append(&mut rng).is_ok() {
        return Err("an order was let in after the failure".to_owned());
    }
    if failure.call == Call::Sync || failure.call == Call::Write {
        // Nothing may be acknowledged by the file that failed.
        check_after_crash(&fixture, &disk, &mut rng)?;
    }
    if refused == Some(NotDurable::Full) {
        disk.mend();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match fixture.append(&mut rng) {
                Ok(_) => break,
                // Full for a moment only, and meanwhile orders could not be read back.
                Err(NotDurable::Failed) if failure.call == Call::Read => break,
                Err(_) if Instant::now() > deadline => {
                    return Err("full for ever, although the disk has room again".to_owned());
                }
                Err(_) => std::thread::yield_now(),
            }
        }
        fixture.settle()?;
    }
    if failure.call == Call::Read {
        // What only the disk has comes once it can be read.
        disk.mend();
    }
    // Whatever became of the journal, the workers get every order, each once.
    while fixture.undecided() > 0 {
        if fixture.decide(64)? == 0 {
            return Err("the queue ended with orders in it".to_owned());
        }
    }
    fixture.queue.close();
    drop(fixture.queue.stop());
    check_after_crash(&fixture, &disk, &mut rng)?;
    Ok(match refused {
        Some(NotDurable::Full) => Outcome::Full,
        _ if has_failed => Outcome::Failed,
        _ => Outcome::Unharmed,
    })
}

/// The segments of a process that ended in order.
fn left_over() -> Result<SimDisk, String> {
    let disk = SimDisk::default();
    let fixture = Fixture::start(disk.clone(), 1, 1).map_err(|error| error.to_string())?;
    drop(fixture.queue.stop());
    Ok(disk)
}

fn check_after_crash(fixture: &Fixture, disk: &SimDisk, rng: &mut StdRng) -> Result<(), String> {
    let done = disk.done();
    let mut replay = Replay::default();
    done.iter().for_each(|done| replay.step(done));
    for crash in [Crash::Nothing, Crash::Some, Crash::Everything] {
        let files = replay.crash(crash, rng);
        let opened = open(&SimDisk::with(&files))
            .map_err(|error| format!("a crash leaving {crash:?} is refused: {error}"))?;
        fixture
            .compare(&opened, done.len())
            .map_err(|why| format!("a crash leaving {crash:?}: {why}"))?;
    }
    Ok(())
}
