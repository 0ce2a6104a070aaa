//! Checks a published draw from its file.
//!
//! This file is the whole judgement; what it calls reads lines of JSON, computes SHA-256 and HMAC, and words what was
//! found. [`verify`] reads as the list of what has to hold:
//!
//! 1. `seed` – the seed is the one that was promised: its SHA-256 is the commitment.
//! 2. `beacon` – a public value takes part if, and only if, it was named beforehand.
//! 3. `order` – place after place, the ranks ascend.
//! 4. `once` – nobody entered twice.
//! 5. `count` – there are as many entries as were announced before the seed was known.
//! 6. `entries` – they are those entries: their hash is the announced one.
//! 7. `winners` – those won, and only those, for whose quantity there were units when their turn came.
//! 8. `earlier` – what was published earlier of this draw says the same (only with such files).
//! 9. `opened` – the entries whose user id and token are given are there, with the rank that the seed gives the user id
//!    (only with such entries).
//!
//! The file is read once, line by line. Of each entry 36 bytes are kept.

mod findings;
mod lines;

use std::collections::HashMap;
use std::io::{self, BufRead};

use serde::{Deserialize, Serialize};

pub use self::findings::Check;
use self::findings::{Faults, check, equal, opt};
use self::lines::{LineError, Lines, plain};
use super::document::read_line;
use super::{
    Beacon, EntriesHash, Entry, EntryHash, EntryToken, Header, RankDigits, Ranking, Row, Seed,
    State, VERSION, entries_hash,
};
use crate::order::UserId;

/// What is known of a draw besides its file.
#[derive(Debug, Default)]
pub struct Evidence {
    /// First lines of files that were published earlier of the same draw.
    pub earlier: Vec<Header>,
    /// Entries of which user id and token are known.
    pub openings: Vec<Opening>,
}

/// User id and token of an entry, as its shop knows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// The buyer.
    pub user_id: UserId,
    /// What the shop was told on entering.
    pub token: EntryToken,
}

/// The judgement on a draw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Whether every check holds.
    pub ok: bool,
    /// The SKU, as the file names it.
    pub sku_id: String,
    /// When entries ended, as the file says.
    pub draw_at: String,
    /// Entries that were read.
    pub entries: u64,
    /// Units that were drawn for.
    pub units: u64,
    /// Entries that won.
    pub winners: u64,
    /// Every check that was made.
    pub checks: Vec<Check>,
    /// What the file cannot show, in words.
    pub not_checked: Vec<String>,
}

/// Reasons why there is nothing to judge.
#[derive(Debug, thiserror::Error)]
pub enum Unjudged {
    /// The file could not be read.
    #[error("cannot read the file: {0}")]
    Unreadable(#[from] io::Error),
    /// It is not a draw.
    #[error("this is not a published draw: its first line {0}")]
    NotADraw(String),
    /// It is one of another format.
    #[error(
        "this draw is in the format {0:?}, and this program reads {expected:?}: take the program that published it",
        expected = VERSION
    )]
    OtherFormat(String),
    /// The seed is not out yet.
    #[error("this draw is not made yet: {0}")]
    NotDrawn(&'static str),
}

/// Checks a draw.
///
/// # Errors
/// [`Unjudged`] if the file is not that of a finished draw. A file whose first line is, and which then goes wrong, is
/// judged, and not ok.
pub fn verify(file: impl BufRead, evidence: &Evidence) -> Result<Verdict, Unjudged> {
    let mut lines = Lines::new(file);
    let header = read_header(&mut lines)?;
    let drawn = drawn(&header)?;
    let ranking = Ranking::new(&drawn.seed, header.beacon.as_ref());

    let mut order = OrderOfRanks::default();
    let mut winners = Winners::new(drawn.units);
    let mut openings = Openings::new(&evidence.openings, &ranking);
    let mut entries: Vec<Entry> = Vec::new();
    let unreadable = loop {
        let row: Row = match lines.next() {
            Ok(None) => break None,
            Ok(Some(row)) => row,
            Err(LineError::Io(error)) => return Err(error.into()),
            Err(LineError::Malformed(why)) => break Some(why),
        };
        order.next(&row);
        winners.next(&row);
        openings.next(&row);
        entries.push(Entry {
            hash: row.entry,
            quantity: row.quantity,
        });
    };

    let mut checks = vec![
        seed_is_the_promised_one(&header, &drawn.seed),
        beacon_is_as_announced(&header),
    ];
    if let Some(why) = unreadable {
        // What follows would only repeat that lines are missing.
        checks.push(check("file", "The file can be read to its end.", Err(why)));
    } else {
        let hash = entries_hash(&mut entries);
        let number = entries.len() as u64;
        checks.push(order.check());
        checks.push(nobody_twice(&entries));
        checks.push(check(
            "count",
            "There are as many entries as were announced before the seed was known.",
            equal("number of entries", &drawn.entries, &number),
        ));
        checks.push(check(
            "entries",
            "They are the entries that were announced: their hash is the same.",
            equal("hash of the entries", &drawn.entries_hash, &hash),
        ));
        checks.push(winners.check());
        if !evidence.earlier.is_empty() {
            checks.push(earlier_files_agree(&header, &evidence.earlier));
        }
        if !evidence.openings.is_empty() {
            checks.push(openings.check(winners.won));
        }
    }
    Ok(Verdict {
        ok: checks.iter().all(|check| check.ok),
        entries: entries.len() as u64,
        units: winners.units,
        winners: winners.won,
        checks,
        not_checked: not_checked(&header, &drawn, evidence),
        sku_id: header.sku_id.clone(),
        draw_at: header.draw_at.clone(),
    })
}

/// The first line of a published draw, which may not be made yet.
///
/// # Errors
/// [`Unjudged`] if there is none.
pub fn header_of(file: impl BufRead) -> Result<Header, Unjudged> {
    read_header(&mut Lines::new(file))
}

fn read_header<R: BufRead>(lines: &mut Lines<R>) -> Result<Header, Unjudged> {
    #[derive(Deserialize)]
    struct Format {
        draw: String,
    }
    let line = match lines.raw() {
        Ok(Some(line)) => line,
        Ok(None) => return Err(Unjudged::NotADraw("is missing".to_owned())),
        Err(LineError::Io(error)) => return Err(error.into()),
        Err(LineError::Malformed(why)) => return Err(Unjudged::NotADraw(why)),
    };
    let not_a_draw = |error: serde_json::Error| {
        Unjudged::NotADraw(format!("cannot be read: {}", plain(&error.to_string())))
    };
    let format: Format = read_line(line).map_err(not_a_draw)?;
    if format.draw != VERSION {
        return Err(Unjudged::OtherFormat(format.draw));
    }
    let header: Header = read_line(line).map_err(not_a_draw)?;
    let texts = [
        Some(&header.sku_id),
        Some(&header.draw_at),
        header.fixed_at.as_ref(),
        header.draw_beacon.as_ref(),
    ];
    // A verdict quotes them, and must not be written by them.
    let is_plain = texts.into_iter().flatten().all(|text| plain(text) == *text);
    match is_plain {
        true => Ok(header),
        false => Err(Unjudged::NotADraw(
            "has control characters, or a text that is too long".to_owned(),
        )),
    }
}

/// What a draw publishes at its end.
struct Drawn<'a> {
    seed: Seed,
    fixed_at: &'a str,
    units: u64,
    entries: u64,
    entries_hash: EntriesHash,
}

fn drawn(header: &Header) -> Result<Drawn<'_>, Unjudged> {
    match header.state {
        State::EntriesOpen => return Err(Unjudged::NotDrawn("entries still come in")),
        State::EntriesFixed => {
            return Err(Unjudged::NotDrawn(
                "its entries are fixed, and its seed is still secret",
            ));
        }
        State::Drawn => {}
    }
    let whole = || {
        Some(Drawn {
            seed: header.seed?,
            fixed_at: header.fixed_at.as_deref()?,
            units: header.units?,
            entries: header.entries?,
            entries_hash: header.entries_hash?,
        })
    };
    whole().ok_or_else(|| {
        Unjudged::NotADraw(
            "says that the draw is made, and lacks seed, fixed_at, units, entries or entries_hash"
                .to_owned(),
        )
    })
}

// --- The checks -------------------------------------------------------------------------------

fn seed_is_the_promised_one(header: &Header, seed: &Seed) -> Check {
    check(
        "seed",
        "The seed is the one that was promised: its SHA-256 is the commitment.",
        equal("commitment", &header.commitment, &seed.commitment()),
    )
}

fn beacon_is_as_announced(header: &Header) -> Check {
    let beacon = header.beacon.as_ref().map(Beacon::as_str);
    check(
        "beacon",
        "A beacon takes part in the ranks if, and only if, one was named beforehand.",
        match (&header.draw_beacon, beacon) {
            (Some(name), Some(value)) => Ok(format!("{value:?} for {name:?}")),
            (None, None) => Ok("none: the seed alone ranks".to_owned()),
            (Some(name), None) => Err(format!("{name:?} was named, and no value takes part")),
            (None, Some(value)) => Err(format!("none was named, and {value:?} takes part")),
        },
    )
}

/// Places count from 1, and each rank is above the one before.
#[derive(Default)]
struct OrderOfRanks {
    place: u64,
    rank: Option<RankDigits>,
    faults: Faults,
}

impl OrderOfRanks {
    fn next(&mut self, row: &Row) {
        self.place += 1;
        if row.place != self.place {
            let (line, place) = (self.place + 1, self.place);
            self.faults.note(|| {
                format!(
                    "line {line} should be place {place} and is place {}",
                    row.place
                )
            });
        }
        if let Some(before) = &self.rank
            && !before.are_below(&row.rank)
        {
            self.faults.note(|| {
                format!(
                    "place {}: its rank {} is not above {before}, that of the place before",
                    row.place, row.rank
                )
            });
        }
        self.rank = Some(row.rank.clone());
    }

    fn check(&self) -> Check {
        check(
            "order",
            "Place after place, the ranks ascend.",
            self.faults.result(|| format!("{} places", self.place)),
        )
    }
}

/// The entries are sorted by hash.
fn nobody_twice(entries: &[Entry]) -> Check {
    let mut faults = Faults::default();
    for pair in entries.windows(2) {
        if pair[0].hash == pair[1].hash {
            faults.note(|| format!("the entry {} is there twice", pair[0].hash));
        }
    }
    check(
        "once",
        "Nobody entered twice.",
        faults.result(|| format!("{} different entries", entries.len())),
    )
}

/// Whose turn it is takes its quantity, if so many units are left. An entry for more than are left is passed over.
struct Winners {
    units: u64,
    left: u64,
    won: u64,
    faults: Faults,
}

impl Winners {
    fn new(units: u64) -> Self {
        Winners {
            units,
            left: units,
            won: 0,
            faults: Faults::default(),
        }
    }

    fn next(&mut self, row: &Row) {
        let wants = u64::from(row.quantity.get());
        let wins = wants <= self.left;
        if row.won != wins {
            let (left, outcome) = (self.left, if row.won { "won" } else { "did not win" });
            self.faults.note(|| {
                format!(
                    "place {} wanted {wants} of the {left} units that were left, and {outcome}",
                    row.place
                )
            });
        }
        if wins {
            self.left -= wants;
            self.won += 1;
        }
    }

    fn check(&self) -> Check {
        check(
            "winners",
            "Those won, and only those, for whose quantity there were units when their turn came.",
            self.faults.result(|| {
                format!(
                    "{} winners of {} units, {} units left over",
                    self.won, self.units, self.left
                )
            }),
        )
    }
}

/// What was public earlier must not have changed since.
fn earlier_files_agree(header: &Header, earlier: &[Header]) -> Check {
    let mut faults = Faults::default();
    for earlier in earlier {
        let mut must_be = |name: &str, then: Option<String>, now: Option<String>| {
            // What was not known then may have become known.
            if then.is_some() && then != now {
                faults.note(|| {
                    let (then, now) = (opt(&then), opt(&now));
                    format!(
                        "{name} was {then} while it was {:?}, and is {now}",
                        earlier.state
                    )
                });
            }
        };
        let text = |text: &str| Some(text.to_owned());
        let number = |number: Option<u64>| number.map(|number| number.to_string());
        must_be("sku_id", text(&earlier.sku_id), text(&header.sku_id));
        must_be("draw_at", text(&earlier.draw_at), text(&header.draw_at));
        must_be(
            "commitment",
            text(&earlier.commitment.to_string()),
            text(&header.commitment.to_string()),
        );
        // A draw without a beacon must not get one afterwards, either.
        must_be(
            "draw_beacon",
            Some(opt(&earlier.draw_beacon)),
            Some(opt(&header.draw_beacon)),
        );
        must_be(
            "fixed_at",
            earlier.fixed_at.clone(),
            header.fixed_at.clone(),
        );
        must_be("units", number(earlier.units), number(header.units));
        must_be("entries", number(earlier.entries), number(header.entries));
        must_be(
            "entries_hash",
            earlier.entries_hash.map(|hash| hash.to_string()),
            header.entries_hash.map(|hash| hash.to_string()),
        );
        // The commitment binds the seed; nothing else binds this.
        let beacon = |header: &Header| {
            header
                .beacon
                .as_ref()
                .map(|value| value.as_str().to_owned())
        };
        must_be("beacon", beacon(earlier), beacon(header));
    }
    check(
        "earlier",
        "What was published earlier of this draw says the same.",
        faults.result(|| match earlier.len() {
            1 => "one earlier file agrees".to_owned(),
            files => format!("{files} earlier files agree"),
        }),
    )
}

/// The entries of which user id and token are known.
struct Openings<'a> {
    ranking: &'a Ranking,
    /// By the hash that the file has for them; taken out once found.
    wanted: HashMap<EntryHash, &'a UserId>,
    given: usize,
    found: u64,
    winners: u64,
    /// The row of the one that was found last.
    last: Option<Row>,
    faults: Faults,
}

impl<'a> Openings<'a> {
    fn new(openings: &'a [Opening], ranking: &'a Ranking) -> Self {
        let hashed = openings
            .iter()
            .map(|opening| (opening.token.entry_hash(&opening.user_id), &opening.user_id));
        let wanted: HashMap<_, _> = hashed.collect();
        Openings {
            ranking,
            given: wanted.len(),
            wanted,
            found: 0,
            winners: 0,
            last: None,
            faults: Faults::default(),
        }
    }

    fn next(&mut self, row: &Row) {
        let Some(user_id) = self.wanted.remove(&row.entry) else {
            return;
        };
        self.found += 1;
        self.winners += u64::from(row.won);
        let rank = self.ranking.rank(user_id);
        if !row.rank.begin(&rank) {
            self.faults.note(|| {
                format!(
                    "place {} is said to be of rank {}, but its user id {user_id} has the rank {rank}",
                    row.place, row.rank
                )
            });
        }
        self.last = Some(row.clone());
    }

    fn check(mut self, winners: u64) -> Check {
        let mut missing: Vec<_> = self.wanted.iter().collect();
        missing.sort_unstable_by_key(|(_, user_id)| user_id.as_str());
        for (hash, user_id) in missing {
            self.faults
                .note(|| format!("{user_id} is not in the draw: no line has its entry, {hash}"));
        }
        check(
            "opened",
            "The given entries are there, with the rank that the seed gives their user ids.",
            self.faults.result(|| match &self.last {
                Some(row) if self.given == 1 => format!(
                    "place {}, rank {}…, {}",
                    row.place,
                    row.rank,
                    if row.won { "won" } else { "did not win" }
                ),
                _ => format!(
                    "{} entries, and {} of the {winners} winners among them",
                    self.found, self.winners
                ),
            }),
        )
    }
}

fn not_checked(header: &Header, drawn: &Drawn<'_>, evidence: &Evidence) -> Vec<String> {
    let mut open = vec![];
    match &header.draw_beacon {
        Some(name) => open.push(format!(
            "that the beacon has the value that {name:?} had, in just this notation, and that nobody knew it before {}, \
             when the entries were fixed: look it up",
            drawn.fixed_at
        )),
        None => open.push(
            "that nobody used the seed before it was published: without a beacon, whoever could read it early could enter \
             under user ids that win"
                .to_owned(),
        ),
    }
    if evidence.earlier.is_empty() {
        open.push(
            "that commitment, number and hash of the entries were public before the seed: compare with copies that were \
             made in time (--earlier)"
                .to_owned(),
        );
    }
    open.push(
        "whose the entries are: each buyer can check the own entry with its token (--user-id and --entry-token), an \
         auditor those of all winners (--openings)"
            .to_owned(),
    );
    open.push(format!(
        "that {} units were for sale, as the shop said before, and that no person had several user ids",
        drawn.units
    ));
    open
}
