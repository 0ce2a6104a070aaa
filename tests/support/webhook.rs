//! The payment platform of the load generator, one message at a time.

use std::net::SocketAddr;

use millrace::loadgen::{PaymentMessage, WebhookSecret};
use serde_json::Value;

use super::http::{Answer, Connection};
use super::server::request;

/// The secret that the tests configure: base64 of 24 bytes.
pub const SECRET: &str = "whsec_dGVzdC1vbmx5LXNlY3JldC0yNC1ieXRl";

/// One payment as the platform reports it.
#[derive(Clone, Debug)]
pub struct Paid {
    /// The message's id: the same in each of its deliveries.
    pub event: String,
    /// The payment's id.
    pub payment: String,
    /// The order that it is for.
    pub order: String,
    /// In minor units.
    pub amount: i64,
    /// Its currency.
    pub currency: String,
    /// What came back in the pass-back field.
    pub receipt: Option<String>,
}

impl Paid {
    /// The payment that an order's answer asks for.
    pub fn of(order: &Value) -> Self {
        let id = order["order_id"].as_str().expect("an order").to_owned();
        Paid {
            event: format!("evt-{id}"),
            payment: format!("pay-{id}"),
            amount: order["amount"].as_i64().expect("an amount"),
            currency: order["currency"].as_str().expect("a currency").to_owned(),
            receipt: order["receipt"].as_str().map(str::to_owned),
            order: id,
        }
    }

    /// Another payment for the same order, reported by another message.
    pub fn again(&self, name: &str) -> Self {
        Paid {
            event: format!("{}-{name}", self.event),
            payment: format!("{}-{name}", self.payment),
            ..self.clone()
        }
    }

    /// The body.
    pub fn body(&self) -> String {
        let message = PaymentMessage {
            order_id: &self.order,
            payment_id: &self.payment,
            amount: self.amount,
            currency: &self.currency,
            receipt: self.receipt.as_deref(),
        };
        String::from_utf8(message.body().to_vec()).expect("JSON")
    }

    /// Delivers it to the data plane at `to`.
    pub async fn deliver(&self, to: SocketAddr) -> Answer {
        deliver(to, &self.event, self.body(), SECRET).await
    }
}

const TARGET: &str = "/v1/payments/standard/notify";

/// Delivers a body as the message `event`, signed with `secret`, dated now.
pub async fn deliver(to: SocketAddr, event: &str, body: String, secret: &str) -> Answer {
    let (timestamp, signature) = sign(event, &body, secret);
    let fields = fields(event, &timestamp, &signature);
    request(to, "POST", TARGET, &fields, body).await
}

/// The same on a connection of a thread.
pub fn send(
    connection: &mut Connection,
    event: &str,
    body: &str,
    secret: &str,
) -> std::io::Result<Answer> {
    let (timestamp, signature) = sign(event, body, secret);
    let fields = fields(event, &timestamp, &signature);
    connection.send("POST", TARGET, &fields, body)
}

fn fields<'a>(
    event: &'a str,
    timestamp: &'a str,
    signature: &'a str,
) -> [(&'static str, &'a str); 4] {
    [
        ("Content-Type", "application/json"),
        ("webhook-id", event),
        ("webhook-timestamp", timestamp),
        ("webhook-signature", signature),
    ]
}

/// The timestamp and signature of a message of this moment.
pub fn sign(event: &str, body: &str, secret: &str) -> (String, String) {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("a clock")
        .as_secs();
    let secret = WebhookSecret::new(secret);
    let signature = secret.sign(event, now as i64, body.as_bytes());
    (now.to_string(), signature.expect("a secret"))
}
