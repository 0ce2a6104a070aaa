//! The seeds of every fuzz target, through the very sources of `fuzz/fuzz_targets`, without libFuzzer: a target that does not
//! build any more and an input that has failed once are found here.

extern crate self as libfuzzer_sys;

use std::fs;
use std::path::Path;

macro_rules! targets {
    ($($target:ident)*) => {
        #[allow(
            unused_attributes,
            clippy::duplicate_mod,
            reason = "each is the root of a crate too, without `main` and with a module of others"
        )]
        #[path = "../fuzz/fuzz_targets"]
        mod targets {
            $(pub mod $target;)*
        }

        const TARGETS: &[&str] = &[$(stringify!($target)),*];

        $(#[test]
        fn $target() {
            let mut seeds = 0;
            for seed in fs::read_dir(root().join("seeds").join(stringify!($target))).unwrap() {
                let seed = seed.unwrap().path();
                println!("{}", seed.display());
                targets::$target::run(&fs::read(seed).unwrap());
                seeds += 1;
            }
            assert!(seeds > 0);
        })*
    };
}

targets! {
    admin_bodies
    broker_frame
    broker_kafka
    broker_redis
    broker_rocketmq
    config
    copy_encode
    draw_file
    http_connection
    http_fields
    http_framing
    http_query
    journal
    node_frame
    order_batch
    order_json
    payment_alipay
    payment_signature
    payment_standard
    payment_stripe
    payment_wechatpay
    pgoutput
    receipt
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz"))
}

#[test]
fn no_target_is_left_out() {
    let files = fs::read_dir(root().join("fuzz_targets")).unwrap();
    let files = files.map(|file| file.unwrap().path().with_extension(""));
    let mut names: Vec<_> = files
        .map(|file| file.file_name().unwrap().display().to_string())
        .collect();
    names.sort();
    assert_eq!(names, TARGETS);
}

/// As libFuzzer's: an input has any type that can be made of bytes. At the end, so that the targets have it from their import.
macro_rules! fuzz_target {
    (|$input:ident: &[u8]| $body:block) => {
        pub fn run($input: &[u8]) {
            $body
        }
    };
    (|$input:ident: $of:ty| $body:block) => {
        pub fn run(input: &[u8]) {
            let input = arbitrary::Unstructured::new(input);
            if let Ok($input) = <$of as arbitrary::Arbitrary>::arbitrary_take_rest(input) {
                $body
            }
        }
    };
}
use fuzz_target;
