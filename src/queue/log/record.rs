//! The logical format: the payload of a group.
//!
//! ```text
//!   group:   epoch i64 │ sequence of the first record u64 │ records u32 │ record …
//!   record:  kind u8 │ body
//!   order:   id u64 │ sku i32 │ quantity u16 │ adjustment i64 │ amount i64 │ currency 3 bytes
//!            │ created_at i64 │ expires_at i64 │ payload hash u64
//!            │ user_id (u8 length) │ sku_id (u8 length) │ key hash (0, or 1 and 16 bytes)
//!            │ attributes (0, or 1, u16 length, text)
//!   lease:   no order id lies at or beyond this moment, i64
//!   lease:   exclusive upper bound of the order ids, i64
//!
//! All integers are little-endian; timestamps are Unix milliseconds. A record's sequence number is
//! that of its group's first record plus its index.

use std::collections::HashMap;
use std::sync::Arc;

use crate::order::{
    Currency, KeyHash, Order, OrderId, PayloadHash, Quantity, SkuId, SkuNumber, UnixMillis, UserId,
};

/// Bytes before the first record of a group: epoch, sequence and number of records.
pub const GROUP_HEAD: usize = 20;
/// Longest record in bytes: fixed parts, the longest names, and 1 KiB of attributes.
pub const RECORD_MAX: usize = 1 + 8 + 4 + 2 + 16 + 3 + 16 + 8 + 49 + 33 + 17 + 3 + 1_024;

const ORDER: u8 = 1;
const LEASE: u8 = 2;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// An order that was, or was about to be, acknowledged.
    Order(Box<Order>),
    /// A lease on order ids, written while the database was unreachable: no id at or beyond this
    /// moment.
    Lease(UnixMillis),
}

/// A group's payload, decoded.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    /// Epoch of the process that wrote it.
    pub epoch: i64,
    /// Sequence number of its first record, from 1.
    pub sequence: u64,
    /// Its records, in order.
    pub records: Vec<Record>,
}

/// A group being gathered.
#[derive(Debug, Default)]
pub struct GroupBytes {
    bytes: Vec<u8>,
    records: u32,
    orders: u32,
    ids: Option<(OrderId, OrderId)>,
}

impl GroupBytes {
    /// Starts a new group.
    pub fn begin(&mut self, epoch: i64, sequence: u64) {
        self.bytes.clear();
        (self.records, self.orders, self.ids) = (0, 0, None);
        self.bytes.extend_from_slice(&epoch.to_le_bytes());
        self.bytes.extend_from_slice(&sequence.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
    }

    /// Adds an order.
    pub fn push_order(&mut self, order: &Order) {
        self.count();
        self.orders += 1;
        self.ids = super::widen(self.ids, order.id);
        let out = &mut self.bytes;
        out.push(ORDER);
        out.extend_from_slice(&order.id.get().to_le_bytes());
        out.extend_from_slice(&order.sku.0.to_le_bytes());
        // 1 to 10,000 by its type.
        out.extend_from_slice(&(order.quantity.get() as u16).to_le_bytes());
        out.extend_from_slice(&order.adjustment.to_le_bytes());
        out.extend_from_slice(&order.amount.to_le_bytes());
        out.extend_from_slice(order.currency.as_str().as_bytes());
        out.extend_from_slice(&order.created_at.0.to_le_bytes());
        out.extend_from_slice(&order.expires_at.0.to_le_bytes());
        out.extend_from_slice(&order.payload.0.to_le_bytes());
        for text in [order.user_id.as_str(), order.sku_id.as_str()] {
            // At most 48 and 32 bytes by their types.
            out.push(text.len() as u8);
            out.extend_from_slice(text.as_bytes());
        }
        match &order.key {
            None => out.push(0),
            Some(key) => {
                out.push(1);
                out.extend_from_slice(&key.0);
            }
        }
        match &order.attributes {
            None => out.push(0),
            Some(attributes) => {
                out.push(1);
                // At most 1 KiB, checked when the request was decoded.
                out.extend_from_slice(&(attributes.len() as u16).to_le_bytes());
                out.extend_from_slice(attributes.as_bytes());
            }
        }
    }

    /// Adds a lease on order ids.
    pub fn push_lease(&mut self, until: UnixMillis) {
        self.count();
        self.bytes.push(LEASE);
        self.bytes.extend_from_slice(&until.0.to_le_bytes());
    }

    fn count(&mut self) {
        self.records += 1;
        self.bytes[16..GROUP_HEAD].copy_from_slice(&self.records.to_le_bytes());
    }

    /// Whether it has no record yet.
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Whether a record of at most `record_bytes` fits into a group of `room` bytes.
    pub fn fits(&self, record_bytes: usize, room: usize) -> bool {
        self.bytes.len() + record_bytes <= room
    }

    /// The payload.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The group, to be appended.
    pub fn group(&self) -> super::NewGroup<'_> {
        super::NewGroup {
            payload: &self.bytes,
            records: self.records,
            orders: self.orders,
            ids: self.ids,
        }
    }
}

/// Upper bound of an order's record, in bytes.
pub fn order_bytes(attributes: Option<&str>) -> usize {
    RECORD_MAX - 1_024 + attributes.map_or(0, str::len)
}

/// The payload does not decode as a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a group's content cannot be decoded")]
pub struct Malformed;

/// Decodes a group's payload. Every byte must belong to a record.
///
/// # Errors
/// [`Malformed`].
pub fn decode(payload: &[u8]) -> Result<Group, Malformed> {
    let mut reader = Reader {
        rest: payload,
        sku_ids: HashMap::default(),
    };
    let epoch = reader.i64()?;
    let sequence = reader.u64()?;
    let count = reader.u32()?;
    let mut records = Vec::new();
    for _ in 0..count {
        records.push(reader.record()?);
    }
    if reader.rest.is_empty() && count > 0 {
        Ok(Group {
            epoch,
            sequence,
            records,
        })
    } else {
        Err(Malformed)
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    /// Ids read so far: orders of one SKU share its id, even if the stock is not at hand.
    sku_ids: HashMap<&'a str, Arc<SkuId>, foldhash::fast::RandomState>,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.take(N)?.try_into().map_err(|_| Malformed)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn i64(&mut self) -> Result<i64, Malformed> {
        self.array().map(i64::from_le_bytes)
    }

    fn text(&mut self, length: usize) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.take(length)?).map_err(|_| Malformed)
    }

    fn sku_id(&mut self, length: usize) -> Result<Arc<SkuId>, Malformed> {
        let text = self.text(length)?;
        if let Some(known) = self.sku_ids.get(text) {
            return Ok(Arc::clone(known));
        }
        let id = Arc::new(SkuId::new(text).map_err(|_| Malformed)?);
        self.sku_ids.insert(text, Arc::clone(&id));
        Ok(id)
    }

    fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed),
        }
    }

    fn record(&mut self) -> Result<Record, Malformed> {
        match self.u8()? {
            ORDER => self.order().map(|order| Record::Order(Box::new(order))),
            LEASE => Ok(Record::Lease(UnixMillis(self.i64()?))),
            _ => Err(Malformed),
        }
    }

    fn order(&mut self) -> Result<Order, Malformed> {
        let id = OrderId::new(self.u64()?).ok_or(Malformed)?;
        let sku = SkuNumber(i32::from_le_bytes(self.array()?));
        let quantity = Quantity::new(self.u16()?.into()).ok_or(Malformed)?;
        let (adjustment, amount) = (self.i64()?, self.i64()?);
        let currency = Currency::new(self.text(3)?).map_err(|_| Malformed)?;
        let created_at = UnixMillis(self.i64()?);
        let expires_at = UnixMillis(self.i64()?);
        let payload = PayloadHash(self.u64()?);
        let length = self.u8()?.into();
        let user_id = UserId::new(self.text(length)?).map_err(|_| Malformed)?;
        let length = self.u8()?.into();
        let sku_id = self.sku_id(length)?;
        let key = match self.flag()? {
            false => None,
            true => Some(KeyHash(self.array()?)),
        };
        let attributes = match self.flag()? {
            false => None,
            true => {
                let length = self.u16()?.into();
                Some(self.text(length)?.into())
            }
        };
        Ok(Order {
            id,
            user_id,
            sku_id,
            sku,
            quantity,
            adjustment,
            amount,
            currency,
            created_at,
            expires_at,
            key,
            payload,
            attributes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(attributes: Option<&str>) -> Order {
        Order {
            id: OrderId::new(77 << 22).unwrap(),
            user_id: UserId::new(&"u".repeat(48)).unwrap(),
            sku_id: SkuId::new(&"s".repeat(32)).unwrap().into(),
            sku: SkuNumber(-3),
            quantity: Quantity::new(10_000).unwrap(),
            adjustment: -5,
            amount: i64::MAX,
            currency: Currency::new("CNY").unwrap(),
            created_at: UnixMillis(-1),
            expires_at: UnixMillis(i64::MAX),
            key: Some(KeyHash([9; 16])),
            payload: PayloadHash(u64::MAX),
            attributes: attributes.map(Into::into),
        }
    }

    #[test]
    fn a_group_round_trips_exactly() {
        let long = "é".repeat(512);
        let mut bytes = GroupBytes::default();
        bytes.begin(4, 100);
        let mut records = Vec::new();
        for attributes in [None, Some(""), Some(long.as_str())] {
            let order = order(attributes);
            let before = bytes.as_bytes().len();
            bytes.push_order(&order);
            let length = bytes.as_bytes().len() - before;
            assert!(length <= order_bytes(attributes) && length <= RECORD_MAX);
            records.push(Record::Order(Box::new(order)));
        }
        bytes.push_lease(UnixMillis(5));
        records.push(Record::Lease(UnixMillis(5)));
        let group = decode(bytes.as_bytes()).unwrap();
        assert_eq!((group.epoch, group.sequence), (4, 100));
        assert_eq!(group.records, records);
        let names: Vec<_> = group
            .records
            .iter()
            .filter_map(|record| match record {
                Record::Order(order) => Some(&order.sku_id),
                Record::Lease(_) => None,
            })
            .collect();
        assert!(names.iter().all(|name| Arc::ptr_eq(name, names[0])));
        for cut in 0..bytes.as_bytes().len() {
            assert_eq!(decode(&bytes.as_bytes()[..cut]), Err(Malformed), "{cut}");
        }
        let one_more = [bytes.as_bytes(), &[0]].concat();
        assert_eq!(decode(&one_more), Err(Malformed));
        let appended = bytes.group();
        assert_eq!((appended.records, appended.orders), (4, 3));
        let id = order(None).id;
        assert_eq!(appended.ids, Some((id, id)));
        assert!(!bytes.is_empty());
        bytes.begin(4, 104);
        assert!(bytes.is_empty());
        assert_eq!(decode(bytes.as_bytes()), Err(Malformed), "no record");
    }

    #[test]
    fn the_largest_order_takes_as_many_bytes_as_are_reserved_for_it() {
        let long = "a".repeat(1_024);
        let mut bytes = GroupBytes::default();
        bytes.begin(1, 1);
        let room = bytes.as_bytes().len() + RECORD_MAX;
        assert_eq!(order_bytes(Some(&long)), RECORD_MAX);
        assert!(bytes.fits(RECORD_MAX, room) && !bytes.fits(RECORD_MAX, room - 1));
        bytes.push_order(&order(Some(&long)));
        assert_eq!(bytes.as_bytes().len(), room);
    }
}
