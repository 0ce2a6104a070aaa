//! What a RocketMQ server says, on any bytes: no panic, and what is taken lies within what was said. The first byte
//! chooses: a frame of the remoting protocol, stored messages, or the JSON of routes, clusters and states.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::queue::log::broker::rocketmq::fuzz;

fn messages(bytes: &[u8]) {
    let (found, damage) = fuzz::messages(bytes);
    let length: usize = found.iter().map(|(_, body)| body.len()).sum();
    assert!(length <= bytes.len());
    assert!(damage.is_some() || found.is_empty() == bytes.is_empty());
}

fn documents(bytes: &[u8]) {
    let _ = (fuzz::route(bytes), fuzz::cluster(bytes), fuzz::table(bytes));
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    match kind % 3 {
        0 => {
            if let Ok(answer) = fuzz::frame(rest) {
                assert!(rest.ends_with(&answer.body));
                messages(&answer.body);
                documents(&answer.body);
            }
        }
        1 => messages(rest),
        _ => documents(rest),
    }
});
