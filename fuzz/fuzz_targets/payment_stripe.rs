//! Any bytes as the verified body of a Stripe event: no panic, and what is read keeps its limits.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::http::data_plane::payments::providers::stripe::Stripe;
use millrace::order::payment::Provider;

#[path = "../notice.rs"]
mod notice;

fuzz_target!(|body: &[u8]| {
    notice::check(Provider::Stripe, body, Stripe::parse(body));
});
