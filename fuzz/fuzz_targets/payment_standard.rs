//! Any bytes as the verified body of a Standard Webhooks message: no panic, and what is read keeps
//! its limits.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::http::data_plane::payments::providers::standard::Standard;
use millrace::order::payment::Provider;

#[path = "../notice.rs"]
mod notice;

fuzz_target!(|body: &[u8]| {
    notice::check(Provider::Standard, body, Standard::parse("msg_1", body));
});
