//! Checks of a start that need nothing created, opened or listened at. A start runs them first; `millrace
//! config check` runs the same and a few more, so that it finds the faults that a start would.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, access};

use super::{StartError, brokers, events, open_database, planes, receipt_keys};
use crate::config::{Backend, Config, Migrate};
use crate::http::data_plane::payments::providers::Providers;
use crate::http::data_plane::payments::providers::standard::Standard;
use crate::store::embedded::Embedded;
use crate::store::postgres::Database;
use crate::store::schema;

/// Reads every key, certificate and directory that the configuration names; changes nothing.
pub(super) fn look(config: &Config) -> Result<Providers, StartError> {
    let providers = Providers::new(&config.payments)?;
    if let Some((_, detail)) = Standard::warning(&config.payments.standard) {
        tracing::warn!(detail, "a payment secret is short");
    }
    let mut directories = vec![("data_dir", config.data_dir.clone())];
    match config.queue.backend {
        Backend::Memory => {}
        Backend::Redis | Backend::Kafka | Backend::RocketMq => drop(brokers::client(config, 0)?),
        Backend::Journal => directories.push(("queue.journal.dir", config.journal_dir())),
    }
    for (field, path) in directories {
        may_write(&path).map_err(|source| StartError::Directory {
            field,
            path,
            source,
        })?;
    }
    receipt_keys::look(config)?;
    events::look(config)?;
    planes::span_exporter(config)?;
    let settings = &config.database;
    if !settings.url.is_empty() {
        // Certificates are read here; nothing is connected to.
        let step = Duration::from_millis(settings.step_timeout_ms);
        Database::new(&settings.url, &settings.schema, settings.pool_size, step)?;
    }
    Ok(providers)
}

/// The checks of `millrace config check`: those of `look`, and whether the addresses can be listened at, a
/// PostgreSQL to run exists, and, if `connect`, whether the configured database is suitable. Returns true if
/// the database was asked.
///
/// # Errors
/// [`StartError`], as a start would fail.
pub async fn check(config: &Config, connect: bool) -> Result<bool, StartError> {
    look(config)?;
    for (field, address) in [
        ("data_plane.listen", config.data_plane.listen),
        ("control_plane.listen", config.control_plane.listen),
    ] {
        match TcpListener::bind(address) {
            // The address may be in use by the very service whose settings are checked.
            Err(source) if source.kind() != std::io::ErrorKind::AddrInUse => {
                return Err(StartError::Listen {
                    field,
                    address,
                    source,
                });
            }
            _ => {}
        }
    }
    let settings = &config.database;
    if settings.url.is_empty() {
        let bin_dir = Some(&settings.embedded_bin_dir).filter(|dir| !dir.is_empty());
        let data_dir = config.data_dir.clone();
        Embedded::look_for_binaries(data_dir, bin_dir.map(PathBuf::from)).await?;
        return Ok(false);
    }
    if !connect {
        return Ok(false);
    }
    let database = open_database(config).await?.database;
    let mut client = database.connect("millrace config check").await?;
    match settings.migrate {
        Migrate::Auto => schema::inspect(&mut client, &settings.schema).await?,
        Migrate::Never => schema::check(&mut client, &settings.schema).await?,
    }
    events::check(config, &database).await?;
    Ok(true)
}

/// Checks that a directory exists or can be created, and is writable.
fn may_write(path: &Path) -> std::io::Result<()> {
    let path = std::path::absolute(path)?;
    let there = path.ancestors().find(|ancestor| ancestor.exists());
    let there = there.unwrap_or(&path);
    if !there.is_dir() {
        return Err(std::io::ErrorKind::NotADirectory.into());
    }
    Ok(access(there, Access::WRITE_OK | Access::EXEC_OK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_cannot_be_one_is_found_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(may_write(&dir.path().join("to/be/made")).is_ok());
        assert!(!dir.path().join("to").exists());
        for bad in [file.clone(), file.join("below")] {
            assert!(may_write(&bad).is_err(), "{}", bad.display());
        }
    }
}
