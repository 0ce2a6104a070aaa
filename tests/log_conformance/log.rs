//! The order log as the durable queue uses it, on every broker and on the journal.
//!
//! The journal takes part in no other file. Elsewhere are: its lock, by which a second process is refused
//! (`a_journal_is_inspected_verified_locked_and_refused_when_it_is_damaged` in `tests/program/journal.rs`); a process that was
//! paused and replaced (`a_process_that_was_paused_and_replaced_neither_acknowledges_nor_writes`, there); a full one
//! behind HTTP (`a_full_journal_refuses_before_anything_is_held_and_takes_orders_again_when_there_is_room`, there); every
//! crash and every damaged byte (the proofs `crash_states`, `every_byte`, `power` and `kill9`).

use millrace::order::UnixMillis;
use millrace::queue::log::broker::Position;
use millrace::queue::log::file::{JournalError, Opened};
use millrace::queue::log::record::{GroupBytes, Record};
use millrace::queue::log::{GroupAt, Log, NewGroup};

use crate::bed::{Bed, PATIENCE, fresh};
use crate::support::postgres::test_dir;
use crate::support::waiting::until;
use crate::writers::{LIMITS, take_over};

on_each_broker! {
    calm: groups_come_back_and_make_room_once_their_orders_are_settled;
}

fn groups_come_back_and_make_room_once_their_orders_are_settled(bed: &Bed) {
    let name = fresh("log");
    let (log, ..) = take_over(bed.ready(&name), 1, None);
    let (written, place) = fill(log);
    let (_, found, _) = take_over(bed.ready(&name), 2, place);
    assert!(!found.is_empty() && written.ends_with(&found));
}

#[test]
fn groups_come_back_and_make_room_in_a_journal() {
    let dir = test_dir();
    let open = || Opened::at(dir.path(), LIMITS.bytes_max, [1; 16], |_, _| {});
    let log = open()
        .expect("a journal")
        .start(LIMITS.bytes_max, false)
        .expect("a log");
    assert!(matches!(open(), Err(JournalError::InUse(_))));
    let (written, _) = fill(log);
    let mut found = Vec::new();
    let each = |record| found.push(number(&record));
    open()
        .expect("a journal")
        .records(each)
        .expect("its records");
    // What is settled is deleted.
    assert!(!found.is_empty() && written.ends_with(&found));
}

fn number(record: &Record) -> i64 {
    match record {
        Record::Lease(until) => until.0,
        Record::Order(order) => panic!("{order:?}"),
    }
}

/// Fills a log, has all of it settled, and goes on. Returns everything that was written, and the place up to which
/// PostgreSQL knows of it.
fn fill(mut log: Log) -> (Vec<i64>, Option<Position>) {
    let shared = log.shared.clone();
    let maintaining = std::thread::spawn({
        let shared = shared.clone();
        move || shared.maintain()
    });
    let written = fill_maintained(&mut log);
    shared.stop();
    maintaining.join().expect("it was stopped");
    written
}

fn fill_maintained(log: &mut Log) -> (Vec<i64>, Option<Position>) {
    let shared = log.shared.clone();
    let (mut written, mut groups) = (Vec::new(), Vec::<(GroupAt, Vec<i64>)>::new());
    while let Some((at, numbers)) =
        append(log, written.len() as i64, [1, 50, 3_000][groups.len() % 3])
    {
        written.extend(&numbers);
        groups.push((at, numbers));
        assert!(groups.len() < 10_000);
    }
    assert!(
        groups.len() > 100 && shared.is_full(),
        "{} groups",
        groups.len()
    );
    assert_eq!(shared.outstanding(), groups.len() as u64);
    for (at, numbers) in groups.iter().rev().step_by(7) {
        let found: Vec<i64> = shared
            .read(at)
            .expect("a group")
            .iter()
            .map(number)
            .collect();
        assert_eq!(found, *numbers);
    }
    let mut found = Vec::new();
    let each = &mut |span, place, records: Vec<Record>| {
        found.extend(records.iter().map(|record| (span, place, number(record))));
    };
    shared.read_all(each).expect("all groups");
    let numbers: Vec<i64> = found.iter().map(|(.., number)| *number).collect();
    assert_eq!(numbers, written);
    let placed = groups
        .iter()
        .flat_map(|(at, numbers)| numbers.iter().map(|number| (at.span, at.place, *number)));
    assert!(found.iter().copied().eq(placed));

    // Orders that are not settled keep their groups, and all that comes behind them.
    let span = groups[0].0.span;
    let settle = |keep: usize| {
        let orders: Vec<(u64, u64)> = groups
            .iter()
            .skip(keep)
            .map(|(at, _)| (at.span, 1))
            .collect();
        shared.settled(&orders);
        let until = shared.settled_up_to();
        shared.note(until);
        shared.confirm(until);
    };
    settle(1);
    assert!(
        shared.settled_up_to() < span,
        "its first order is not settled"
    );
    assert!(shared.is_full());
    shared.settled(&[(span, 1)]);
    assert_eq!(shared.outstanding(), 0);
    let settled = shared.settled_up_to();
    let place = shared.position_of(settled);
    shared.note(settled);
    shared.confirm(settled);
    until("there is room again", PATIENCE, || !shared.is_full());
    for _ in 0..3 {
        let mut appended = None;
        until("room is given back", PATIENCE, || {
            appended = append(log, written.len() as i64, 50);
            appended.is_some()
        });
        let (at, numbers) = appended.expect("a group");
        let found: Vec<i64> = shared
            .read(&at)
            .expect("a group")
            .iter()
            .map(number)
            .collect();
        assert_eq!(found, numbers);
        written.extend(numbers);
    }
    (written, place)
}

/// Appends a group of `count` records from `first` on, as if it had one order. `None`: there is no room.
fn append(log: &mut Log, first: i64, count: i64) -> Option<(GroupAt, Vec<i64>)> {
    let mut group = GroupBytes::default();
    group.begin(1, first as u64 + log.next_sequence);
    let numbers: Vec<i64> = (first..first + count).collect();
    for number in &numbers {
        group.push_lease(UnixMillis(*number));
    }
    let length = group.as_bytes().len();
    // A journal has no room either while its next segment is being made.
    let mut permit = None;
    until("room, or a full log", PATIENCE, || {
        permit = log.shared.reserve(length);
        permit.is_some() || log.shared.is_full()
    });
    let permit = permit?;
    log.writer.room(length).expect("a log that is not stopped");
    let group = NewGroup {
        orders: 1,
        ..group.group()
    };
    let at = log
        .writer
        .append(&group, permit.sectors())
        .expect("an append");
    permit.spend();
    Some((at, numbers))
}
