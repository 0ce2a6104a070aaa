//! The binary form of COPY, see `store::copy`.

use bytes::Buf;

use super::tables::Order;

/// The rows of a COPY, with their ids.
pub fn copied_rows(bytes: &[u8]) -> Vec<(i64, Order)> {
    // Signature, flags, length of the extension.
    let mut rest = &bytes[19..];
    let mut rows = Vec::new();
    loop {
        let columns = rest.get_i16();
        if columns < 0 {
            return rows;
        }
        let mut field = || {
            let length = rest.get_i32();
            (length >= 0).then(|| {
                let (value, behind) = rest.split_at(length as usize);
                rest = behind;
                value.to_vec()
            })
        };
        let number = |value: Option<Vec<u8>>| {
            let value = value.unwrap_or_default();
            let sign = value.first().is_some_and(|first| first & 0x80 != 0);
            let start = if sign { -1_i64 } else { 0 };
            value
                .iter()
                .fold(start, |sum, byte| (sum << 8) | i64::from(*byte))
        };
        let word =
            |value: Option<Vec<u8>>| String::from_utf8(value.unwrap_or_default()).expect("UTF-8");
        let moment = |value| number(value) / 1_000 + 946_684_800_000;
        let id = number(field());
        let order = Order {
            user: word(field()),
            sku: number(field()) as i32,
            quantity: number(field()) as i32,
            adjustment: number(field()),
            amount: number(field()),
            currency: word(field()),
            // A parked order has none yet.
            status: (columns == 13)
                .then(&mut field)
                .flatten()
                .map(|value| number(Some(value)) as i16),
            created_ms: moment(field()),
            expires_ms: moment(field()),
            key: field(),
            payload: number(field()),
            attributes: field().map(|value| word(Some(value)).into()),
            reason: None,
            assigned_ms: None,
        };
        rows.push((id, order));
    }
}
