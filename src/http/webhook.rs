//! Sends events as Standard Webhooks (version 1): a POST for each, signed with every secret, so that a receiver may
//! rotate them.
//!
//! | answer | means |
//! |---|---|
//! | 2xx | delivered |
//! | 410 | the receiver wants no more events |
//! | anything else, 3xx included, or none within 10 s | tried again |

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri, header};
use ring::hmac;

use super::webhook_secret::{self, BYTES_MIN};
use crate::http::outgoing::{self, OutgoingClient, causes};
use crate::order::UnixMillis;
use crate::pipeline::events::{Delivering, Delivery, Event, Sink};

/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Bytes of an answer's body that are read, so that the connection can be used again.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// A receiver of webhooks.
pub struct Webhook {
    client: OutgoingClient,
    url: Uri,
    keys: Vec<hmac::Key>,
    in_flight_max: usize,
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook")
            .field("to", &self.title())
            .finish_non_exhaustive()
    }
}

/// Progress of the delivery of some events.
#[derive(Default)]
struct Progress {
    has_delivered: AtomicBool,
    failures: AtomicUsize,
    is_gone: AtomicBool,
}

impl Webhook {
    /// A receiver at `url`, which has `secrets`. Connects when it is needed.
    ///
    /// # Errors
    /// What is wrong with the address, a secret or the system's certificates, for a sentence that names the setting.
    pub fn new(url: &str, secrets: &[String], in_flight_max: usize) -> Result<Self, String> {
        let url = outgoing::address(url).map_err(|fault| format!("url: {fault}"))?;
        let key = |secret: &String| {
            let bytes = webhook_secret::bytes(secret).filter(|bytes| bytes.len() >= BYTES_MIN);
            let bytes = bytes.ok_or_else(|| {
                format!(
                    "secret: is not base64 of at least {BYTES_MIN} bytes, with or without whsec_ before it"
                )
            })?;
            Ok(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
        };
        let keys = secrets
            .iter()
            .map(key)
            .collect::<Result<Vec<_>, String>>()?;
        Ok(Webhook {
            client: outgoing::client(in_flight_max)?,
            url,
            keys,
            in_flight_max,
        })
    }

    async fn post(&self, event: &Event) -> Delivery {
        let seconds = (UnixMillis::now().0 / 1_000).to_string();
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.url.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header(
                header::USER_AGENT,
                concat!("millrace/", env!("CARGO_PKG_VERSION")),
            )
            .header("webhook-id", &event.id)
            .header("webhook-timestamp", &seconds)
            .header(
                "webhook-signature",
                self.sign(&event.id, &seconds, &event.body),
            );
        let request = match &event.traceparent {
            Some(traceparent) => request.header("traceparent", traceparent),
            None => request,
        };
        let request = request.body(Full::new(Bytes::copy_from_slice(event.body.as_bytes())));
        let request = match request {
            Ok(request) => request,
            Err(error) => return Delivery::Refused(error.to_string()),
        };
        let asking = async {
            let answer = self
                .client
                .request(request)
                .await
                .map_err(|error| causes(&error))?;
            let status = answer.status();
            // Read to its end or dropped with its connection; what it says changes nothing.
            let _ = Limited::new(answer.into_body(), BODY_BYTES_MAX)
                .collect()
                .await;
            Ok::<_, String>(status)
        };
        match tokio::time::timeout(ANSWER, asking).await {
            Ok(Ok(status)) if status.is_success() => Delivery::Delivered,
            Ok(Ok(StatusCode::GONE)) => Delivery::Gone("it answered 410 Gone".to_owned()),
            Ok(Ok(status)) if status.is_redirection() => {
                Delivery::Failed(format!("it answered {status}; redirects are not followed"))
            }
            Ok(Ok(status)) => Delivery::Failed(format!("it answered {status}")),
            Ok(Err(error)) => Delivery::Failed(error),
            Err(_) => Delivery::Failed(format!("no answer within {} s", ANSWER.as_secs())),
        }
    }

    /// The signatures of a message, one for each secret.
    fn sign(&self, id: &str, seconds: &str, body: &str) -> String {
        let signatures = self.keys.iter().map(|key| {
            let mut context = hmac::Context::with_key(key);
            for part in [id, ".", seconds, ".", body] {
                context.update(part.as_bytes());
            }
            format!("v1,{}", STANDARD.encode(context.sign()))
        });
        signatures.collect::<Vec<_>>().join(" ")
    }

    /// Delivers the events of one subject, up to the first that fails.
    async fn post_in_order(
        &self,
        events: &[Event],
        places: Vec<usize>,
        progress: &Progress,
    ) -> Vec<(usize, Delivery)> {
        let mut outcomes = Vec::with_capacity(places.len());
        let mut goes_on = true;
        for at in places {
            // Of a receiver that is away a few events are tried, not all.
            let is_away = !progress.has_delivered.load(Ordering::Relaxed)
                && progress.failures.load(Ordering::Relaxed) >= self.in_flight_max;
            if !goes_on || is_away || progress.is_gone.load(Ordering::Relaxed) {
                outcomes.push((at, Delivery::Untried));
                continue;
            }
            let outcome = self.post(&events[at]).await;
            goes_on = outcome == Delivery::Delivered;
            match &outcome {
                Delivery::Delivered => progress.has_delivered.store(true, Ordering::Relaxed),
                Delivery::Gone(_) => progress.is_gone.store(true, Ordering::Relaxed),
                Delivery::Failed(_) | Delivery::Refused(_) | Delivery::Untried => {
                    progress.failures.fetch_add(1, Ordering::Relaxed);
                }
            }
            outcomes.push((at, outcome));
        }
        outcomes
    }
}

impl Sink for Webhook {
    fn title(&self) -> String {
        // Without the query, which some receivers use for a token.
        format!(
            "webhook {}://{}{}",
            self.url.scheme_str().unwrap_or_default(),
            self.url.authority().map_or("", |host| host.as_str()),
            self.url.path()
        )
    }

    fn deliver<'a>(&'a self, events: &'a [Event]) -> Delivering<'a> {
        Box::pin(async move {
            let mut subjects: Vec<Vec<usize>> = Vec::new();
            let mut known = std::collections::HashMap::new();
            for (at, event) in events.iter().enumerate() {
                let place = *known.entry(&event.subject).or_insert_with(|| {
                    subjects.push(Vec::new());
                    subjects.len() - 1
                });
                subjects[place].push(at);
            }
            let progress = Progress::default();
            let mut outcomes = vec![Delivery::Untried; events.len()];
            let mut delivering = futures_util::stream::iter(subjects)
                .map(|places| self.post_in_order(events, places, &progress))
                .buffer_unordered(self.in_flight_max);
            while let Some(delivered) = delivering.next().await {
                for (at, outcome) in delivered {
                    outcomes[at] = outcome;
                }
            }
            outcomes
        })
    }
}

/// Whether messages to this address leave the machine in plain text.
pub fn is_readable_on_the_way(url: &str) -> bool {
    url.parse::<Uri>().is_ok_and(|url| {
        let host = url.host().unwrap_or_default();
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        let is_here = address.map_or(host == "localhost", |address| address.is_loopback());
        url.scheme_str() == Some("http") && !is_here
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's own libraries.
    #[test]
    fn a_signature_is_that_of_the_specification() {
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned();
        let webhook = Webhook::new("http://127.0.0.1:1/", &[secret], 1).unwrap();
        let signature = webhook.sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            "1614265330",
            r#"{"test": 2432232314}"#,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn plain_text_is_for_this_machine() {
        for (url, expected) in [
            ("http://erp.example/x", true),
            ("http://10.0.0.7:8090/", true),
            ("http://localhost.example/", true),
            ("https://erp.example/x", false),
            ("http://127.0.0.1:8090/", false),
            ("http://[::1]:8090/", false),
            ("http://localhost/", false),
        ] {
            assert_eq!(is_readable_on_the_way(url), expected, "{url}");
        }
    }

    #[test]
    fn an_address_or_a_secret_that_cannot_be_used_is_refused() {
        let good = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned();
        for (url, secret, why) in [
            ("ftp://host/", &good, "https://"),
            ("/path", &good, "https://"),
            ("https://me:pass@host/", &good, "user"),
            ("https://host/", &"c2hvcnQ=".to_owned(), "24 bytes"),
            ("https://host/", &"no base64!".to_owned(), "24 bytes"),
        ] {
            let error = Webhook::new(url, std::slice::from_ref(secret), 1).unwrap_err();
            assert!(error.contains(why), "{url}: {error}");
        }
    }
}
