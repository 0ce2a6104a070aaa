//! One request of the schedule, and what it says.

use std::fmt::Write as _;

use bytes::Bytes;
use smol_str::{SmolStr, format_smolstr};

use super::orders_file::OrderLine;
use super::plan::LoadPlan;

/// One request that is due at a moment. Small, because it is made and dropped for each request;
/// its texts are written out by the [`Script`] when they are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Click {
    /// Nanoseconds after the start at which the request is due.
    pub scheduled_ns: u64,
    /// The buyer's number, or the line of the orders file.
    pub buyer: u32,
    /// The SKU's place in [`Script::skus`].
    pub sku: u16,
    /// The second request of a double click.
    pub double: bool,
}

/// Turns clicks into the texts of their requests.
#[derive(Debug)]
pub(super) struct Script {
    skus: Vec<String>,
    quantity: u32,
    user_prefix: String,
    key_prefix: String,
    lines: Option<Vec<OrderLine>>,
}

impl Script {
    /// The script of made-up clicks.
    pub(super) fn made_up(plan: &LoadPlan) -> Self {
        Self {
            skus: plan.skus.iter().map(|s| s.sku_id.clone()).collect(),
            quantity: plan.quantity,
            user_prefix: plan.user_prefix.clone(),
            key_prefix: plan.key_prefix.clone(),
            lines: None,
        }
    }

    /// The script of a replayed file, whose lines refer to `skus`.
    pub(super) fn replay(skus: Vec<String>, lines: Vec<OrderLine>) -> Self {
        Self {
            skus,
            quantity: 1,
            user_prefix: String::new(),
            key_prefix: String::new(),
            lines: Some(lines),
        }
    }

    /// Every SKU that a click can name.
    pub(super) fn skus(&self) -> &[String] {
        &self.skus
    }

    /// The lines of the replayed file, if there is one.
    pub(super) fn lines(&self) -> Option<&[OrderLine]> {
        self.lines.as_deref()
    }

    /// The SKU's name; empty where a replayed line names none.
    pub(super) fn sku(&self, sku: u16) -> &str {
        self.skus.get(usize::from(sku)).map_or("", String::as_str)
    }

    /// The `user_id`; empty where a replayed line names none.
    pub(super) fn user(&self, buyer: u32) -> SmolStr {
        match &self.lines {
            Some(lines) => lines
                .get(buyer as usize)
                .map_or_else(SmolStr::default, |line| line.user.clone()),
            None => format_smolstr!("{}{buyer:06}", self.user_prefix),
        }
    }

    /// The `Idempotency-Key`: one for each buyer and SKU, or what the replayed line says.
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

    /// The body of `POST /v1/orders`.
    pub(super) fn body(&self, click: &Click) -> Bytes {
        match &self.lines {
            Some(lines) => lines
                .get(click.buyer as usize)
                .map_or_else(Bytes::new, |line| line.body.clone()),
            None => {
                let mut body = String::with_capacity(128);
                // Prefixes may hold a quote or a backslash, which are visible ASCII too.
                let user = self.user(click.buyer);
                let _ = write!(
                    body,
                    r#"{{"user_id":{},"sku_id":{},"quantity":{}}}"#,
                    Quoted(&user),
                    Quoted(self.sku(click.sku)),
                    self.quantity
                );
                Bytes::from(body)
            }
        }
    }
}

/// Visible ASCII as a JSON string.
struct Quoted<'a>(&'a str);

impl std::fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
