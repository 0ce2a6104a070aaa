//! Any bytes as the verified body of a WeChat Pay notification and, after a NUL, as what its
//! resource decrypts to, for the merchant `1` and the application `2`: no panic, and what is read
//! keeps its limits. The body is also read with its resource as it is, encrypted.

#![no_main]

use std::collections::BTreeMap;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use millrace::config::{Secret, WechatpayPayments};
use millrace::http::data_plane::payments::providers::wechatpay::Wechatpay;
use millrace::order::payment::Provider;

#[path = "../notice.rs"]
mod notice;

static WECHATPAY: LazyLock<Wechatpay> = LazyLock::new(|| {
    let config = WechatpayPayments {
        mchid: "1".into(),
        appid: "2".into(),
        apiv3_key: Secret("k".repeat(32)),
        public_keys: BTreeMap::from([("A".into(), notice::key("wechatpay"))]),
    };
    let wechatpay = Wechatpay::new(&config).expect("keys");
    wechatpay.expect("configured")
});

fuzz_target!(|bytes: &[u8]| {
    let nul = bytes.iter().position(|byte| *byte == 0);
    let (body, opened) = bytes.split_at(nul.unwrap_or(bytes.len()));
    let opened = opened.get(1..).unwrap_or_default();
    let provider = Provider::Wechatpay;
    notice::check(provider, body, WECHATPAY.parse_opened(body, opened));
    notice::check(provider, body, WECHATPAY.parse(body));
});
