//! Opening the database (the configured one, or a server of our own) and its schema.

use std::path::PathBuf;
use std::time::Duration;

use super::StartError;
use crate::config::{Config, Migrate};
use crate::store::embedded::{DATABASE, Embedded, EmbeddedOptions};
use crate::store::postgres::{Database, pooling};
use crate::store::schema;

/// A database ready for use, and our own server behind it, if there is one.
#[derive(Debug)]
pub struct OpenDatabase {
    /// The database.
    pub database: Database,
    /// Our own server.
    pub embedded: Option<Embedded>,
}

/// Connects to the configured database, or starts our own. Does not touch the schema. Every command that uses
/// the database comes through here, so each of them refuses a pooler that would break it.
///
/// # Errors
/// If no database can be opened.
pub async fn open_database(config: &Config) -> Result<OpenDatabase, StartError> {
    open(config, true).await
}

/// The same for a command that only looks: where our own server has never run, none is made.
///
/// # Errors
/// As [`open_database`], and if there is none.
pub async fn open_existing_database(config: &Config) -> Result<OpenDatabase, StartError> {
    open(config, false).await
}

async fn open(config: &Config, may_make: bool) -> Result<OpenDatabase, StartError> {
    let settings = &config.database;
    let step = Duration::from_millis(settings.step_timeout_ms);
    if !settings.url.is_empty() {
        let database = Database::new(&settings.url, &settings.schema, settings.pool_size, step)?;
        pooling::check(&database).await?;
        return Ok(OpenDatabase {
            database,
            embedded: None,
        });
    }
    let mut options = EmbeddedOptions::new(&config.data_dir);
    if !settings.embedded_bin_dir.is_empty() {
        options.bin_dir = Some(PathBuf::from(&settings.embedded_bin_dir));
    }
    options.wal_bytes = settings.embedded_wal_bytes;
    options.may_make = may_make;
    options.logical = !config.events.sinks.is_empty();
    let embedded = Embedded::start(options).await?;
    tracing::info!(
        version = embedded.version(), directory = %embedded.home().display(),
        "database.url is not set: running a PostgreSQL of our own"
    );
    let database = Database::with_config(
        embedded.config(DATABASE),
        &settings.schema,
        settings.pool_size,
        step,
    )?;
    Ok(OpenDatabase {
        database,
        embedded: Some(embedded),
    })
}

/// Migrates the schema, or checks it, according to `database.migrate`.
///
/// # Errors
/// If the schema is not, or cannot be made, this release's.
pub async fn prepare_schema(config: &Config, database: &Database) -> Result<(), StartError> {
    let mut client = database.connect("millrace migrate").await?;
    match config.database.migrate {
        Migrate::Auto => {
            let applied = schema::migrate(&mut client, database.schema()).await?;
            if applied > 0 {
                tracing::info!(applied, schema = database.schema(), "migrated the schema");
            }
        }
        Migrate::Never => schema::check(&mut client, database.schema()).await?,
    }
    schema::ensure_user_index(&client, config.database.user_index).await?;
    Ok(())
}
