//! Connections that break at any byte of a request or its answer, or go silent there: a client never says that a frame
//! is stored if it is not, and never that it is certainly not stored if it is.

use millrace::queue::log::broker::{Broker, BrokerError, SendError};

use crate::bed::{Bed, LONG, PATIENCE, SHORT, all, bytes, connect, fresh, judge, place, send};
use crate::support::waiting::until;
use crate::support::wire::{Fault, Way};

on_each_broker! {
    rough: a_send_that_is_cut_anywhere_says_nothing_that_is_not_so,
        a_server_that_goes_silent_leaves_a_send_unknown,
        a_check_that_is_cut_anywhere_is_away,
        a_read_that_is_cut_gives_true_frames_or_an_error;
}

/// Places to cut in each direction.
fn cuts() -> u64 {
    let times = std::env::var("MILLRACE_CUTS").ok();
    16 * times.map_or(1, |times| times.parse().expect("MILLRACE_CUTS is a number"))
}

/// Places spread over so many bytes: each is the number of bytes that pass.
fn spread(bytes: u64, count: u64) -> impl Iterator<Item = u64> {
    let step = (bytes / count).max(1);
    (0..=bytes).step_by(step as usize)
}

fn a_send_that_is_cut_anywhere_says_nothing_that_is_not_so(bed: &mut Bed) {
    let log = fresh("cut");
    let client = bed.ready(&log);
    let (mut number, wire) = (0, bed.wire());
    let mut next = || {
        number += 1;
        (place(1, number), bytes(number, 300))
    };
    let (at, frame) = next();
    let [up, down] = wire.measure(|| {
        send(&*client, at, &frame);
    });
    let ups = spread(up, cuts()).map(|bytes| (Way::Up, bytes));
    let mut said: Vec<(Vec<u8>, Result<u64, SendError>)> = Vec::new();
    for (way, bytes) in ups.chain(spread(down, cuts()).map(|bytes| (Way::Down, bytes))) {
        connect(&*client);
        let (at, frame) = next();
        let offset = send(&*client, at, &frame).offset;
        said.push((frame, Ok(offset)));
        let (at, frame) = next();
        wire.arm(way, bytes, Fault::Cut);
        let outcome = client.send(at, &frame);
        let struck = wire.heal();
        assert!(struck || outcome.is_ok(), "{way:?} {bytes}: {outcome:?}");
        // Part of the request was passed on, so it may be there as far as this side knows.
        let is_fair = matches!(outcome, Ok(_) | Err(SendError::Unknown(_)));
        assert!(is_fair, "{way:?} {bytes}: {outcome:?}");
        said.push((frame, outcome));
        // It does not connect by itself: the server may be another one now.
        let (at, frame) = next();
        let outcome = client.send(at, &frame);
        assert!(
            matches!(outcome, Err(SendError::Away(_))),
            "{way:?} {bytes}: {outcome:?}"
        );
        said.push((frame, outcome));
    }
    let (found, mut unknown, mut is_stored) = (all(&*bed.ready(&log)), [0; 2], 0);
    for (frame, outcome) in &said {
        let is_there = judge(&found, frame, outcome).unwrap_or_else(|lie| panic!("{lie}"));
        match outcome {
            Err(SendError::Unknown(_)) => unknown[usize::from(is_there)] += 1,
            Ok(_) => is_stored += 1,
            Err(_) => {}
        }
    }
    let cut = said.len() / 3;
    assert!(
        unknown[0] > 0 && unknown[1] > 0 && is_stored >= cut,
        "{unknown:?} {is_stored}"
    );
}

fn a_server_that_goes_silent_leaves_a_send_unknown(bed: &mut Bed) {
    let log = fresh("silent");
    let (client, wire) = (bed.client(&log, SHORT), bed.wire());
    let mut said = Vec::new();
    for (number, (way, bytes_passed)) in
        (1..).zip([(Way::Up, 0), (Way::Up, 40), (Way::Down, 0), (Way::Down, 3)])
    {
        // A busy machine may be slower than this client's time limit.
        until("a connection", PATIENCE, || {
            client.check().is_ok() && client.send(place(number, 0), &bytes(number, 20)).is_ok()
        });
        wire.arm(way, bytes_passed, Fault::Silence);
        let frame = bytes(1_000 + number, 300);
        let outcome = client.send(place(number, 1_000_000), &frame);
        assert!(
            matches!(outcome, Err(SendError::Unknown(_))),
            "{way:?}: {outcome:?}"
        );
        // Nothing was passed on on this connection since, so whoever asks is told that nobody answers.
        let checked = client.check();
        assert!(matches!(checked, Err(BrokerError::Away(_))), "{checked:?}");
        wire.heal();
        said.push((way, frame, outcome));
    }
    // Its time-out may be long for the server, which may store what has reached it only now.
    let observer = bed.ready(&log);
    let is_there = |frame: &[u8]| all(&*observer).iter().any(|one| one.frame == frame);
    for (way, frame, outcome) in &said {
        if *way == Way::Down {
            until("what has reached the server is stored", PATIENCE, || {
                is_there(frame)
            });
        }
        judge(&all(&*observer), frame, outcome).unwrap_or_else(|lie| panic!("{lie}"));
    }
}

fn a_check_that_is_cut_anywhere_is_away(bed: &mut Bed) {
    let log = fresh("check");
    let wire = bed.wire();
    // The first one makes the topic.
    bed.ready(&log);
    let [up, down] = wire.measure(|| drop(bed.ready(&log)));
    let ups = spread(up, cuts()).map(|bytes| (Way::Up, bytes));
    let downs = spread(down, cuts()).map(|bytes| (Way::Down, bytes));
    let mut away = 0;
    for (number, (way, cut)) in (1..).zip(ups.chain(downs)) {
        let client = bed.client(&log, LONG);
        wire.arm(way, cut, Fault::Cut);
        let checked = client.check();
        if wire.heal() && checked.is_err() {
            let sent = client.send(place(1, number), &bytes(number, 20));
            assert!(
                matches!(checked, Err(BrokerError::Away(_))),
                "{way:?} {cut}: {checked:?}"
            );
            // Redis: perhaps its connection for sending was sound until then.
            let is_fair = matches!(sent, Err(SendError::Away(_) | SendError::Unknown(_)));
            assert!(is_fair, "{way:?} {cut}: {sent:?}");
            away += 1;
        }
    }
    assert!(away >= cuts(), "{away}");
    assert_eq!(all(&*bed.ready(&log)), []);
}

fn a_read_that_is_cut_gives_true_frames_or_an_error(bed: &mut Bed) {
    let log = fresh("read");
    let writer = bed.ready(&log);
    for number in 0..40 {
        send(&*writer, place(1, number), &bytes(number, 3_000));
    }
    let (stored, wire) = (all(&*writer), bed.wire());
    let read = |client: &dyn Broker| client.read(None, 1 << 20);
    let [_, down] = wire.measure(|| drop(read(&*bed.ready(&log))));
    let (mut errors, mut all_of_it) = (0, 0);
    for cut in spread(down, cuts()) {
        let client = bed.ready(&log);
        wire.arm(Way::Down, cut, Fault::Cut);
        match read(&*client) {
            // Never an end before the end.
            Ok(page) => {
                assert!(
                    !page.is_empty() && page[..] == stored[..page.len()],
                    "cut after {cut}"
                );
                all_of_it += usize::from(page.len() == stored.len());
            }
            Err(BrokerError::Away(_)) => errors += 1,
            Err(other) => panic!("cut after {cut}: {other:?}"),
        }
        wire.heal();
    }
    assert!(errors > 0 && all_of_it > 0, "{errors} {all_of_it}");
}
