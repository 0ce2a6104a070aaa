//! A file of orders to replay: one JSON object a line.

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;
use serde_json::{Map, Value};
use smol_str::SmolStr;

use super::error::LoadError;

/// One line of the file, ready to be sent.
#[derive(Debug)]
pub(super) struct OrderLine {
    /// The body of the request: the line as it stands, without `idempotency_key`.
    pub body: Bytes,
    /// The value of the `Idempotency-Key` header.
    pub key: Option<SmolStr>,
    /// The line's `user_id`; empty if it has none, which is for the server to refuse.
    pub user: SmolStr,
    /// The place of the line's SKU among those of the file.
    pub sku: u16,
}

/// Reads the whole file: its SKUs, and its lines, which refer to them by place. Empty lines are skipped.
pub(super) fn read(path: &Path) -> Result<(Vec<String>, Vec<OrderLine>), LoadError> {
    let data = std::fs::read(path).map_err(|source| LoadError::ReadOrders {
        path: path.to_owned(),
        source,
    })?;
    let at = |line: usize, reason: String| LoadError::OrdersLine {
        path: path.to_owned(),
        line: line + 1,
        reason,
    };
    let data = Bytes::from(data);
    let mut skus = Vec::new();
    let mut places = HashMap::new();
    let mut lines = Vec::new();
    for (number, raw) in data.split(|&b| b == b'\n').enumerate() {
        let raw = raw.trim_ascii();
        if raw.is_empty() {
            continue;
        }
        let mut object: Map<String, Value> = serde_json::from_slice(raw)
            .map_err(|e| at(number, format!("not a JSON object: {e}")))?;
        let key = match object.remove("idempotency_key") {
            None => None,
            Some(Value::String(key))
                if !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic()) =>
            {
                Some(SmolStr::from(key))
            }
            Some(_) => {
                return Err(at(
                    number,
                    "idempotency_key is not a text of visible ASCII".to_owned(),
                ));
            }
        };
        let body = if key.is_some() {
            Bytes::from(Value::Object(object.clone()).to_string())
        } else {
            // Sent as it stands, down to the order of its members.
            data.slice_ref(raw)
        };
        let sku = text(object.get("sku_id"));
        let next = places.len();
        let place = *places.entry(sku.clone()).or_insert(next);
        if place == skus.len() {
            skus.push(sku.to_string());
        }
        lines.push(OrderLine {
            body,
            key,
            user: text(object.get("user_id")),
            sku: u16::try_from(place)
                .map_err(|_| at(number, "the file names more than 65536 SKUs".to_owned()))?,
        });
    }
    if lines.is_empty() {
        return Err(at(0, "the file holds no order".to_owned()));
    }
    Ok((skus, lines))
}

/// An id as the contract reads it: an integer means its decimal text.
fn text(value: Option<&Value>) -> SmolStr {
    match value {
        Some(Value::String(text)) => SmolStr::from(text.as_str()),
        Some(Value::Number(number)) => SmolStr::from(number.to_string()),
        _ => SmolStr::default(),
    }
}
