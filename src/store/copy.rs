//! The rows of a batch in the binary form of COPY.
//!
//! Format: PostgreSQL documentation, COPY, "Binary Format": an 11-byte signature, flags and
//! extension length; each row a 16-bit field count and, for each field, a 32-bit length and its
//! bytes in the type's binary form; a field count of −1 at the end. All integers big-endian.

use std::collections::HashMap;

use bytes::{BufMut, BytesMut};

use crate::order::{Order, OrderId, OrderStatus, UnixMillis};

/// The COPY statement, with its columns in the order in which rows are encoded.
pub const STATEMENT: &str = "COPY orders (order_id, user_id, sku, quantity, adjustment, amount, \
     currency, status, created_at, expires_at, key_hash, payload_hash, attributes) \
     FROM STDIN (FORMAT binary)";
const COLUMNS: i16 = 13;

/// The same for a batch with orders whose requests are traced.
pub const TRACED: &str = "COPY orders (order_id, user_id, sku, quantity, adjustment, amount, \
     currency, status, created_at, expires_at, key_hash, payload_hash, attributes, traceparent) \
     FROM STDIN (FORMAT binary)";

/// [`STATEMENT`] for parked orders, which have no status yet.
pub const PARK: &str = "COPY parked_orders (order_id, user_id, sku, quantity, adjustment, amount, \
     currency, created_at, expires_at, key_hash, payload_hash, attributes) \
     FROM STDIN (FORMAT binary)";

const SIGNATURE: &[u8] = b"PGCOPY\n\xff\r\n\0";
/// 2000-01-01T00:00:00Z, PostgreSQL's epoch, in Unix milliseconds.
const POSTGRES_EPOCH_MS: i64 = 946_684_800_000;
/// Bytes of a typical encoded order; reserving them avoids growing the buffer in steps.
const ROW_BYTES_TYPICAL: usize = 176;

/// Encodes `rows` with header and trailer, each row with its status.
pub fn encode<'a>(
    buffer: &mut BytesMut,
    rows: impl ExactSizeIterator<Item = (&'a Order, OrderStatus)>,
) {
    encode_all(
        buffer,
        rows.map(|(order, status)| (order, Some(status), None)),
    );
}

/// Encodes rows for [`TRACED`].
pub fn encode_traced<'a>(
    buffer: &mut BytesMut,
    rows: impl ExactSizeIterator<Item = (&'a Order, OrderStatus)>,
    traceparents: &HashMap<OrderId, String>,
) {
    let rows = rows.map(|(order, status)| {
        let traceparent = traceparents.get(&order.id).map(String::as_str);
        (order, Some(status), Some(traceparent))
    });
    encode_all(buffer, rows);
}

/// Encodes orders for [`PARK`].
pub fn encode_parked<'a>(buffer: &mut BytesMut, orders: impl ExactSizeIterator<Item = &'a Order>) {
    encode_all(buffer, orders.map(|order| (order, None, None)));
}

/// An order with the value of each column that a statement may not have.
type Row<'a> = (&'a Order, Option<OrderStatus>, Option<Option<&'a str>>);

fn encode_all<'a>(buffer: &mut BytesMut, rows: impl ExactSizeIterator<Item = Row<'a>>) {
    buffer.reserve(SIGNATURE.len() + 8 + rows.len() * ROW_BYTES_TYPICAL + 2);
    buffer.put_slice(SIGNATURE);
    buffer.put_i32(0);
    buffer.put_i32(0);
    for row in rows {
        encode_row(buffer, row);
    }
    buffer.put_i16(-1);
}

fn encode_row(buffer: &mut BytesMut, (order, status, traceparent): Row<'_>) {
    buffer.put_i16(COLUMNS - i16::from(status.is_none()) + i16::from(traceparent.is_some()));
    put_i64(buffer, order.id.as_i64());
    put_bytes(buffer, order.user_id.as_str().as_bytes());
    put_i32(buffer, order.sku.0);
    put_i32(buffer, order.quantity.get() as i32);
    put_i64(buffer, order.adjustment);
    put_i64(buffer, order.amount);
    put_bytes(buffer, order.currency.as_str().as_bytes());
    match status.map(OrderStatus::code) {
        Some(Some(code)) => {
            buffer.put_i32(2);
            buffer.put_i16(code);
        }
        // A status without a code is never stored: the column is NOT NULL, so the database refuses the row.
        Some(None) => put_null(buffer),
        None => {}
    }
    put_i64(buffer, postgres_micros(order.created_at));
    put_i64(buffer, postgres_micros(order.expires_at));
    match &order.key {
        Some(key) => put_bytes(buffer, &key.0),
        None => put_null(buffer),
    }
    put_i64(buffer, order.payload.0 as i64);
    match &order.attributes {
        Some(attributes) => put_bytes(buffer, attributes.as_bytes()),
        None => put_null(buffer),
    }
    match traceparent {
        Some(Some(traceparent)) => put_bytes(buffer, traceparent.as_bytes()),
        Some(None) => put_null(buffer),
        None => {}
    }
}

/// Microseconds since 2000-01-01, saturating.
fn postgres_micros(moment: UnixMillis) -> i64 {
    moment
        .0
        .saturating_sub(POSTGRES_EPOCH_MS)
        .saturating_mul(1_000)
}

fn put_i64(buffer: &mut BytesMut, value: i64) {
    buffer.put_i32(8);
    buffer.put_i64(value);
}

fn put_i32(buffer: &mut BytesMut, value: i32) {
    buffer.put_i32(4);
    buffer.put_i32(value);
}

fn put_bytes(buffer: &mut BytesMut, bytes: &[u8]) {
    // Every text was limited to at most 1 KiB before it came here.
    buffer.put_i32(bytes.len() as i32);
    buffer.put_slice(bytes);
}

fn put_null(buffer: &mut BytesMut) {
    buffer.put_i32(-1);
}
