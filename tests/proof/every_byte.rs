//! Every byte of a small journal flipped, and each of its files cut to every length: all of it is
//! refused, with the place. `crash_states` does the same at random places of larger ones.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::crash_states::names_the_place;
use super::journal_fixture::{Fixture, open, segments};
use super::outcome::{Why, seed};
use super::sim_disk::SimDisk;

/// Orders of the journal, each a group of its own: enough to begin a second segment.
const ORDERS: usize = 60;

/// Flips `count` bytes, spread evenly, and cuts as often; all of them where `count` is greater than
/// there are.
pub fn run(count: u64) -> Result<String, Why> {
    let seed = seed();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut fixture =
        Fixture::start(SimDisk::default(), 1, 100).map_err(|error| error.to_string())?;
    for _ in 0..ORDERS {
        fixture.append(&mut rng).map_err(|why| format!("{why:?}"))?;
        fixture.settle()?;
    }
    drop(fixture.queue.stop());
    let sound = fixture.disk.files();
    let opened = open(&SimDisk::with(&sound)).map_err(|error| error.to_string())?;
    fixture.compare(&opened, fixture.disk.now())?;
    drop(opened);

    let places: Vec<(String, usize)> = segments(&sound)
        .into_iter()
        .flat_map(|name| (0..sound[&name].len()).map(move |at| (name.clone(), at)))
        .collect();
    let tried = places.len().min(count as usize);
    let mut files = sound.clone();
    for number in 0..tried {
        let (name, at) = &places[number * places.len() / tried];
        let file = files.get_mut(name).expect("a file");
        let bit = 1 << rng.random_range(0..8);
        file[*at] ^= bit;
        is_refused(&SimDisk::with(&files))
            .map_err(|why| format!("seed={seed} byte {at} of {name} with bit {bit}: {why}"))?;
        files.get_mut(name).expect("a file")[*at] ^= bit;
        files.get_mut(name).expect("a file").truncate(*at);
        is_refused(&SimDisk::with(&files))
            .map_err(|why| format!("seed={seed} {name} cut to {at} bytes: {why}"))?;
        files.insert(name.clone(), sound[name].clone());
    }
    let of = places.len();
    Ok(format!(
        "flips={tried} of {of} bytes, cuts={tried} of {of} lengths, silently_short=0 seed={seed}"
    ))
}

fn is_refused(disk: &SimDisk) -> Result<(), String> {
    match open(disk) {
        Ok(_) => Err("accepted".to_owned()),
        Err(error) if names_the_place(&error) => Ok(()),
        Err(error) => Err(format!("refused without the place: {error}")),
    }
}
