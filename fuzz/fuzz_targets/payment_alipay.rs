//! Any bytes as the verified body of an Alipay notification, of the application `1` and the seller
//! `2`: no panic, and what is read keeps its limits.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use millrace::config::AlipayPayments;
use millrace::http::data_plane::payments::providers::alipay::Alipay;
use millrace::order::payment::Provider;

#[path = "../notice.rs"]
mod notice;

static ALIPAY: LazyLock<Alipay> = LazyLock::new(|| {
    let config = AlipayPayments {
        app_id: "1".into(),
        seller_id: "2".into(),
        public_key: notice::key("alipay"),
    };
    let alipay = Alipay::new(&config).expect("a key");
    alipay.expect("configured")
});

fuzz_target!(|body: &[u8]| {
    notice::check(Provider::Alipay, body, ALIPAY.parse(body));
});
