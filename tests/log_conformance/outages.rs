//! Servers that are full, lose what they had, are killed or away. They run by their names: RocketMQ knows that its disk is
//! full only once it has run for a minute, and all but the first start it anew.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace::queue::log::broker::reader::{ReadError, Reader};
use millrace::queue::log::broker::{BrokerError, Position, SendError, frame, while_away};

use crate::bed::{
    Bed, LONG, OWNER, PATIENCE, ROOM_MIB, all, bytes, connect, fresh, judge, place, says, send,
};
use crate::support::broker_admin::redis;
use crate::support::brokers::{Kind, not_run};
use crate::support::waiting::until;

on_each_broker! {
    rough: what_was_acknowledged_outlives_kill_9,
        a_server_that_comes_back_without_its_data_is_no_empty_log,
        what_somebody_else_deleted_is_lost_aloud,
        a_full_server_stores_nothing_and_goes_on_once_there_is_room;
}

fn what_was_acknowledged_outlives_kill_9(bed: &mut Bed) {
    let log = fresh("kill");
    let client = bed.ready(&log);
    let count = AtomicU64::new(0);
    let said = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut said = Vec::new();
            loop {
                let number = count.fetch_add(1, Ordering::SeqCst);
                let frame = bytes(number, 1 + (number as usize * 977) % 30_000);
                said.push((frame.clone(), client.send(place(1, number), &frame)));
                if said.last().is_some_and(|(_, outcome)| outcome.is_err()) {
                    return said;
                }
            }
        });
        until("frames are stored", PATIENCE, || {
            count.load(Ordering::SeqCst) > 100
        });
        bed.server.kill9();
        sending.join().expect("outcomes")
    });
    let (doubted, outcome) = said.last().expect("outcomes");
    assert!(
        matches!(outcome, Err(SendError::Unknown(_) | SendError::Away(_))),
        "{outcome:?}"
    );
    // While it is away, also for a client that begins now.
    let at = place(1, said.len() as u64 - 1);
    for client in [client.clone(), bed.client(&log, LONG)] {
        let sent = client.send(at, doubted);
        assert!(matches!(sent, Err(SendError::Away(_))), "{sent:?}");
        let (checked, read) = (client.check(), client.read(None, 1));
        assert!(matches!(checked, Err(BrokerError::Away(_))), "{checked:?}");
        assert!(matches!(read, Err(BrokerError::Away(_))), "{read:?}");
    }
    bed.server.start_again();
    connect(&*client);
    let found = all(&*client);
    for (frame, outcome) in &said {
        judge(&found, frame, outcome).unwrap_or_else(|lie| panic!("{lie}"));
    }
    send(&*client, at, doubted);
    assert_eq!(all(&*client).last().map(|last| &last.frame), Some(doubted));
}

fn a_server_that_comes_back_without_its_data_is_no_empty_log(bed: &mut Bed) {
    let log = fresh("empty");
    let known = bed.ready(&log);
    let at = place(1, 0);
    let at = send(&*known, at, &frame::encode(OWNER, at, &[]));
    bed.server.erase();
    bed.server.start_again();
    for client in [known, bed.client(&log, LONG)] {
        match while_away(PATIENCE, || client.check()) {
            Ok(_) | Err(BrokerError::Lost(_)) => {}
            Err(error) => panic!("{error}"),
        }
        // A RocketMQ that has just made its first file knows no largest offset for a moment.
        let read = while_away(PATIENCE, || Reader::after(&*client, OWNER, Some(at)).read());
        match read {
            Err(ReadError::Damaged(sentence)) => says(
                sentence,
                &["does not reach back to group 1-0", "it is empty"],
            ),
            Err(ReadError::Broker(BrokerError::Lost(_))) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn what_somebody_else_deleted_is_lost_aloud(bed: &mut Bed) {
    let log = fresh("trim");
    let client = bed.ready(&log);
    // RocketMQ has files of 4 MiB here, and the last one is made in advance.
    let (count, length) = if bed.kind == Kind::RocketMq {
        (20, 900_000)
    } else {
        (20, 50)
    };
    let frame = |number| frame::encode(OWNER, place(1, number), &bytes(number, length));
    let at: Vec<Position> = (0..count)
        .map(|number| send(&*client, place(1, number), &frame(number)))
        .collect();
    bed.trim(&log, at[3]);
    connect(&*client);
    until("what was there is lost", PATIENCE, || {
        matches!(client.read(Some(at[0]), 1), Err(BrokerError::Lost(_)))
    });
    // The place is gone, so it is no log that a start may go on from.
    let damaged = Reader::after(&*client, OWNER, Some(at[1])).read();
    says(
        damaged.expect_err("the place is gone"),
        &["does not reach back to group 1-1"],
    );
    let found = all(&*client);
    let first = count as usize - found.len();
    assert!(
        (3..count as usize).contains(&first),
        "{first} frames were deleted"
    );
    assert!(
        found
            .iter()
            .zip(first as u64..)
            .all(|(one, number)| one.frame == frame(number))
    );
    send(&*client, place(1, count), &frame(count));
}

fn a_full_server_stores_nothing_and_goes_on_once_there_is_room(bed: &mut Bed) {
    let kind = bed.kind;
    if kind != Kind::Redis && !bed.server.has_own_room() {
        return not_run("not run: a full disk of Kafka and RocketMQ: mounting one needs root");
    }
    let (client, at_server) = (bed.ready(&fresh("full")), bed.address());
    let ballast = bed.server.dir().join("data/ballast");
    let set_memory = |bytes| {
        assert_eq!(
            redis(at_server, &["CONFIG", "SET", "maxmemory", bytes]),
            "+OK"
        )
    };
    // RocketMQ takes nothing from nine tenths on, and does not look at its disk in its first minute.
    match kind {
        Kind::Redis => set_memory("16mb"),
        Kind::Kafka => fill(&ballast, 99),
        Kind::RocketMq => fill(&ballast, 92),
    }
    let length = if kind == Kind::RocketMq { 100 } else { 200_000 };
    let (mut stored, mut said) = (Vec::new(), Ok(0));
    until("it is full", PATIENCE, || {
        let number = stored.len() as u64;
        said = client.send(place(1, number), &bytes(number, length));
        let position = |offset| Position {
            place: place(1, number),
            offset,
        };
        stored.extend(said.clone().ok().map(position));
        said.is_err()
    });
    let number = stored.len() as u64;
    let again = client.send(place(1, number), &bytes(number, length));
    match (kind, &said, again) {
        (Kind::Redis, Err(SendError::Full(why)), Err(SendError::Full(_))) => says(why, &["OOM"]),
        (Kind::RocketMq, Err(SendError::Full(_)), Err(SendError::Full(_) | SendError::Away(_))) => {
        }
        // A disk that is full ends Kafka itself.
        (Kind::Kafka, Err(SendError::Unknown(_) | SendError::Away(_)), Err(_)) => {}
        other => panic!("{other:?}"),
    }
    match kind {
        Kind::Redis => client
            .forget(stored[stored.len() - 2])
            .expect("room is made"),
        Kind::Kafka | Kind::RocketMq => std::fs::remove_file(ballast).expect("room is made"),
    }
    if kind == Kind::Kafka {
        bed.server.kill9();
        bed.server.start_again();
    }
    connect(&*client);
    let found = all(&*client);
    judge(&found, &bytes(number, length), &said).unwrap_or_else(|lie| panic!("{lie}"));
    let kept = if kind == Kind::Redis { number - 2 } else { 0 };
    for number in kept..number {
        let is_there = found.iter().any(|one| one.frame == bytes(number, length));
        assert!(is_there, "{number} was acknowledged");
    }
    until("it takes frames again", PATIENCE, || {
        client.check().is_ok()
            && client
                .send(place(1, number + 1), &bytes(number + 1, 100))
                .is_ok()
    });
    if kind == Kind::Redis {
        set_memory("0");
    }
}

/// Fills a file system, to so many percent of all of it.
fn fill(ballast: &std::path::Path, percent: u64) {
    let used = rustix::fs::statvfs(ballast.parent().expect("a folder")).expect("a file system");
    let free = used.f_bavail * used.f_frsize;
    let all = u64::from(ROOM_MIB) << 20;
    let bytes = (all * percent / 100).saturating_sub(all - free);
    let file = File::create(ballast).expect("a file");
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)
        .expect("room for the ballast");
}
