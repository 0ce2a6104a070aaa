//! Encoding of the fields of a receipt's body.

use super::{BYTES_MAX, ReceiptError};
use crate::order::{Currency, UserId};

const LETTERS: u16 = 26;

pub(super) fn currency_number(currency: Currency) -> u16 {
    let letters = currency.as_str().bytes();
    letters.fold(0, |number, letter| {
        number * LETTERS + u16::from(letter - b'A')
    })
}

pub(super) fn currency_of(number: u16) -> Result<Currency, ReceiptError> {
    let letter = |place: u16| b'A' + (number / place % LETTERS) as u8;
    if number >= LETTERS.pow(3) {
        return Err(ReceiptError::Malformed);
    }
    let code = [letter(LETTERS * LETTERS), letter(LETTERS), letter(1)];
    std::str::from_utf8(&code)
        .ok()
        .and_then(|code| Currency::new(code).ok())
        .ok_or(ReceiptError::Malformed)
}

pub(super) fn varint_bytes(value: u64) -> usize {
    let bits = (u64::BITS - value.leading_zeros()).max(1);
    bits.div_ceil(7) as usize
}

fn packed_bytes(characters: usize) -> usize {
    (characters * 7).div_ceil(8)
}

pub(super) struct Writer {
    pub(super) bytes: [u8; BYTES_MAX],
    pub(super) length: usize,
}

impl Default for Writer {
    fn default() -> Self {
        Writer {
            bytes: [0; BYTES_MAX],
            length: 0,
        }
    }
}

impl Writer {
    pub(super) fn written(&self) -> &[u8] {
        let (written, _) = self.bytes.split_at(self.length);
        written
    }

    /// Never beyond the end: up to `expires_at` an order takes 82 bytes at most, its form was
    /// chosen so that the rest fits, and the MAC takes the remaining room.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        self.bytes[self.length..end].copy_from_slice(bytes);
        self.length = end;
    }

    pub(super) fn put_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.put(&[value as u8 | 0x80]);
            value >>= 7;
        }
        self.put(&[value as u8]);
    }

    pub(super) fn put_zigzag(&mut self, value: i64) {
        self.put_varint(((value << 1) ^ (value >> 63)) as u64);
    }

    /// Packs each group of eight characters into seven bytes.
    pub(super) fn put_user(&mut self, ascii: &str) {
        for group in ascii.as_bytes().chunks(8) {
            let gathered = group
                .iter()
                .fold(0, |all, byte| all << 7 | u64::from(*byte));
            let bytes = (gathered << (64 - 7 * group.len())).to_be_bytes();
            let (bytes, _) = bytes.split_at(packed_bytes(group.len()));
            self.put(bytes);
        }
    }
}

/// The bytes that are not read yet. Reading never panics, and accepts only the output of a
/// [`Writer`].
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], ReceiptError> {
        let split = self.0.split_at_checked(length);
        let (taken, rest) = split.ok_or(ReceiptError::Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], ReceiptError> {
        let split = self.0.split_first_chunk();
        let (taken, rest) = split.ok_or(ReceiptError::Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn varint(&mut self) -> Result<u64, ReceiptError> {
        let mut value = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let [byte] = self.array()?;
            let part = u64::from(byte & 0x7f);
            let is_longer_than_need_be = byte == 0 && shift > 0;
            if is_longer_than_need_be || part << shift >> shift != part {
                return Err(ReceiptError::Malformed);
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(ReceiptError::Malformed)
    }

    pub(super) fn zigzag(&mut self) -> Result<i64, ReceiptError> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    pub(super) fn user(&mut self, length: usize) -> Result<UserId, ReceiptError> {
        let mut ascii = [0; UserId::LEN_MAX];
        let ascii = ascii.get_mut(..length).ok_or(ReceiptError::Malformed)?;
        for group in ascii.chunks_mut(8) {
            let packed = self.take(packed_bytes(group.len()))?;
            let mut bytes = [0; 8];
            let (start, _) = bytes.split_at_mut(packed.len());
            start.copy_from_slice(packed);
            let mut gathered = u64::from_be_bytes(bytes);
            for character in group {
                *character = (gathered >> 57) as u8;
                gathered <<= 7;
            }
            if gathered != 0 {
                return Err(ReceiptError::Malformed);
            }
        }
        std::str::from_utf8(ascii)
            .ok()
            .and_then(|text| UserId::new(text).ok())
            .ok_or(ReceiptError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_has_one_form() {
        for value in [0, 1, 0x7f, 0x80, 0x3fff, 0x4000, u64::MAX >> 1, u64::MAX] {
            let mut bytes = Vec::new();
            let mut rest = value;
            while rest > 0x7f {
                bytes.push(rest as u8 | 0x80);
                rest >>= 7;
            }
            bytes.push(rest as u8);
            assert_eq!(Reader(&bytes).varint(), Ok(value));
        }
        let too_long: [&[u8]; 4] = [&[0x80, 0x00], &[0xff, 0x80, 0x00], &[0x80], &[0xff; 11]];
        let too_large = [&[0xff; 9][..], &[0x02]].concat();
        for bytes in too_long.into_iter().chain([&too_large[..]]) {
            assert_eq!(
                Reader(bytes).varint(),
                Err(ReceiptError::Malformed),
                "{bytes:?}"
            );
        }
    }
}
