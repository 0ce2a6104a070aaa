//! `verify` on any file never panics, and no file makes it keep more than its entries. The first byte chooses: any bytes,
//! or the file of a draw that was made from the input. That one is right, and once a byte of it is altered it is not,
//! because the fuzz target brings every evidence.

#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use millrace::order::draw::verify::{Evidence, Opening, header_of, verify};
use millrace::order::draw::{
    Beacon, Entry, EntryTokens, Header, Ranked, Ranking, Salt, Seed, State, VERSION, entries_hash,
    rows, write_line,
};
use millrace::order::{Quantity, UserId};

#[derive(Arbitrary, Debug)]
struct Raw {
    seed: [u8; 32],
    salt: [u8; 32],
    beacon: Option<Vec<u8>>,
    units: u16,
    entrants: Vec<(Vec<u8>, u16)>,
    at: u32,
    flip: u8,
}

fn visible(bytes: &[u8], max: usize) -> String {
    let bytes = bytes.iter().take(max);
    bytes.map(|byte| char::from(b'!' + byte % 94)).collect()
}

fn draw(raw: &Raw) {
    let (seed, tokens) = (Seed(raw.seed), EntryTokens::new(&Salt(raw.salt)));
    let beacon = raw.beacon.as_ref().map(|bytes| visible(bytes, 256));
    let beacon = beacon.and_then(|text| Beacon::new(&text).ok());
    let ranking = Ranking::new(&seed, beacon.as_ref());
    let mut openings: Vec<Opening> = Vec::new();
    let mut ranked = Vec::new();
    for (user, quantity) in raw.entrants.iter().take(200) {
        let Ok(user_id) = UserId::new(&visible(user, 48)) else {
            continue;
        };
        if openings.iter().any(|opening| opening.user_id == user_id) {
            continue;
        }
        let token = tokens.of(&user_id);
        let quantity = u32::from(*quantity) % Quantity::MAX + 1;
        ranked.push(Ranked {
            rank: ranking.rank(&user_id),
            entry: Entry {
                hash: token.entry_hash(&user_id),
                quantity: Quantity::new(quantity).expect("in range"),
            },
        });
        openings.push(Opening { user_id, token });
    }
    let mut entries: Vec<_> = ranked.iter().map(|ranked| ranked.entry).collect();
    let header = Header {
        draw: VERSION.to_owned(),
        sku_id: "FUZZ".to_owned(),
        state: State::Drawn,
        draw_at: "2026-12-01T12:00:00.000Z".to_owned(),
        draw_beacon: beacon.as_ref().map(|_| "a beacon".to_owned()),
        commitment: seed.commitment(),
        fixed_at: Some("2026-12-01T12:00:00.001Z".to_owned()),
        units: Some(raw.units.into()),
        entries: Some(entries.len() as u64),
        entries_hash: Some(entries_hash(&mut entries)),
        beacon,
        seed: Some(seed),
    };
    let mut file = Vec::new();
    write_line(&header, &mut file).expect("text");
    for row in rows(&mut ranked, raw.units.into()) {
        write_line(&row, &mut file).expect("text");
    }
    let earlier = vec![header_of(&*file).expect("a header")];
    let evidence = Evidence { earlier, openings };
    let verdict = verify(&*file, &evidence).expect("a draw");
    assert!(verdict.ok, "{verdict:?}");

    let at = raw.at as usize % (file.len() - 1);
    if raw.flip != 0 {
        file[at] ^= raw.flip;
        let verdict = verify(&*file, &evidence);
        assert!(
            verdict.is_err() || verdict.is_ok_and(|verdict| !verdict.ok),
            "byte {at}"
        );
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    if kind % 2 == 0 {
        let _ = header_of(rest);
        let _ = verify(rest, &Evidence::default());
    } else if let Ok(raw) = Unstructured::new(rest).arbitrary::<Raw>() {
        draw(&raw);
    }
});
