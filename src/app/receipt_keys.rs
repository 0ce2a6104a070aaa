//! The keys of receipts: those of the configuration, or one of our own, made once.

use std::io::Write as _;
use std::path::Path;

use super::StartError;
use crate::config::Config;
use crate::order::receipt::ReceiptKeys;

/// Its name under `data_dir`.
const FILE: &str = "receipt.key";
/// Random bytes of a key of our own, written in hexadecimal digits.
const KEY_BYTES: usize = 32;

/// The keys that the configuration names; where it names none, the one under `data_dir`, which is
/// made at the first start.
pub(super) fn load(config: &Config) -> Result<ReceiptKeys, StartError> {
    let configured = &config.receipt.key.0;
    if !configured.is_empty() {
        return Ok(ReceiptKeys::new(configured));
    }
    let path = config.data_dir.join(FILE);
    let failed = |source| StartError::ReceiptKey {
        path: path.clone(),
        source,
    };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = make(&config.data_dir, &path).map_err(failed)?;
            tracing::warn!(
                path = %path.display(),
                "receipt.key is not set: made one that signs receipts; a lost order is recovered from its receipt \
                 only where this key is, so put it into the configuration of whatever may replace this machine"
            );
            text
        }
        Err(error) => return Err(failed(error)),
    };
    let key = text.trim();
    if key.len() < KEY_BYTES * 2 {
        return Err(failed(std::io::Error::other(
            "it is cut off; restore it, or remove it where no receipt signed with it matters any more",
        )));
    }
    Ok(ReceiptKeys::new(&[key]))
}

/// Under another name first, so that a crash leaves a whole key or none.
fn make(directory: &Path, path: &Path) -> std::io::Result<String> {
    let random: [u8; KEY_BYTES] = rand::random();
    let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let half_made = path.with_extension("key.new");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&half_made)?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    std::fs::rename(&half_made, path)?;
    std::fs::File::open(directory)?.sync_all()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::receipt::SignedParts;
    use crate::order::{Currency, OrderId, PayloadHash, SkuNumber, UnixMillis};

    #[test]
    fn a_key_is_made_once_and_signs_the_same_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: directory.path().to_owned(),
            ..Config::default()
        };
        let order = SignedParts {
            id: OrderId::new(1).unwrap(),
            user_id: "u",
            sku: SkuNumber(1),
            quantity: 1,
            adjustment: 0,
            amount: 1,
            currency: Currency::new("EUR").unwrap(),
            created_at: UnixMillis(0),
            expires_at: UnixMillis(0),
            key: None,
            payload: PayloadHash(0),
        };
        let first = load(&config).unwrap().sign(&order);
        assert_eq!(load(&config).unwrap().sign(&order), first);
        std::fs::write(directory.path().join(FILE), "short").unwrap();
        assert!(load(&config).is_err());
    }
}
