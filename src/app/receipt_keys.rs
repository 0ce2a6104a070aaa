//! The keys of receipts: the configured ones, or a generated one.

use std::io::Write as _;
use std::path::Path;

use super::StartError;
use crate::config::Config;

/// The file of the generated key, under `data_dir`.
const FILE: &str = "receipt.key";
/// Random bytes of a generated key, stored as hexadecimal digits.
const KEY_BYTES: usize = 32;

/// The configured secrets; if there are none, the generated one under `data_dir`, created at the first start.
pub(super) fn load(config: &Config) -> Result<Vec<String>, StartError> {
    let configured = &config.receipt.key.0;
    if !configured.is_empty() {
        return Ok(configured.clone());
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
                "receipt.key is not set: generated a key that signs receipts; a lost order can be recovered from its receipt \
                 only with this key, so copy it into the configuration of every machine that may replace this one"
            );
            text
        }
        Err(error) => return Err(failed(error)),
    };
    whole(&text).map(|key| vec![key]).map_err(failed)
}

/// Checks that [`load`] can read an existing key.
pub(super) fn look(config: &Config) -> Result<(), StartError> {
    let path = config.data_dir.join(FILE);
    if !config.receipt.key.0.is_empty() || !path.exists() {
        return Ok(());
    }
    let read = std::fs::read_to_string(&path).and_then(|text| whole(&text));
    read.map(|_| ())
        .map_err(|source| StartError::ReceiptKey { path, source })
}

fn whole(text: &str) -> std::io::Result<String> {
    let key = text.trim();
    if key.len() < KEY_BYTES * 2 {
        return Err(std::io::Error::other(
            "the file is truncated; restore it, or remove it if no receipt signed with it matters any more",
        ));
    }
    Ok(key.to_owned())
}

/// Creates the key, under another name first, so that a crash leaves a whole key or none.
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

    #[test]
    fn a_key_is_made_once_and_is_the_same_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: directory.path().to_owned(),
            ..Config::default()
        };
        let first = load(&config).unwrap();
        assert_eq!(load(&config).unwrap(), first);
        std::fs::write(directory.path().join(FILE), "short").unwrap();
        assert!(load(&config).is_err());
    }
}
