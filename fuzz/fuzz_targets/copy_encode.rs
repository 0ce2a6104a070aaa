//! Any orders through the COPY encoder and back through a decoder that was written from
//! PostgreSQL's documentation of the format alone (COPY, "Binary Format").

#![no_main]

use arbitrary::Arbitrary;
use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use millrace::order::{
    Currency, KeyHash, Order, OrderId, OrderStatus, PayloadHash, Quantity, SkuId, SkuNumber,
    UnixMillis, UserId,
};
use millrace::store::copy;

#[derive(Arbitrary, Debug)]
struct Raw {
    id: u64,
    user_id: Vec<u8>,
    sku: i32,
    quantity: u32,
    adjustment: i64,
    amount: i64,
    currency: [u8; 3],
    status: u8,
    created_at: i64,
    expires_at: i64,
    key: Option<[u8; 16]>,
    payload: u64,
    attributes: Option<String>,
}

impl Raw {
    fn order(&self) -> Order {
        let mut user: String = self
            .user_id
            .iter()
            .take(UserId::LEN_MAX)
            .map(|byte| char::from(b'!' + byte % 94))
            .collect();
        if user.is_empty() {
            user.push('u');
        }
        let currency: String = self
            .currency
            .iter()
            .map(|byte| char::from(b'A' + byte % 26))
            .collect();
        Order {
            id: OrderId::new((self.id >> 1).max(1)).expect("63 bits, not 0"),
            user_id: UserId::new(&user).expect("visible ASCII"),
            sku_id: SkuId::new("A").expect("valid").into(),
            sku: SkuNumber(self.sku),
            quantity: Quantity::new(self.quantity % Quantity::MAX + 1).expect("in range"),
            adjustment: self.adjustment,
            amount: self.amount,
            currency: Currency::new(&currency).expect("three capitals"),
            created_at: UnixMillis(self.created_at),
            expires_at: UnixMillis(self.expires_at),
            key: self.key.map(KeyHash),
            payload: PayloadHash(self.payload),
            attributes: self.attributes.clone().map(String::into_boxed_str),
        }
    }

    fn status(&self) -> OrderStatus {
        OrderStatus::ALL[usize::from(self.status) % OrderStatus::ALL.len()]
    }
}

/// Reads big-endian integers and counted bytes, and nothing beyond the end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        assert!(
            count <= self.0.len(),
            "{count} bytes announced, {} there",
            self.0.len()
        );
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().expect("N bytes")
    }

    /// A field: its bytes, or `None` for NULL.
    fn field(&mut self) -> Option<&'a [u8]> {
        match i32::from_be_bytes(self.array()) {
            -1 => None,
            length => Some(self.bytes(usize::try_from(length).expect("a length is not negative"))),
        }
    }

    /// A field that is not NULL and of a type of fixed size.
    fn fixed<const N: usize>(&mut self) -> [u8; N] {
        self.field()
            .expect("not NULL")
            .try_into()
            .expect("the type's size")
    }
}

/// As PostgreSQL counts: microseconds since 2000-01-01; what does not fit is cut off.
fn micros(at: UnixMillis) -> i64 {
    let exact = (i128::from(at.0) - 946_684_800_000) * 1_000;
    i64::try_from(exact).unwrap_or(if exact < 0 { i64::MIN } else { i64::MAX })
}

fuzz_target!(|raw: Vec<Raw>| {
    let rows: Vec<(Order, OrderStatus)> =
        raw.iter().map(|raw| (raw.order(), raw.status())).collect();
    let mut buffer = BytesMut::new();
    copy::encode(
        &mut buffer,
        rows.iter().map(|(order, status)| (order, *status)),
    );

    let mut reader = Reader(&buffer);
    assert_eq!(reader.bytes(11), b"PGCOPY\n\xff\r\n\0");
    assert_eq!(reader.array::<4>(), [0; 4], "no flags");
    assert_eq!(reader.array::<4>(), [0; 4], "no header extension");
    for (order, status) in &rows {
        assert_eq!(i16::from_be_bytes(reader.array()), 13, "fields in a row");
        assert_eq!(i64::from_be_bytes(reader.fixed()), order.id.get() as i64);
        assert_eq!(reader.field(), Some(order.user_id.as_str().as_bytes()));
        assert_eq!(i32::from_be_bytes(reader.fixed()), order.sku.0);
        assert_eq!(
            i32::from_be_bytes(reader.fixed()),
            order.quantity.get() as i32
        );
        assert_eq!(i64::from_be_bytes(reader.fixed()), order.adjustment);
        assert_eq!(i64::from_be_bytes(reader.fixed()), order.amount);
        assert_eq!(reader.field(), Some(order.currency.as_str().as_bytes()));
        let code = reader
            .field()
            .map(|field| i16::from_be_bytes(field.try_into().expect("2 bytes")));
        assert_eq!(code, status.code());
        assert_eq!(i64::from_be_bytes(reader.fixed()), micros(order.created_at));
        assert_eq!(i64::from_be_bytes(reader.fixed()), micros(order.expires_at));
        assert_eq!(reader.field(), order.key.as_ref().map(|key| &key.0[..]));
        assert_eq!(u64::from_be_bytes(reader.fixed()), order.payload.0);
        assert_eq!(
            reader.field(),
            order.attributes.as_deref().map(str::as_bytes)
        );
    }
    assert_eq!(i16::from_be_bytes(reader.array()), -1, "the trailer");
    assert!(reader.0.is_empty(), "nothing follows the trailer");
});
