//! The texts of an order's request: user, key and body.

use std::fmt::{self, Write as _};
use std::io::Write as _;

use bytes::Bytes;
use smol_str::{SmolStr, format_smolstr};

use super::arrival::Arrival;
use super::orders_file::OrderLine;
use super::plan::LoadPlan;

/// Writes the requests of arrivals: made up from prefixes and numbers, or replayed from a file.
#[derive(Debug)]
pub(super) struct RequestTemplate {
    skus: Vec<String>,
    quantity: u32,
    waitlist: bool,
    user_prefix: String,
    key_prefix: String,
    lines: Option<Vec<OrderLine>>,
}

impl RequestTemplate {
    /// A template for made-up orders.
    pub(super) fn made_up(plan: &LoadPlan) -> Self {
        Self {
            skus: plan.skus.iter().map(|s| s.sku_id.clone()).collect(),
            quantity: plan.quantity,
            waitlist: plan.waitlist,
            user_prefix: plan.user_prefix.clone(),
            key_prefix: plan.key_prefix.clone(),
            lines: None,
        }
    }

    /// A template that replays a file, whose lines refer to `skus` by place.
    pub(super) fn replay(skus: Vec<String>, lines: Vec<OrderLine>) -> Self {
        Self {
            skus,
            quantity: 1,
            waitlist: false,
            user_prefix: String::new(),
            key_prefix: String::new(),
            lines: Some(lines),
        }
    }

    /// Every SKU that an arrival can name.
    pub(super) fn skus(&self) -> &[String] {
        &self.skus
    }

    /// The lines of the replayed file; none for made-up orders.
    pub(super) fn lines(&self) -> Option<&[OrderLine]> {
        self.lines.as_deref()
    }

    /// The SKU's id; empty if the replayed line names none.
    pub(super) fn sku(&self, sku: u16) -> &str {
        self.skus.get(usize::from(sku)).map_or("", String::as_str)
    }

    /// The `user_id`; empty if the replayed line names none.
    pub(super) fn user(&self, buyer: u32) -> SmolStr {
        match &self.lines {
            Some(lines) => lines
                .get(buyer as usize)
                .map_or_else(SmolStr::default, |line| line.user.clone()),
            None => format_smolstr!("{}{buyer:06}", self.user_prefix),
        }
    }

    /// The `Idempotency-Key`: one for each buyer and SKU, or that of the replayed line.
    pub(super) fn key(&self, buyer: u32, sku: u16) -> Option<SmolStr> {
        match &self.lines {
            Some(lines) => lines.get(buyer as usize).and_then(|line| line.key.clone()),
            None => Some(format_smolstr!(
                "{}{buyer:06}-{}",
                self.key_prefix,
                self.sku(sku)
            )),
        }
    }

    /// Writes the request of an arrival. `head`: the request line and the fields that all of them share.
    pub(super) fn write(&self, arrival: &Arrival, head: &[u8], out: &mut Vec<u8>) {
        let body = self.body(arrival);
        out.extend_from_slice(head);
        // Writing to memory cannot fail.
        if let Some(key) = self.key(arrival.buyer, arrival.sku) {
            let _ = write!(out, "idempotency-key: {key}\r\n");
        }
        let _ = write!(out, "content-length: {}\r\n\r\n", body.len());
        out.extend_from_slice(&body);
    }

    /// The body of `POST /v1/orders`.
    fn body(&self, arrival: &Arrival) -> Bytes {
        match &self.lines {
            Some(lines) => lines
                .get(arrival.buyer as usize)
                .map_or_else(Bytes::new, |line| line.body.clone()),
            None => {
                let mut body = String::with_capacity(128);
                // Prefixes may hold a quote or a backslash, which are visible ASCII too.
                let user = self.user(arrival.buyer);
                let _ = write!(
                    body,
                    r#"{{"user_id":{},"sku_id":{},"quantity":{}{}}}"#,
                    Quoted(&user),
                    Quoted(self.sku(arrival.sku)),
                    self.quantity,
                    if self.waitlist {
                        r#","waitlist":true"#
                    } else {
                        ""
                    }
                );
                Bytes::from(body)
            }
        }
    }
}

/// Visible ASCII as a JSON string.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        if self.0.bytes().any(|b| b == b'"' || b == b'\\') {
            for c in self.0.chars() {
                if c == '"' || c == '\\' {
                    f.write_char('\\')?;
                }
                f.write_char(c)?;
            }
        } else {
            f.write_str(self.0)?;
        }
        f.write_char('"')
    }
}
