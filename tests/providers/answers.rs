//! What a platform is told, in its own dialect.

use millrace::http::data_plane::payments::providers::CallbackError;
use millrace::http::message::Response;
use millrace::order::payment::Provider;
use serde_json::Value;

use crate::fixture::PROVIDERS;

fn errors() -> Vec<(CallbackError, u16)> {
    vec![
        (CallbackError::BadSignature("se cret"), 401),
        (CallbackError::SignatureProbe, 401),
        (CallbackError::Stale { off_s: 301 }, 400),
        (CallbackError::NotForUs("app_id"), 400),
        (CallbackError::Malformed("se cret".into()), 400),
        (CallbackError::Unbookable("se cret".into()), 400),
        (CallbackError::NotStored, 503),
    ]
}

fn answer(provider: Provider, error: Option<&CallbackError>) -> Response {
    let mut response = Response::default();
    response.clear();
    let provider = PROVIDERS.get(provider).expect("configured");
    match error {
        None => provider.accept(&mut response),
        Some(error) => provider.refuse(&mut response, error),
    }
    response
}

#[test]
fn success_is_said_as_the_platform_wants_to_hear_it() {
    for provider in Provider::ALL {
        let response = answer(*provider, None);
        assert_eq!(response.status(), 200, "{provider}");
        let expected: &[u8] = match provider {
            Provider::Alipay => b"success",
            Provider::Standard | Provider::Stripe | Provider::Wechatpay => b"",
        };
        assert_eq!(response.body(), expected, "{provider}");
    }
}

#[test]
fn a_refusal_is_a_problem_for_those_who_read_one() {
    for provider in [Provider::Standard, Provider::Stripe] {
        for (error, status) in errors() {
            let response = answer(provider, Some(&error));
            assert_eq!(response.status(), status, "{error}");
            let fields = response.fields();
            assert!(fields.contains("application/problem+json"), "{fields}");
            assert_eq!(fields.contains("WWW-Authenticate"), status == 401);
            assert!(!fields.contains("Bearer"), "{fields}");
            assert_eq!(fields.contains("Retry-After: "), status == 503);
            let body: Value = serde_json::from_slice(response.body()).unwrap();
            assert_eq!(body["code"], error.problem().code);
        }
    }
}

#[test]
fn alipay_hears_anything_but_success() {
    for (error, status) in errors() {
        let response = answer(Provider::Alipay, Some(&error));
        let expected = if status == 503 { 503 } else { 400 };
        assert_eq!(response.status(), expected, "{error}");
        assert_eq!(response.body(), b"failure", "{error}");
        assert!(response.fields().contains("text/plain"), "{error}");
    }
}

#[test]
fn wechat_pay_hears_fail() {
    for (error, status) in errors() {
        let response = answer(Provider::Wechatpay, Some(&error));
        assert_eq!(response.status(), status, "{error}");
        let fields = response.fields();
        assert_eq!(fields.contains("WWW-Authenticate"), status == 401);
        let body: Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(body["code"], "FAIL", "{error}");
        assert!(
            body["message"]
                .as_str()
                .is_some_and(|text| !text.is_empty())
        );
    }
}

#[test]
fn a_stranger_hears_no_reason_and_the_sender_of_an_authentic_message_hears_it() {
    for provider in Provider::ALL {
        for (error, status) in errors() {
            let response = answer(*provider, Some(&error));
            let body = String::from_utf8(response.body().to_vec()).unwrap();
            let says_it = status == 400 && *provider != Provider::Alipay;
            assert_eq!(
                body.contains(&error.to_string()),
                says_it,
                "{provider}: {body}"
            );
        }
    }
}
