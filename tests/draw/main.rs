//! A published draw: what Millrace writes is what `make.py` writes by other means (Python's hashlib, openssl), and
//! whatever is altered in it is found, from the file alone or with the evidence that the check names.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use millrace::order::draw::verify::{Evidence, Opening, Unjudged, Verdict, header_of, verify};
use millrace::order::draw::{
    Beacon, Entry, EntryToken, EntryTokens, Header, Ranked, Ranking, Salt, Seed, State, VERSION,
    entries_hash, rows, write_line,
};
use millrace::order::{Quantity, UserId};
use serde_json::Value;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/draw")
}

fn vector(name: &str) -> String {
    fs::read_to_string(directory().join(name)).unwrap()
}

// --- A draw of the tests -----------------------------------------------------------------------

struct Draw {
    seed: Seed,
    salt: Salt,
    beacon: Option<Beacon>,
    entrants: Vec<(UserId, Quantity)>,
    /// The file before the draw.
    fixed: Header,
}

impl Draw {
    /// The inputs of make.py, with the terms of its file.
    fn of_vector(inputs: &Value) -> Self {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let hex = |name: &str| text(&inputs[name]).unwrap();
        let fixed = format!("{}-fixed.ndjson", text(&inputs["name"]).unwrap());
        let entrants = inputs["entrants"].as_array().unwrap().iter();
        Draw {
            seed: Seed::from_hex(&hex("seed")).unwrap(),
            salt: Salt::from_hex(&hex("salt")).unwrap(),
            beacon: text(&inputs["beacon"]).map(|beacon| Beacon::new(&beacon).unwrap()),
            entrants: entrants
                .map(|entrant| {
                    let quantity = entrant["quantity"].as_u64().unwrap();
                    let user_id = UserId::new(entrant["user_id"].as_str().unwrap()).unwrap();
                    (user_id, Quantity::new(quantity as u32).unwrap())
                })
                .collect(),
            fixed: header_of(vector(&fixed).as_bytes()).unwrap(),
        }
    }

    /// A draw without a beacon, of `count` users who want one unit each.
    fn of_crowd(count: u64, units: u64) -> Self {
        let seed = Seed([7; 32]);
        let user = |number| UserId::new(&format!("user-{number}")).unwrap();
        let mut draw = Draw {
            salt: Salt([8; 32]),
            beacon: None,
            entrants: (0..count).map(|n| (user(n), Quantity::ONE)).collect(),
            fixed: Header {
                draw: VERSION.to_owned(),
                sku_id: "CROWD".to_owned(),
                state: State::EntriesFixed,
                draw_at: "2026-12-01T12:00:00.000Z".to_owned(),
                draw_beacon: None,
                commitment: seed.commitment(),
                fixed_at: Some("2026-12-01T12:00:00.100Z".to_owned()),
                units: Some(units),
                entries: Some(count),
                entries_hash: None,
                beacon: None,
                seed: None,
            },
            seed,
        };
        draw.fixed.entries_hash = Some(entries_hash(&mut draw.entries()));
        draw
    }

    fn openings(&self) -> Vec<Opening> {
        let tokens = EntryTokens::new(&self.salt);
        let open = |user_id: &UserId| Opening {
            user_id: user_id.clone(),
            token: tokens.of(user_id),
        };
        self.entrants.iter().map(|(user, _)| open(user)).collect()
    }

    fn entries(&self) -> Vec<Entry> {
        let openings = self.openings();
        let pairs = openings.iter().zip(&self.entrants);
        pairs
            .map(|(opening, (user, quantity))| Entry {
                hash: opening.token.entry_hash(user),
                quantity: *quantity,
            })
            .collect()
    }

    /// The published file.
    fn file(&self) -> String {
        let header = Header {
            state: State::Drawn,
            beacon: self.beacon.clone(),
            seed: Some(self.seed),
            ..self.fixed.clone()
        };
        let ranking = Ranking::new(&self.seed, self.beacon.as_ref());
        let pairs = self.entries().into_iter().zip(&self.entrants);
        let mut ranked: Vec<_> = pairs
            .map(|(entry, (user, _))| Ranked {
                rank: ranking.rank(user),
                entry,
            })
            .collect();
        let mut file = Vec::new();
        write_line(&header, &mut file).unwrap();
        for row in rows(&mut ranked, header.units.unwrap()) {
            write_line(&row, &mut file).unwrap();
        }
        String::from_utf8(file).unwrap()
    }

    fn evidence(&self) -> Evidence {
        Evidence {
            earlier: vec![self.fixed.clone()],
            openings: self.openings(),
        }
    }
}

fn vectors() -> Vec<(String, Draw)> {
    let inputs: Value = serde_json::from_str(&vector("inputs.json")).unwrap();
    let inputs = inputs.as_array().unwrap().iter();
    inputs
        .map(|one| {
            (
                one["name"].as_str().unwrap().to_owned(),
                Draw::of_vector(one),
            )
        })
        .collect()
}

fn judge(file: &str, evidence: &Evidence) -> Verdict {
    verify(file.as_bytes(), evidence).unwrap()
}

/// The checks that do not hold.
fn wrong(file: &str, evidence: &Evidence) -> BTreeSet<&'static str> {
    let verdict = judge(file, evidence);
    let failed = verdict.checks.iter().filter(|check| !check.ok);
    let failed: BTreeSet<_> = failed.map(|check| check.name).collect();
    assert_eq!(verdict.ok, failed.is_empty());
    failed
}

// --- The format --------------------------------------------------------------------------------

#[test]
fn what_is_written_is_what_python_and_openssl_make_of_the_same_inputs() {
    for (name, draw) in vectors() {
        assert_eq!(draw.file(), vector(&format!("{name}-drawn.ndjson")));
        let lines = vector(&format!("{name}-openings.ndjson"));
        let tokens: Vec<_> = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["entry_token"].clone())
            .collect();
        let ours: Vec<_> = draw
            .openings()
            .iter()
            .map(|opening| Value::from(opening.token.to_string()))
            .collect();
        assert_eq!(ours, tokens);
    }
}

#[test]
fn a_right_draw_is_found_right_with_all_evidence_and_with_none() {
    for (name, draw) in vectors() {
        let file = vector(&format!("{name}-drawn.ndjson"));
        assert_eq!(wrong(&file, &Evidence::default()), BTreeSet::new());
        let mut evidence = draw.evidence();
        let open = vector(&format!("{name}-open.ndjson"));
        evidence.earlier.push(header_of(open.as_bytes()).unwrap());
        let verdict = judge(&file, &evidence);
        assert!(verdict.ok, "{verdict:?}");
        assert_eq!(verdict.entries, draw.entrants.len() as u64);
        let last = &verdict.checks.last().unwrap().found;
        let all = format!("{0} of the {0} winners", verdict.winners);
        assert!(last.contains(&all), "{last}");
    }
}

#[test]
fn an_entry_for_more_than_is_left_is_passed_over_and_the_next_is_served() {
    let (_, draw) = vectors().swap_remove(0);
    let verdict = judge(&draw.file(), &draw.evidence());
    assert!(verdict.ok);
    let rows: Vec<Value> = draw.file().lines().skip(1).map(read).collect();
    let lost = rows.iter().position(|row| row["won"] == false).unwrap();
    let last = rows.iter().rposition(|row| row["won"] == true).unwrap();
    assert!(lost < last, "{lost} {last}");
}

#[test]
fn a_draw_that_is_not_made_yet_is_not_judged() {
    for file in ["beacon-open.ndjson", "beacon-fixed.ndjson"] {
        let judged = verify(vector(file).as_bytes(), &Evidence::default());
        assert!(matches!(judged, Err(Unjudged::NotDrawn(_))), "{judged:?}");
    }
    for file in ["", "\n", "[]\n", "{}\n", "{\"draw\":\"millrace-draw-2\"}\n"] {
        let judged = verify(file.as_bytes(), &Evidence::default());
        assert!(judged.is_err(), "{file:?}");
    }
}

#[test]
fn a_user_id_that_never_entered_often_fits_a_row_so_that_a_fit_tells_little() {
    for count in [200, 1_000, 3_000] {
        let draw = Draw::of_crowd(count, 10);
        let ranking = Ranking::new(&draw.seed, None);
        let file = draw.file();
        let digits: BTreeSet<String> = file
            .lines()
            .skip(1)
            .map(|line| read(line)["rank"].as_str().unwrap().to_owned())
            .collect();
        let strangers = 4_000;
        let fits = (0..strangers)
            .filter(|number| {
                let user = UserId::new(&format!("stranger-{number}")).unwrap();
                let rank = ranking.rank(&user).to_string();
                (1..=64).any(|length| digits.contains(&rank[..length]))
            })
            .count();
        let share = fits as f64 / f64::from(strangers);
        assert!((0.2..0.6).contains(&share), "{count}: {share}");
    }
}

// --- Tampering ---------------------------------------------------------------------------------

fn read(line: &str) -> Value {
    serde_json::from_str(line).unwrap()
}

/// The file, with its lines altered.
fn altered(file: &str, alter: impl FnOnce(&mut Vec<Value>)) -> String {
    let mut lines: Vec<Value> = file.lines().map(read).collect();
    alter(&mut lines);
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Gives the rows places from 1 again.
fn count_again(lines: &mut [Value]) {
    for (place, line) in lines.iter_mut().enumerate().skip(1) {
        line["place"] = place.into();
    }
}

/// Gives the units to the first again.
fn serve_again(lines: &mut [Value]) {
    let mut left = lines[0]["units"].as_u64().unwrap();
    for line in &mut lines[1..] {
        let wants = line["quantity"].as_u64().unwrap();
        line["won"] = (wants <= left).into();
        left -= if wants <= left { wants } else { 0 };
    }
}

#[test]
fn what_is_altered_is_found_by_the_check_for_it() {
    let (_, draw) = vectors().swap_remove(0);
    let file = draw.file();
    let other = "ab".repeat(32);
    let other_seed = Seed([1; 32]);
    type Alter<'a> = Box<dyn FnOnce(&mut Vec<Value>) + 'a>;
    let cases: Vec<(&str, &[&str], Alter)> = vec![
        ("another seed", &["seed", "opened"], {
            let digits = other.clone();
            Box::new(move |lines| lines[0]["seed"] = digits.into())
        }),
        (
            "another seed and its commitment",
            &["earlier", "opened"],
            Box::new(|lines| {
                lines[0]["seed"] = other_seed.to_string().into();
                lines[0]["commitment"] = other_seed.commitment().to_string().into();
            }),
        ),
        (
            "another beacon",
            &["opened"],
            Box::new(|lines| lines[0]["beacon"] = "9f86d081884c7d66".into()),
        ),
        (
            "no beacon",
            &["beacon", "opened"],
            Box::new(|lines| lines[0]["beacon"] = Value::Null),
        ),
        (
            "no beacon, as if none had been named",
            &["earlier", "opened"],
            Box::new(|lines| {
                lines[0]["beacon"] = Value::Null;
                lines[0]["draw_beacon"] = Value::Null;
            }),
        ),
        (
            "two neighbours exchanged",
            &["order"],
            Box::new(|lines| {
                lines.swap(5, 6);
                count_again(lines);
                serve_again(lines);
            }),
        ),
        (
            "the buyers of two places exchanged",
            &["opened"],
            Box::new(|lines| {
                for name in ["entry", "quantity"] {
                    let first = lines[1][name].clone();
                    lines[1][name] = lines[50][name].clone();
                    lines[50][name] = first;
                }
                serve_again(lines);
            }),
        ),
        (
            "a friend moved to the first place, with a rank made up",
            &["opened"],
            Box::new(|lines| {
                let mut friend = lines.remove(50);
                friend["rank"] = "00".into();
                lines.insert(1, friend);
                count_again(lines);
                serve_again(lines);
            }),
        ),
        (
            "an entry dropped",
            &["count", "entries", "opened"],
            Box::new(|lines| {
                lines.remove(7);
                count_again(lines);
                serve_again(lines);
            }),
        ),
        (
            "an entry dropped, and number and hash written anew",
            &["earlier", "opened"],
            Box::new(|lines| {
                lines.remove(7);
                count_again(lines);
                serve_again(lines);
                announce_again(lines);
            }),
        ),
        (
            "an entry added",
            &["count", "entries"],
            Box::new(|lines| {
                let mut added = lines[1].clone();
                added["entry"] = other.clone().into();
                added["rank"] = "00".into();
                lines.insert(1, added);
                count_again(lines);
                serve_again(lines);
            }),
        ),
        (
            "an entry added, and number and hash written anew",
            &["earlier"],
            Box::new(|lines| {
                let mut added = lines[1].clone();
                added["entry"] = other.clone().into();
                added["rank"] = "00".into();
                lines.insert(1, added);
                count_again(lines);
                serve_again(lines);
                announce_again(lines);
            }),
        ),
        (
            "an entry in place of another",
            &["entries", "opened"],
            Box::new(|lines| lines[1]["entry"] = other.clone().into()),
        ),
        (
            "an entry twice",
            &["once", "entries", "opened"],
            Box::new(|lines| lines[1]["entry"] = lines[60]["entry"].clone()),
        ),
        (
            "another quantity",
            &["entries"],
            Box::new(|lines| {
                lines[60]["quantity"] = 4.into();
                serve_again(lines);
            }),
        ),
        (
            "a winner who did not win",
            &["winners"],
            Box::new(|lines| lines[1]["won"] = false.into()),
        ),
        (
            "a winner too many",
            &["winners"],
            Box::new(|lines| lines[60]["won"] = true.into()),
        ),
        (
            "units held back",
            &["earlier"],
            Box::new(|lines| {
                lines[0]["units"] = 20.into();
                serve_again(lines);
            }),
        ),
        (
            "another number of entries",
            &["count", "earlier"],
            Box::new(|lines| lines[0]["entries"] = 59.into()),
        ),
        (
            "another hash of the entries",
            &["entries", "earlier"],
            Box::new(|lines| lines[0]["entries_hash"] = other.clone().into()),
        ),
        (
            "a later end of the entries",
            &["earlier"],
            Box::new(|lines| lines[0]["draw_at"] = "2026-12-01T13:00:00.000Z".into()),
        ),
        (
            "entries fixed at another time",
            &["earlier"],
            Box::new(|lines| lines[0]["fixed_at"] = "2026-12-01T12:00:00.000Z".into()),
        ),
        (
            "the draw of another SKU",
            &["earlier"],
            Box::new(|lines| lines[0]["sku_id"] = "IPHONE-16".into()),
        ),
        (
            "two ranks that begin alike",
            &["order", "opened"],
            Box::new(|lines| {
                let longer = format!("{}0", lines[9]["rank"].as_str().unwrap());
                lines[10]["rank"] = longer.into();
            }),
        ),
        (
            "a place left out",
            &["order"],
            Box::new(|lines| lines[60]["place"] = 61.into()),
        ),
    ];
    for (what, checks, alter) in cases {
        let altered = altered(&file, alter);
        let found = wrong(&altered, &draw.evidence());
        assert_eq!(found, checks.iter().copied().collect(), "{what}");
        // What others have to bring is not found without it, and nothing else goes unseen.
        let alone = wrong(&altered, &Evidence::default());
        let alone_too = checks
            .iter()
            .copied()
            .filter(|check| !["earlier", "opened"].contains(check));
        assert_eq!(alone, alone_too.collect(), "{what}, from the file alone");
    }
}

/// Writes number and hash of the entries anew.
fn announce_again(lines: &mut [Value]) {
    let entry = |line: &Value| Entry {
        hash: serde_json::from_value(line["entry"].clone()).unwrap(),
        quantity: Quantity::new(line["quantity"].as_u64().unwrap() as u32).unwrap(),
    };
    let mut entries: Vec<_> = lines[1..].iter().map(entry).collect();
    lines[0]["entries"] = entries.len().into();
    lines[0]["entries_hash"] = entries_hash(&mut entries).to_string().into();
}

#[test]
fn every_altered_byte_and_every_cut_is_found() {
    for ((_, draw), step) in vectors().into_iter().zip([53, 1]) {
        let file = draw.file().into_bytes();
        let evidence = draw.evidence();
        let is_right = |file: &[u8]| verify(file, &evidence).is_ok_and(|verdict| verdict.ok);
        assert!(is_right(&file));
        // Behind the last line break there is nothing to alter.
        for at in (0..file.len() - 1).step_by(step) {
            for bit in 0..8 {
                let mut altered = file.clone();
                altered[at] ^= 1 << bit;
                assert!(!is_right(&altered), "byte {at}, bit {bit}");
            }
            assert!(!is_right(&file[..at]), "cut at {at}");
        }
    }
}

/// The ranks of a few entries are so short that another beacon may give them, too, and the file alone does not tell.
#[test]
fn another_beacon_is_found_by_a_copy_of_the_file_however_few_entered() {
    let mut draw = Draw::of_crowd(1, 1);
    draw.fixed.draw_beacon = Some("a beacon".to_owned());
    let with = |draw: &mut Draw, beacon: &str| {
        draw.beacon = Some(Beacon::new(beacon).unwrap());
        draw.file()
    };
    let file = with(&mut draw, "1");
    let rank = |file: &str| file.split("\"rank\":").nth(1).map(str::to_owned);
    let other = (2..)
        .map(|number| with(&mut draw, &number.to_string()))
        .find(|other| rank(other) == rank(&file))
        .expect("one of sixteen");
    let mut evidence = draw.evidence();
    assert_eq!(wrong(&other, &evidence), BTreeSet::new());
    evidence.earlier.push(header_of(file.as_bytes()).unwrap());
    assert_eq!(wrong(&file, &evidence), BTreeSet::new());
    assert_eq!(wrong(&other, &evidence), BTreeSet::from(["earlier"]));
}

#[test]
fn a_line_that_does_not_end_takes_no_memory_without_end() {
    let (_, draw) = vectors().swap_remove(1);
    let mut file = draw.file();
    file.push_str(&" ".repeat(100_000));
    assert_eq!(wrong(&file, &Evidence::default()), BTreeSet::from(["file"]));
    let judged = verify("{".repeat(100_000).as_bytes(), &Evidence::default());
    assert!(matches!(judged, Err(Unjudged::NotADraw(_))), "{judged:?}");
}

#[test]
fn a_text_of_the_file_cannot_write_the_verdict() {
    let (_, draw) = vectors().swap_remove(0);
    for (member, text) in [
        ("sku_id", "A\n\nEvery check holds."),
        ("draw_at", "\u{1b}[2J"),
        ("draw_beacon", "\r"),
    ] {
        let file = altered(&draw.file(), |lines| lines[0][member] = text.into());
        let judged = verify(file.as_bytes(), &Evidence::default());
        assert!(matches!(judged, Err(Unjudged::NotADraw(_))), "{judged:?}");
    }
    let file = altered(&draw.file(), |lines| lines[3]["a\nb"] = 1.into());
    let verdict = judge(&file, &Evidence::default());
    let found = &verdict.checks.last().unwrap().found;
    assert!(found.starts_with("line 4 "), "{found}");
    assert!(!found.contains('\n'), "{found}");
}

// --- The command -------------------------------------------------------------------------------

fn millrace(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(["draw", "verify"])
        .args(arguments)
        .current_dir(directory())
        .output()
        .unwrap()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

#[test]
fn the_command_says_in_words_what_holds_and_ends_with_0_1_or_2() {
    let right = millrace(&[
        "beacon-drawn.ndjson",
        "--earlier",
        "beacon-open.ndjson",
        "--earlier",
        "beacon-fixed.ndjson",
        "--openings",
        "beacon-openings.ndjson",
    ]);
    let words = String::from_utf8(right.stdout.clone()).unwrap();
    assert_eq!(code(&right), Some(0), "{words}");
    assert!(words.contains("60 entries for 30 units"), "{words}");
    assert!(words.contains("Every check holds."), "{words}");

    let directory = tempfile::tempdir().unwrap();
    let bad = directory.path().join("bad.ndjson");
    let file = vector("beacon-drawn.ndjson").replacen("\"won\":true", "\"won\":false", 1);
    fs::write(&bad, file).unwrap();
    let bad = millrace(&[bad.to_str().unwrap(), "--json"]);
    assert_eq!(code(&bad), Some(1));
    let verdict: Value = serde_json::from_slice(&bad.stdout).unwrap();
    assert_eq!(verdict["ok"], false);
    let failed = |check: &&Value| check["ok"] == false;
    let failed: Vec<_> = verdict["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(failed)
        .collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0]["name"], "winners");

    for arguments in [
        &["beacon-fixed.ndjson"][..],
        &["absent.ndjson"],
        &["make.py"],
        &["beacon-drawn.ndjson", "--user-id", "u-1"],
        &[],
    ] {
        let none = millrace(arguments);
        assert_eq!(code(&none), Some(2), "{arguments:?}");
        assert!(none.stdout.is_empty() && !none.stderr.is_empty());
    }
}

#[test]
fn a_buyer_finds_the_own_place_and_a_foreign_token_finds_none() {
    let (_, draw) = vectors().swap_remove(0);
    let token = EntryTokens::new(&draw.salt).of(&UserId::new("u-17").unwrap());
    let ask = |user: &str, token: EntryToken| {
        let token = token.to_string();
        let arguments = [
            "beacon-drawn.ndjson",
            "--user-id",
            user,
            "--entry-token",
            &token,
        ];
        let output = millrace(&arguments);
        (code(&output), String::from_utf8(output.stdout).unwrap())
    };
    let (own, words) = ask("u-17", token);
    assert_eq!(own, Some(0), "{words}");
    assert!(words.contains("place "), "{words}");
    let (foreign, words) = ask("u-18", token);
    assert_eq!(foreign, Some(1));
    assert!(words.contains("u-18 is not in the draw"), "{words}");
}

/// `docs/DRAW.md` shows how to do the check by hand. The commands do what they say.
#[test]
fn the_commands_of_the_document_find_what_the_verifier_finds() {
    let needed = ["openssl", "xxd", "sha256sum", "sed", "sort"];
    let has = |program: &&&str| {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {program}")])
            .output();
        found.is_ok_and(|output| output.status.success())
    };
    if let Some(absent) = needed.iter().find(|program| !has(program)) {
        println!("not run: there is no {absent} here");
        return;
    }
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/DRAW.md");
    let document = fs::read_to_string(document).unwrap();
    let (_, by_hand) = document.split_once("## By hand").unwrap();
    let script: String = by_hand
        .split("```sh\n")
        .skip(1)
        .map(|block| block.split("```").next().unwrap())
        .collect();
    let directory = tempfile::tempdir().unwrap();
    for (name, draw) in vectors() {
        fs::write(directory.path().join("draw.ndjson"), draw.file()).unwrap();
        let (user, _) = &draw.entrants[4];
        let token = EntryTokens::new(&draw.salt).of(user);
        let ranking = Ranking::new(&draw.seed, draw.beacon.as_ref());
        let run = Command::new("sh")
            .args(["-euc", &script])
            .env("user", user.as_str())
            .env("token", token.to_string())
            .current_dir(directory.path())
            .output()
            .unwrap();
        let said = String::from_utf8(run.stdout).unwrap();
        assert!(
            run.status.success(),
            "{said}\n{:?}",
            String::from_utf8(run.stderr)
        );
        let header = header_of(draw.file().as_bytes()).unwrap();
        let file = draw.file();
        let own = token.entry_hash(user).to_string();
        let row = file.lines().find(|line| line.contains(&own)).unwrap();
        for value in [
            &header.commitment.to_string(),
            &header.entries_hash.unwrap().to_string(),
            &header.entries.unwrap().to_string(),
            row,
            &ranking.rank(user).to_string(),
        ] {
            assert!(said.contains(value), "{name}: {value}\n{said}");
        }
    }
}
