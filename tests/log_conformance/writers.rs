//! Two processes with one log: the marker of a later one fences the earlier one, also if that was paused.

use std::sync::Arc;

use millrace::order::UnixMillis;
use millrace::queue::log::broker::reader::ReadError;
use millrace::queue::log::broker::{BeforeStart, Broker, BrokerLimits, Known, Owner, Position};
use millrace::queue::log::record::{GroupBytes, Record};
use millrace::queue::log::{AppendError, GroupAt, Log};

use crate::bed::{Bed, OWNER, PATIENCE, all, fresh, place, says, send};
use crate::support::waiting::until;

on_each_broker! {
    calm: a_log_that_the_database_does_not_know_is_refused_and_left_as_it_is;
    rough: a_writer_that_was_replaced_acknowledges_nothing,
        a_writer_that_was_paused_and_replaced_acknowledges_nothing;
}

fn before(
    broker: Arc<dyn Broker>,
    owner: Owner,
    epoch: u64,
    place: Option<Position>,
) -> BeforeStart {
    BeforeStart {
        broker,
        owner,
        epoch,
        known: Known {
            in_use: place.is_some(),
            place,
        },
        patience: PATIENCE,
    }
}

/// Takes the log over. Also returns the records that it found, and the place from which the next process reads.
pub fn take_over(
    client: Arc<dyn Broker>,
    epoch: u64,
    place: Option<Position>,
) -> (Log, Vec<i64>, Position) {
    let mut found = Vec::new();
    let before = before(client, OWNER, epoch, place);
    let taken = before.take_over(|record| match record {
        Record::Lease(until) => found.push(until.0),
        Record::Order(order) => panic!("{order:?}"),
    });
    let taken = taken.unwrap_or_else(|error| panic!("{error}"));
    let marker = taken.marker;
    (taken.start(LIMITS), found, marker)
}

pub const LIMITS: BrokerLimits = BrokerLimits {
    bytes_max: 4 << 20,
    retain: std::time::Duration::ZERO,
    retain_for_slots: false,
};

/// Appends a group with this number in a record.
pub fn append(log: &mut Log, number: i64) -> Result<GroupAt, AppendError> {
    let mut group = GroupBytes::default();
    group.begin(1, 1);
    group.push_lease(UnixMillis(number));
    let permit = log.shared.reserve(group.as_bytes().len()).expect("room");
    log.writer.room(group.as_bytes().len()).expect("room");
    let appended = log.writer.append(&group.group(), permit.sectors());
    if appended.is_ok() {
        permit.spend();
    }
    appended
}

fn is_fenced(appended: Result<GroupAt, AppendError>) {
    match appended {
        Err(AppendError::Final(why)) => assert!(why.contains("another process has taken"), "{why}"),
        other => panic!("it was replaced: {other:?}"),
    }
}

fn a_writer_that_was_replaced_acknowledges_nothing(bed: &mut Bed) {
    replaced(bed, false);
}

fn a_writer_that_was_paused_and_replaced_acknowledges_nothing(bed: &mut Bed) {
    replaced(bed, true);
}

fn replaced(bed: &mut Bed, paused: bool) {
    let name = fresh("writers");
    let (mut first, found, marker) = take_over(bed.ready(&name), 1, None);
    assert!(found.is_empty());
    append(&mut first, 1).expect("it owns the log");
    let replace = || {
        let (mut second, found, marker) = take_over(bed.ready(&name), 2, Some(marker));
        assert_eq!(found, [1]);
        append(&mut second, 2).expect("it owns the log");
        (second, marker)
    };
    let (mut second, second_marker) = if paused {
        // What it sends arrives after the marker.
        let wire = bed.wire();
        wire.hold();
        std::thread::scope(|scope| {
            let append = scope.spawn(|| append(&mut first, -1));
            until("the group is on its way", PATIENCE, || {
                wire.holds_something()
            });
            let second = replace();
            assert!(!append.is_finished());
            wire.release();
            is_fenced(append.join().expect("an outcome"));
            second
        })
    } else {
        replace()
    };
    for _ in 0..2 {
        is_fenced(append(&mut first, -1));
    }
    append(&mut second, 3).expect("it owns the log");
    // The next process counts neither of the late groups.
    let (_, found, _) = take_over(bed.ready(&name), 3, Some(marker));
    assert_eq!(found, [1, 2, 3]);
    let (_, found, _) = take_over(bed.ready(&name), 4, Some(second_marker));
    assert_eq!(found, [2, 3]);
}

fn a_log_that_the_database_does_not_know_is_refused_and_left_as_it_is(bed: &Bed) {
    let refuses = |log: &str, owner: Owner, part: &str| {
        let there = all(&*bed.ready(log)).len();
        let taken = before(bed.ready(log), owner, 1, None).take_over(|_| {});
        match taken.err() {
            Some(ReadError::Foreign(sentence)) => says(sentence, &[part]),
            other => panic!("{part} was expected: {other:?}"),
        }
        assert_eq!(all(&*bed.ready(log)).len(), there, "{part}");
    };
    let name = fresh("foreign");
    let (mut log, ..) = take_over(bed.ready(&name), 1, None);
    append(&mut log, 1).expect("it owns the log");
    refuses(
        &name,
        OWNER,
        "holds orders that this database does not know",
    );
    let another = Owner {
        node: OWNER.node + 1,
        ..OWNER
    };
    refuses(&name, another, "belongs to another database or node");
    // Once it was left with nothing in it, a database that knows no place in it goes on behind everything.
    log.shared.erase().expect("it is left");
    let (mut log, found, marker) = take_over(bed.ready(&name), 1, None);
    assert_eq!((found, marker.place.epoch), (vec![], 2));
    append(&mut log, 2).expect("it owns the log");

    let name = fresh("not-ours");
    send(
        &*bed.ready(&name),
        place(1, 1),
        b"what somebody else has put there",
    );
    refuses(&name, OWNER, "entries that are not Millrace's");
}
