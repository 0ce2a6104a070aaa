//! Frames in peace: their order, repeats, reading from anywhere, forgetting.

use millrace::queue::log::broker::reader::Reader;
use millrace::queue::log::broker::{BrokerError, Position, SendError, frame};

use crate::bed::{Bed, OWNER, all, bytes, fresh, place, send};
use crate::support::brokers::Kind;

on_each_broker! {
    calm: frames_come_back_in_their_order_byte_for_byte,
        an_acknowledged_frame_can_be_read_at_once,
        a_frame_that_is_too_long_is_refused_and_not_stored,
        a_repeat_is_seen,
        a_log_is_read_from_anywhere_and_forgotten_up_to_a_frame;
}

fn frames_come_back_in_their_order_byte_for_byte(bed: &Bed) {
    let log = fresh("order");
    let client = bed.ready(&log);
    assert_eq!(client.read(None, 1 << 20), Ok(vec![]));
    // Places with two digits: they are ordered as numbers, not as texts.
    let mut sent = Vec::new();
    for (epoch, count) in [(1, 60), (2, 1), (10, 13)] {
        for number in 0..count {
            let length = [8, 300, 5_000, 16 << 10, 70_000][number as usize % 5];
            sent.push((place(epoch, number), bytes(epoch * 100 + number, length)));
        }
    }
    sent.push((place(11, 0), bytes(7, client.frame_max())));
    sent.push((place(11, 1), bytes(8, 20)));
    let mut positions: Vec<Position> = Vec::new();
    for (place, frame) in &sent {
        positions.push(send(&*client, *place, frame));
    }
    if !client.fences() {
        let offsets = positions.iter().map(|position| position.offset);
        assert!(offsets.eq(0..sent.len() as u64), "{positions:?}");
    }
    let other = bed.ready(&log);
    for bytes_max in [1, 40_000, 500_000, 64 << 20] {
        let (mut after, mut count) = (None, 0);
        loop {
            let page = other.read(after, bytes_max).expect("a page");
            let Some(last) = page.last() else { break };
            after = positions.get(count + page.len() - 1).copied();
            assert_eq!(after.map(|after| after.offset), Some(last.offset));
            let total: usize = page.iter().map(|one| one.frame.len()).sum();
            assert!(
                page.len() == 1 || total <= bytes_max,
                "{} frames of {total} bytes",
                page.len()
            );
            for one in page {
                let (place, frame) = &sent[count];
                assert!(one.frame == *frame, "{place} differs");
                assert_eq!(one.place, client.fences().then_some(*place));
                count += 1;
            }
        }
        assert_eq!(count, sent.len(), "pages of {bytes_max} bytes");
    }
}

fn an_acknowledged_frame_can_be_read_at_once(bed: &Bed) {
    let log = fresh("tail");
    let (writer, reader) = (bed.ready(&log), bed.ready(&log));
    let mut after = None;
    for number in 0..100 {
        let at = send(&*writer, place(1, number), &bytes(number, 8));
        let page = reader.read(after, 1 << 10).expect("a page");
        let offsets: Vec<_> = page.iter().map(|one| one.offset).collect();
        assert_eq!(offsets, [at.offset], "after {after:?}");
        after = Some(at);
    }
    assert_eq!(reader.read(after, 1 << 10), Ok(vec![]));
}

fn a_frame_that_is_too_long_is_refused_and_not_stored(bed: &Bed) {
    let client = bed.ready(&fresh("long"));
    let most = client.frame_max();
    let sent = client.send(place(1, 0), &bytes(0, most + 1));
    assert!(matches!(sent, Err(SendError::Refused(_))), "{sent:?}");
    send(&*client, place(1, 0), &bytes(1, most));
    assert_eq!(all(&*client).len(), 1);
}

fn a_repeat_is_seen(bed: &Bed) {
    let client = bed.ready(&fresh("repeat"));
    let framed = |epoch, number, payload: &[u8]| {
        let place = place(epoch, number);
        (place, frame::encode(OWNER, place, payload))
    };
    let (marker, one, two) = (
        framed(2, 0, b""),
        framed(2, 1, b"one"),
        framed(2, 2, b"two"),
    );
    for (place, frame) in [&marker, &one, &one, &two, &one] {
        send(&*client, *place, frame);
    }
    // An older place, and another frame at the same one.
    let late = [framed(1, 9, b"late"), framed(2, 1, b"another")];
    let late = late.map(|(place, frame)| client.send(place, &frame));
    if client.fences() {
        assert_eq!(all(&*client).len(), 3);
        let are_stale = late
            .iter()
            .all(|sent| matches!(sent, Err(SendError::Stale(_))));
        assert!(are_stale, "{late:?}");
    } else {
        assert_eq!(late, [Ok(5), Ok(6)], "the offset shows it");
    }
    let mut reader = Reader::after(&*client, OWNER, None);
    let counted = reader.read().expect("groups");
    let counted: Vec<_> = counted
        .iter()
        .map(|one| (one.position.place, &*one.payload))
        .collect();
    let expected: [(_, &[u8]); 3] = [(marker.0, b""), (one.0, b"one"), (two.0, b"two")];
    assert_eq!(counted, expected);
}

fn a_log_is_read_from_anywhere_and_forgotten_up_to_a_frame(bed: &Bed) {
    let client = bed.ready(&fresh("forget"));
    let frame = |number| frame::encode(OWNER, place(1, number), &bytes(number, 50));
    let at: Vec<Position> = (0..12)
        .map(|number| send(&*client, place(1, number), &frame(number)))
        .collect();
    for (number, after) in (1..12).zip(&at) {
        let page = client.read(Some(*after), 1).expect("a page");
        assert!(page.len() == 1 && page[0].frame == frame(number));
    }
    // Twice, and then less than before: nothing comes back, and nothing more goes.
    for before in [6, 6, 2] {
        client.forget(at[before]).expect("frames are forgotten");
        // RocketMQ deletes by age alone, so it keeps all.
        let first = if bed.kind == Kind::RocketMq { 0 } else { 6 };
        let found = all(&*client);
        assert_eq!(found.len(), 12 - first, "before {before}");
        assert_eq!(found[0].frame, frame(first as u64));
        for after in &at[..first.max(1) - 1] {
            let read = client.read(Some(*after), 1 << 20);
            assert!(
                matches!(read, Err(BrokerError::Lost(_))),
                "{after:?}: {read:?}"
            );
        }
        let page = client
            .read(Some(at[5]), 1)
            .expect("the frame that was named");
        assert_eq!(page[0].frame, frame(6));
    }
    assert_eq!(client.read(Some(at[11]), 1), Ok(vec![]));
    if !client.fences() {
        let beyond = Position {
            offset: 12,
            ..at[11]
        };
        let read = client.read(Some(beyond), 1);
        assert!(matches!(read, Err(BrokerError::Lost(_))), "{read:?}");
    }
    send(&*client, place(1, 12), &frame(12));
}
