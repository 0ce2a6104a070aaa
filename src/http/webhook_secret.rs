//! Secrets of Standard Webhooks: base64, with or without its padding, with or without `whsec_` before it. Messages that
//! come (payments) and messages that go (events) are signed alike.

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// Fewest bytes of a secret, as Standard Webhooks asks for.
pub const BYTES_MIN: usize = 24;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The bytes of a secret; `None` if it is not base64.
pub fn bytes(secret: &str) -> Option<Vec<u8>> {
    let text = secret.strip_prefix("whsec_").unwrap_or(secret);
    BASE64.decode(text).ok()
}
