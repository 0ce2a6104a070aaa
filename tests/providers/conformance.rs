//! What holds for every provider.

use millrace::http::data_plane::payments::providers::CallbackError;
use millrace::order::payment::{Notice, Payment, Provider, REFERENCE_BYTES_MAX};
use millrace::order::{Currency, UnixMillis};
use serde_json::{Value, json};

use crate::fixture::{
    self, APP_ID, Callback, NOW, SELLER_ID, Told, alipay, on_a_small_stack, standard, stripe,
};
use crate::vectors::a_payment;

/// Those that send JSON.
const JSON: [Provider; 3] = [Provider::Standard, Provider::Stripe, Provider::Wechatpay];

/// Those whose scheme dates a message.
const DATED: [Provider; 3] = JSON;

fn payment(callback: &Callback) -> Payment {
    let notice = callback.read();
    let notice = notice.unwrap_or_else(|error| panic!("{}: {error}", callback.provider));
    notice.payment.expect("a payment")
}

fn unbookable(callback: &Callback) -> bool {
    matches!(callback.read(), Err(CallbackError::Unbookable(_)))
}

/// What a notice means, without the bytes that it came in.
fn meaning(notice: &Notice) -> (&str, &str, Option<&Payment>) {
    (&notice.event_id, &notice.kind, notice.payment.as_ref())
}

#[test]
fn what_is_signed_here_is_read_as_told() {
    for provider in Provider::ALL {
        let notice = Told::new().by(*provider).read();
        let notice = notice.unwrap_or_else(|error| panic!("{provider}: {error}"));
        assert_eq!(notice.event_id, "event-1", "{provider}");
        let expected = Payment {
            payment_id: "payment-1".into(),
            order_ref: "7340123456789012480".into(),
            amount: 199_900,
            currency: Currency::new("CNY").unwrap(),
            receipt: Some("mr1.receipt".into()),
            made_at: notice.payment.as_ref().and_then(|payment| payment.made_at),
        };
        assert_eq!(notice.payment, Some(expected), "{provider}");
    }
}

/// Refused, or, where a byte can be written in another way, read as the very same.
fn assert_no_other(label: &str, original: &Notice, altered: &Callback, may_be_same: bool) {
    if let Ok(notice) = altered.read() {
        assert!(may_be_same, "{label}: taken");
        assert_eq!(meaning(&notice), meaning(original), "{label}");
    }
}

#[test]
fn no_byte_of_a_body_can_be_altered() {
    for provider in Provider::ALL {
        let good = a_payment(*provider);
        let original = good.read().unwrap();
        // A form has several spellings: `%2F` and `%2f`, `+` and `%20`, `&&`; and its `sign_type`,
        // which is not signed, may be missing.
        let may_be_same = *provider == Provider::Alipay;
        for at in 0..good.body.len() {
            for mask in [0x01, 0x20, 0x80] {
                let altered = good.with(|callback| callback.body[at] ^= mask);
                let label = format!("{provider}: byte {at} ^ {mask:#x}");
                assert_no_other(&label, &original, &altered, may_be_same);
            }
            let without = good.with(|callback| {
                callback.body.remove(at);
            });
            let label = format!("{provider}: without byte {at}");
            assert_no_other(&label, &original, &without, may_be_same);
            let cut_off = good.with(|callback| callback.body.truncate(at));
            let label = format!("{provider}: cut off at {at}");
            assert_no_other(&label, &original, &cut_off, may_be_same);
        }
        for more in [" ", "\n", "{}", "&a=b", "\0"] {
            let longer = good.with(|callback| callback.body.extend_from_slice(more.as_bytes()));
            assert!(longer.read().is_err(), "{provider}: {more:?} more");
        }
    }
}

#[test]
fn no_byte_of_a_signed_header_can_be_altered() {
    for provider in DATED {
        let good = Told::new().by(provider);
        let original = good.read().unwrap();
        for (place, (name, value)) in good.headers.iter().enumerate() {
            // Serials are hexadecimal numbers, and capitals make no difference.
            let may_be_same = name == "Wechatpay-Serial";
            for at in 0..value.len() {
                for mask in [0x01, 0x02, 0x20, 0x80] {
                    let altered = good.with(|callback| callback.headers[place].1[at] ^= mask);
                    let label = format!("{provider}: {name} byte {at} ^ {mask:#x}");
                    assert_no_other(&label, &original, &altered, may_be_same);
                }
            }
            let empty = good.with(|callback| callback.headers[place].1.clear());
            assert!(empty.read().is_err(), "{provider}: {name} empty");
            let missing = good.with(|callback| {
                callback.headers.remove(place);
            });
            assert!(missing.read().is_err(), "{provider}: {name} missing");
            let twice = good.with(|callback| {
                let again = callback.headers[place].clone();
                callback.headers.push(again);
            });
            assert!(twice.read().is_err(), "{provider}: {name} twice");
        }
    }
}

#[test]
fn a_message_of_one_provider_is_none_of_another() {
    for provider in Provider::ALL {
        for other in Provider::ALL {
            let read = a_payment(*provider).read_as(*other);
            assert_eq!(read.is_ok(), provider == other, "{provider} as {other}");
        }
    }
}

#[test]
fn a_dated_message_is_taken_for_five_minutes_in_both_directions() {
    for provider in DATED {
        let good = Told::new().by(provider);
        for (off_ms, taken) in [
            (0, true),
            (300_000, true),
            (300_001, false),
            (-300_000, true),
            (-300_001, false),
            (i64::MAX, false),
            (i64::MIN, false),
        ] {
            let at = UnixMillis(fixture::NOW.0.saturating_add(off_ms));
            let read = good.with(|callback| callback.at = at).read();
            match read {
                Ok(_) => assert!(taken, "{provider}: {off_ms} ms"),
                Err(CallbackError::Stale { .. }) => assert!(!taken, "{provider}: {off_ms} ms"),
                Err(error) => panic!("{provider}: {off_ms} ms: {error}"),
            }
        }
    }
    let old = Told::new().by(Provider::Alipay);
    let later = UnixMillis(fixture::NOW.0 + 25 * 3_600_000);
    assert!(old.with(|callback| callback.at = later).read().is_ok());
}

#[test]
fn a_pass_back_that_cannot_be_a_receipt_costs_no_payment() {
    let long = "r".repeat(REFERENCE_BYTES_MAX);
    for provider in Provider::ALL {
        for (receipt, expected) in [
            (json!(long), Some(long.as_str())),
            (json!(format!("{long}r")), None),
            (json!("a\0b"), None),
            (json!(""), None),
            (Value::Null, None),
        ] {
            let callback = Told::with(|told| told.receipt = receipt.clone()).by(*provider);
            let read = payment(&callback).receipt;
            assert_eq!(read.as_deref(), expected, "{provider}: {receipt}");
        }
    }
    for provider in JSON {
        for odd in [json!({"a": [1]}), json!([["b"]]), json!(true), json!(1.5)] {
            let callback = Told::with(|told| told.receipt = odd.clone()).by(provider);
            assert_eq!(payment(&callback).receipt, None, "{provider}: {odd}");
        }
    }
}

#[test]
fn an_order_reference_that_cannot_be_ours_costs_no_payment() {
    // 127 characters of two bytes and one of one: the limit lies inside the last.
    let long = format!("a{}", "é".repeat(200));
    let cut = format!("a{}", "é".repeat(127));
    assert_eq!(cut.len(), REFERENCE_BYTES_MAX);
    for provider in Provider::ALL {
        for (reference, expected) in [
            (json!(long), cut.as_str()),
            (json!("7\u{0}4"), "7\u{fffd}4"),
            (json!("\0".repeat(300)), &"\u{fffd}".repeat(85)),
            (json!(7_340_123_456_789_012_480_i64), "7340123456789012480"),
            (json!(u64::MAX), "18446744073709551615"),
            (Value::Null, ""),
        ] {
            let callback = Told::with(|told| told.order_ref = reference.clone()).by(*provider);
            let read = payment(&callback).order_ref;
            assert_eq!(read, expected, "{provider}: {reference}");
            assert!(read.len() <= REFERENCE_BYTES_MAX);
        }
    }
}

#[test]
fn a_payment_without_a_name_or_an_amount_is_an_error() {
    let longest = "p".repeat(REFERENCE_BYTES_MAX);
    for provider in Provider::ALL {
        let told = |change: &dyn Fn(&mut Told)| Told::with(|told| change(told)).by(*provider);
        for bad in [
            json!(""),
            Value::Null,
            json!("p\0"),
            json!(format!("{longest}p")),
        ] {
            let by_name = told(&|told| told.payment_id = bad.clone());
            assert!(unbookable(&by_name), "{provider}: payment {bad}");
        }
        assert_eq!(
            payment(&told(&|told| told.payment_id = json!(longest))).payment_id,
            longest
        );
        for bad in [
            json!(-1),
            Value::Null,
            json!(""),
            json!("x"),
            json!(1.001),
            json!(1e30),
            json!(u64::MAX),
        ] {
            let by_amount = told(&|told| told.amount = bad.clone());
            assert!(unbookable(&by_amount), "{provider}: amount {bad}");
        }
        for bad in [json!("C"), json!("€€€"), json!("CNYX")] {
            let by_currency = told(&|told| told.currency = bad.clone());
            assert!(unbookable(&by_currency), "{provider}: currency {bad}");
        }
        for bad in [json!("e".repeat(REFERENCE_BYTES_MAX + 1)), json!("e\0")] {
            // A header has no NUL to begin with.
            let by_event = told(&|told| told.event_id = bad.clone());
            assert!(by_event.read().is_err(), "{provider}: event {bad}");
        }
    }
}

#[test]
fn capitals_of_a_currency_make_no_difference() {
    for provider in Provider::ALL {
        let callback = Told::with(|told| told.currency = json!("cny")).by(*provider);
        assert_eq!(payment(&callback).currency.as_str(), "CNY", "{provider}");
    }
}

#[test]
fn of_members_that_come_twice_the_first_counts_and_unknown_ones_are_skipped() {
    for provider in JSON {
        let member = match provider {
            Provider::Standard => r#","amount":1"#,
            Provider::Stripe => r#","amount_received":1"#,
            Provider::Wechatpay | Provider::Alipay => r#","transaction_id":"other""#,
        };
        let twice = Told::with(|told| told.more = member.into()).by(provider);
        let read = payment(&twice);
        assert_eq!(
            (read.amount, read.payment_id.as_str()),
            (199_900, "payment-1"),
            "{provider}"
        );
        let unknown = Told::with(|told| told.more = r#","x":1,"x":{"y":[]}"#.into()).by(provider);
        assert_eq!(payment(&unknown).amount, 199_900, "{provider}");
    }
    for (provider, body) in [
        (
            Provider::Standard,
            r#"{"type":"a","type":"payment.succeeded"}"#,
        ),
        (
            Provider::Stripe,
            r#"{"id":"event-1","id":"b","type":"a","type":"payment_intent.succeeded"}"#,
        ),
        (
            Provider::Wechatpay,
            r#"{"id":"event-1","event_type":"a","event_type":"TRANSACTION.SUCCESS"}"#,
        ),
    ] {
        let notice = by_hand(provider, body).read().expect(body);
        assert_eq!(meaning(&notice), ("event-1", "a", None), "{body}");
    }
}

#[test]
fn an_array_is_no_message_and_no_part_of_one() {
    let standard = r#"["7","p",1,"CNY","r"]"#;
    for (provider, body) in [
        (Provider::Standard, r#"["payment.succeeded",{"order_id":"7"}]"#.to_owned()),
        (
            Provider::Standard,
            format!(r#"{{"type":"payment.succeeded","data":{standard}}}"#),
        ),
        (
            Provider::Stripe,
            r#"["e","payment_intent.succeeded",{"object":{"id":"p"}}]"#.to_owned(),
        ),
        (
            Provider::Stripe,
            r#"{"id":"e","type":"payment_intent.succeeded","data":{"object":["p",1,"cny",null]}}"#
                .to_owned(),
        ),
        (
            Provider::Stripe,
            r#"{"id":"e","type":"payment_intent.succeeded","data":[{"id":"p","amount_received":1,"currency":"cny"}]}"#
                .to_owned(),
        ),
        (Provider::Wechatpay, r#"["e","REFUND.SUCCESS",{}]"#.to_owned()),
        (
            Provider::Wechatpay,
            r#"{"id":"e","event_type":"REFUND.SUCCESS","resource":["a","b","c","d"]}"#.to_owned(),
        ),
    ] {
        let read = by_hand(provider, &body).read();
        assert!(
            matches!(
                read,
                Err(CallbackError::Malformed(_) | CallbackError::Unbookable(_))
            ),
            "{provider}: {body}: {read:?}"
        );
    }
    // What the shop itself gave along costs its reference, never the payment.
    let body = r#"{"id":"e","type":"payment_intent.succeeded","data":{"object":{"id":"p","amount_received":1,"currency":"cny","metadata":["7","r"]}}}"#;
    let read = payment(&by_hand(Provider::Stripe, body));
    assert_eq!((read.order_ref.as_str(), read.receipt), ("", None));
}

#[test]
fn an_integer_beyond_64_bits_is_a_name_too() {
    let long = "123456789012345678901234567890";
    let body = format!(
        r#"{{"type":"payment.succeeded","data":{{"order_id":{long},"payment_id":{long},"amount":1,"currency":"CNY"}}}}"#
    );
    let read = payment(&by_hand(Provider::Standard, &body));
    assert_eq!(
        (read.order_ref.as_str(), read.payment_id.as_str()),
        (long, long)
    );
}

fn by_hand(provider: Provider, body: &str) -> Callback {
    match provider {
        Provider::Standard => fixture::standard("event-1", body),
        Provider::Stripe => fixture::stripe(body),
        Provider::Wechatpay => fixture::wechatpay_raw(body),
        Provider::Alipay => unreachable!("sends no JSON"),
    }
}

#[test]
fn what_is_signed_and_no_message_is_refused() {
    for provider in JSON {
        for body in [
            "",
            "null",
            "1",
            "\"text\"",
            "{",
            "{}",
            "[]",
            r#"{"id":"a"}"#,
            "\u{feff}{}",
            r#"{"type":"","event_type":""}"#,
            r#"{"type":"payment.succeeded"}"#,
            r#"{"id":"e","type":"payment_intent.succeeded","data":null}"#,
            r#"{"id":"e","event_type":"TRANSACTION.SUCCESS"}"#,
            r#"{"id":"e","event_type":"TRANSACTION.SUCCESS","resource":{"algorithm":"AEAD_AES_256_GCM"}}"#,
        ] {
            if let Ok(notice) = by_hand(provider, body).read() {
                assert_eq!(notice.payment, None, "{provider}: {body}");
                assert!(!notice.kind.is_empty(), "{provider}: {body}");
            }
        }
    }
}

#[test]
fn deep_and_long_messages_fit_a_coroutines_stack() {
    on_a_small_stack(|| {
        let deep = format!(r#","x":{}"#, "[".repeat(500_000) + &"]".repeat(500_000));
        for provider in JSON {
            let callback = Told::with(|told| told.more = deep.clone()).by(provider);
            assert_eq!(payment(&callback).amount, 199_900, "{provider}");
        }
        for open in ["[", "{\"data\":"] {
            for provider in JSON {
                let body = open.repeat(100_000);
                assert!(by_hand(provider, &body).read().is_err());
            }
        }
        let (name, value) = ("x".repeat(1_000), "y".repeat(100_000));
        let callback = fixture::alipay(&[
            ("app_id", fixture::APP_ID),
            ("notify_id", "1"),
            ("seller_id", fixture::SELLER_ID),
            (&name, &value),
        ]);
        assert_eq!(callback.read().unwrap().payment, None);
        let many = "a&".repeat(200_000) + "b=%&&=&=";
        let callback = callback.with(|callback| callback.body = many.into_bytes());
        assert!(callback.read().is_err());
    });
}

#[test]
fn only_so_many_signatures_are_tried() {
    let good = Told::new().by(Provider::Stripe);
    let padded = |count: usize| {
        good.with(|callback| {
            let value = &mut callback.headers[0].1;
            let own = value.split_off(value.len() - ",v1=".len() - 64);
            for _ in 0..count {
                value.extend_from_slice(b",v1=");
                value.extend_from_slice(&[b'0'; 64]);
            }
            value.extend_from_slice(&own);
        })
    };
    assert!(padded(15).read().is_ok());
    assert!(padded(16).read().is_err());
}

#[test]
fn alipays_parameters_cannot_be_cut_elsewhere() {
    let form = |subject: &str, amount: &str| {
        fixture::alipay(&[
            ("app_id", fixture::APP_ID),
            ("notify_id", "n"),
            ("out_trade_no", "1"),
            ("seller_id", fixture::SELLER_ID),
            ("subject", subject),
            ("total_amount", amount),
            ("trade_no", "t"),
            ("trade_status", "TRADE_SUCCESS"),
        ])
    };
    let replaced = |callback: &Callback, from: &str, to: &str| {
        callback.with(|callback| {
            let body = String::from_utf8(callback.body.clone()).unwrap();
            assert!(body.contains(from), "{body}");
            callback.body = body.replace(from, to).into_bytes();
        })
    };
    // Merged: a parameter that counts is hidden inside another's value.
    let good = form("shoes", "1.00");
    assert_eq!(payment(&good).amount, 100);
    let merged = replaced(&good, "&total_amount=1%2E00", "");
    assert!(merged.read().is_err());
    let hidden = replaced(
        &good,
        "subject=shoes&total_amount=",
        "subject=shoes%26total%5Famount%3D",
    );
    assert!(unbookable(&hidden));
    // Split: a buyer who could choose the subject chooses the amount, too.
    let planned = form("x&total_amount=9.00&total_amounu=", "1.00");
    assert!(planned.read().is_err());
    let split = replaced(
        &planned,
        &format!(
            "subject={}&total_amount=1%2E00",
            fixture::encoded("x&total_amount=9.00&total_amounu=")
        ),
        &format!(
            "subject=x&total_amount=9.00&total_amounu={}",
            fixture::encoded("&total_amount=1.00")
        ),
    );
    assert!(unbookable(&split));
    // An ampersand alone is an ampersand.
    assert_eq!(payment(&form("salt & pepper=2&x", "1.00")).amount, 100);
}

#[test]
fn alipays_parameters_come_once_and_in_rsa2() {
    let good = Told::new().by(Provider::Alipay);
    let body = String::from_utf8(good.body.clone()).unwrap();
    for altered in [
        format!("{body}&trade_no=payment-1"),
        format!("{body}&sign_type=RSA2"),
        body.replace("sign_type=RSA2", "sign_type=RSA"),
        body.replace("sign_type=RSA2", "sign_type=HMAC"),
        body.replace("&sign=", "&sigh="),
    ] {
        let read = good.with(|callback| callback.body = altered.clone().into_bytes());
        let read = read.read();
        assert!(
            matches!(read, Err(CallbackError::BadSignature(_))),
            "{altered}: {read:?}"
        );
    }
    let without = body.replace("&sign_type=RSA2", "");
    let read = good.with(|callback| callback.body = without.into_bytes());
    assert_eq!(payment(&read).amount, 199_900);
}

#[test]
fn the_time_that_a_provider_has_signed_is_read_and_an_odd_one_costs_no_payment() {
    let minute_ago = UnixMillis(NOW.0 - 60_000);
    let data = r#"{"order_id":"42","payment_id":"p","amount":1,"currency":"CNY"}"#;
    let standard_at = |timestamp: &str| {
        let body =
            format!(r#"{{"type":"payment.succeeded","timestamp":{timestamp},"data":{data}}}"#);
        payment(&standard("m", &body)).made_at
    };
    assert_eq!(standard_at(&format!("\"{minute_ago}\"")), Some(minute_ago));
    // The header's, by the second: each attempt is signed anew.
    let attempt = Some(UnixMillis(NOW.0 / 1_000 * 1_000));
    for odd in ["7", "\"yesterday\"", "null", "\"2999-01-01T00:00:00Z\""] {
        assert_eq!(standard_at(odd), attempt, "{odd}");
    }
    let stripe_at = |created: &str| {
        let intent = r#"{"id":"p","amount_received":1,"currency":"cny"}"#;
        let body = format!(
            r#"{{"id":"e","type":"payment_intent.succeeded","created":{created},"data":{{"object":{intent}}}}}"#
        );
        payment(&stripe(&body)).made_at
    };
    let seconds = minute_ago.0 / 1_000;
    assert_eq!(stripe_at(&seconds.to_string()), Some(minute_ago));
    for odd in ["\"x\"", "-1", "9223372036854775807"] {
        assert_eq!(stripe_at(odd), None, "{odd}");
    }
    let wechatpay_at = |time: &str| {
        let told = Told::with(|told| told.more = format!(r#","success_time":{time}"#));
        payment(&told.by(Provider::Wechatpay)).made_at
    };
    assert_eq!(wechatpay_at(&format!("\"{minute_ago}\"")), Some(minute_ago));
    assert_eq!(wechatpay_at("\"soon\""), None);
    let alipay_at = |time: &str| {
        let form = [
            ("app_id", APP_ID),
            ("gmt_payment", time),
            ("notify_id", "e"),
            ("out_trade_no", "42"),
            ("seller_id", SELLER_ID),
            ("total_amount", "0.01"),
            ("trade_no", "p"),
            ("trade_status", "TRADE_SUCCESS"),
        ];
        payment(&alipay(&form)).made_at
    };
    // UTC+8: 20:00 there is noon in UTC.
    let noon: jiff::Timestamp = "2026-11-11T12:00:00Z".parse().expect("a time");
    let noon = Some(UnixMillis(noon.as_millisecond()));
    assert_eq!(alipay_at("2026-11-11 20:00:00"), noon);
    assert_eq!(alipay_at("noon"), None);
}
