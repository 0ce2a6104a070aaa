//! The schema and its migrations, by `refinery`.
//!
//! Every object, the table of applied migrations included, lives in one schema, found through the session's
//! `search_path`. Nothing outside that schema is touched. Its name is quoted in all SQL, because `user` and
//! `order` are valid names.

use tokio_postgres::Client;

use super::StoreError;

mod embedded_migrations {
    refinery::embed_migrations!("src/store/migrations");
}

/// The table in which `refinery` records the applied migrations.
const HISTORY: &str = "refinery_schema_history";

/// The SQL that [`migrate`] would run on an empty database, for operators who run it themselves. It records the
/// migrations as [`migrate`] does, so that [`check`] and later migrations continue from there.
pub fn print(schema: &str) -> String {
    let mut text = format!(
        "BEGIN;\nCREATE SCHEMA IF NOT EXISTS \"{schema}\";\nSET LOCAL search_path = \"{schema}\";\n\
         CREATE TABLE {HISTORY} (\n    version int4 PRIMARY KEY,\n    name varchar(255),\n    \
         applied_on varchar(255),\n    checksum varchar(255)\n);\n"
    );
    // They are listed by their files' names, V10 before V2.
    let runner = embedded_migrations::migrations::runner();
    let mut migrations: Vec<_> = runner.get_migrations().iter().collect();
    migrations.sort_by_key(|migration| migration.version());
    for migration in migrations {
        text.push_str(&format!(
            "\n-- {migration}\n{}\nINSERT INTO {HISTORY} VALUES ({}, '{}', \
             to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), '{}');\n",
            migration.sql().unwrap_or_default(),
            migration.version(),
            migration.name(),
            migration.checksum(),
        ));
    }
    text.push_str("COMMIT;\n");
    text
}

/// Brings the schema up to date. `client`'s search path must be `schema`.
///
/// # Errors
/// If the schema holds relations that Millrace did not create, if the role lacks rights, or if the schema
/// belongs to a newer release.
pub async fn migrate(client: &mut Client, schema: &str) -> Result<usize, StoreError> {
    check_writable(client).await?;
    check_encoding(client).await?;
    // Of two processes that start together, the second finds the work done.
    let turn = format!("millrace migrate:{schema}");
    client
        .execute("SELECT pg_advisory_lock(hashtextextended($1, 0))", &[&turn])
        .await
        .map_err(StoreError::statement(
            "waiting for another process that migrates",
        ))?;
    let migrated = migrate_alone(client, schema).await;
    // A failure here means a lost connection, which releases the lock too.
    let _ = client
        .execute(
            "SELECT pg_advisory_unlock(hashtextextended($1, 0))",
            &[&turn],
        )
        .await;
    migrated
}

async fn migrate_alone(client: &mut Client, schema: &str) -> Result<usize, StoreError> {
    refuse_foreign(client, schema).await?;
    if has_history(client, schema).await? {
        refuse_newer(client, schema).await?;
    }
    // `IF NOT EXISTS` would require the right to create even if nothing is to be created.
    let exists = client
        .query_opt("SELECT FROM pg_namespace WHERE nspname = $1", &[&schema])
        .await
        .map_err(StoreError::statement("looking for the schema"))?
        .is_some();
    if !exists {
        client
            .batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS \"{schema}\""))
            .await
            .map_err(StoreError::statement(
                "creating the schema (the role needs CREATE on the database)",
            ))?;
    }
    let report = embedded_migrations::migrations::runner()
        .set_migration_table_name(HISTORY)
        .run_async(client)
        .await
        .map_err(|e| {
            StoreError::Schema(format!(
                "migrating schema {schema}: {}",
                super::error::chain(&e)
            ))
        })?;
    publish(client).await;
    Ok(report.applied_migrations().len())
}

async fn refuse_foreign(client: &Client, schema: &str) -> Result<(), StoreError> {
    let relations: i64 = client
        .query_one(
            "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
              WHERE n.nspname = $1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')",
            &[&schema],
        )
        .await
        .map_err(StoreError::statement("looking at the schema"))?
        .get(0);
    if relations > 0 && !has_history(client, schema).await? {
        return Err(StoreError::Schema(format!(
            "schema {schema} holds relations that Millrace did not create; set database.schema to another name"
        )));
    }
    Ok(())
}

/// Checks, without changing anything, whether [`migrate`] could bring the schema up to date.
///
/// # Errors
/// The errors of [`migrate`] that can be detected beforehand.
pub async fn inspect(client: &mut Client, schema: &str) -> Result<(), StoreError> {
    check_writable(client).await?;
    check_encoding(client).await?;
    refuse_foreign(client, schema).await?;
    if has_history(client, schema).await? {
        return refuse_newer(client, schema).await;
    }
    let may_make: bool = client
        .query_one(
            "SELECT CASE WHEN EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)
                    THEN has_schema_privilege($1, 'CREATE')
                    ELSE has_database_privilege(current_database(), 'CREATE') END",
            &[&schema],
        )
        .await
        .map_err(StoreError::statement("looking at the role's rights"))?
        .get(0);
    if may_make {
        return Ok(());
    }
    Err(StoreError::Schema(format!(
        "the role may not create schema {schema}: grant it CREATE on the database, or on the schema if it exists"
    )))
}

/// The newest version known to this release, and the version in the database.
async fn versions(client: &Client) -> Result<(Option<i64>, Option<i64>), StoreError> {
    let newest = embedded_migrations::migrations::runner()
        .get_migrations()
        .iter()
        .map(|m| m.version())
        .max();
    let found: Option<i32> = client
        .query_one(&format!("SELECT max(version) FROM {HISTORY}"), &[])
        .await
        .map_err(StoreError::statement("reading the schema's version"))?
        .get(0);
    Ok((newest.map(i64::from), found.map(i64::from)))
}

/// Refuses a schema that a newer release has migrated.
async fn refuse_newer(client: &Client, schema: &str) -> Result<(), StoreError> {
    match versions(client).await? {
        (newest, found) if found > newest => Err(newer(schema)),
        _ => Ok(()),
    }
}

fn newer(schema: &str) -> StoreError {
    StoreError::Schema(format!(
        "schema {schema} is newer than this release of Millrace: a newer one has migrated it; start that one"
    ))
}

/// Checks that the schema is this release's.
///
/// # Errors
/// If migrations are missing, or unknown to this release.
pub async fn check(client: &mut Client, schema: &str) -> Result<(), StoreError> {
    let stale = |what: &str| {
        StoreError::Schema(format!(
            "schema {schema} {what}; run `millrace migrate`, or set database.migrate = \"auto\""
        ))
    };
    check_writable(client).await?;
    check_encoding(client).await?;
    if !has_history(client, schema).await? {
        return Err(stale("does not exist yet"));
    }
    match versions(client).await? {
        (newest, found) if newest == found => Ok(()),
        (newest, found) if newest > found => Err(stale("is older than this release")),
        _ => Err(newer(schema)),
    }
}

/// Creates or drops the index of a user's whole history. Writes go on meanwhile.
///
/// # Errors
/// The database's error.
pub async fn ensure_user_index(client: &Client, wanted: bool) -> Result<(), StoreError> {
    let doing = "bringing database.user_index into force";
    let valid: Option<bool> = client
        .query_opt(
            "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('orders_user')",
            &[],
        )
        .await
        .map_err(StoreError::statement(doing))?
        .map(|row| row.get(0));
    let drop = "DROP INDEX CONCURRENTLY orders_user";
    let create = "CREATE INDEX CONCURRENTLY orders_user ON orders (user_id, order_id)";
    // An invalid index was left by a process that was killed while creating it.
    let steps: &[&str] = match (wanted, valid) {
        (true, Some(true)) | (false, None) => &[],
        (true, None) => &[create],
        (true, Some(false)) => &[drop, create],
        (false, Some(_)) => &[drop],
    };
    for step in steps {
        client
            .batch_execute(step)
            .await
            .map_err(StoreError::statement(doing))?;
    }
    Ok(())
}

async fn has_history(client: &Client, schema: &str) -> Result<bool, StoreError> {
    client
        .query_one(
            "SELECT to_regclass($1) IS NOT NULL",
            &[&format!("\"{schema}\".{HISTORY}")],
        )
        .await
        .map(|row| row.get(0))
        .map_err(StoreError::statement("looking for the schema's history"))
}

/// Refuses a standby, and a role or database whose transactions are read-only.
async fn check_writable(client: &Client) -> Result<(), StoreError> {
    let seen = client
        .query_one(
            "SELECT pg_is_in_recovery(), current_setting('transaction_read_only')::bool",
            &[],
        )
        .await
        .map_err(StoreError::statement(
            "asking whether the server takes writes",
        ))?;
    Err(StoreError::ReadOnly(match (seen.get(0), seen.get(1)) {
        (true, _) => {
            "a standby, which takes no writes: name the primary, or both servers, and the primary is found"
        }
        (false, true) => {
            "read-only sessions: turn default_transaction_read_only off for the role, the database and the server"
        }
        (false, false) => return Ok(()),
    }))
}

/// Refuses a database that is not encoded in UTF-8. An order's attributes may hold any character; in another
/// encoding their row would be refused, and their dead letter too.
async fn check_encoding(client: &Client) -> Result<(), StoreError> {
    let encoding: String = client
        .query_one("SELECT current_setting('server_encoding')", &[])
        .await
        .map_err(StoreError::statement("reading the database's encoding"))?
        .get(0);
    if encoding == "UTF8" {
        return Ok(());
    }
    Err(StoreError::Schema(format!(
        "the database is encoded in {encoding}; create one with ENCODING 'UTF8' and set database.url to it"
    )))
}

/// Creates the publication for logical replication, if the role may.
async fn publish(client: &Client) {
    let published = client
        .query(
            "SELECT t.tablename::text FROM pg_publication p
               LEFT JOIN pg_publication_tables t ON t.pubname = p.pubname AND t.schemaname = current_schema()
              WHERE p.pubname = 'millrace'",
            &[],
        )
        .await;
    let Ok(published) = published else { return };
    let has = |table: &str| {
        let mut rows = published.iter();
        rows.any(|row| row.get::<_, Option<&str>>(0) == Some(table))
    };
    let statement = if published.is_empty() {
        "CREATE PUBLICATION millrace FOR TABLE orders, sku, dead_letters, payments"
    } else if has("orders") && !has("payments") {
        // Created by an earlier release.
        "ALTER PUBLICATION millrace ADD TABLE payments"
    } else {
        return;
    };
    if let Err(e) = client.batch_execute(statement).await {
        tracing::info!(
            reason = %super::error::chain(&e),
            "the publication could not be created, so changes cannot be read by logical replication; the role lacks the right"
        );
    }
}
