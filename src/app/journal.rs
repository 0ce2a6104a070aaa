//! The journal before the database: read and checked first, so that damage stops a start before anything is
//! changed.

use std::time::{Duration, Instant};

use super::StartError;
use crate::config::{Backend, Config};
use crate::http::control_plane::ControlPlane;
use crate::order::UnixMillis;
use crate::queue::journal::Opened;
use crate::store::postgres::journal::NotedJournal;

/// Interval of progress reports.
const PROGRESS: Duration = Duration::from_secs(1);

/// Opens, reads and checks the journal; `None` if the queue is another.
pub(super) async fn open(
    config: &Config,
    control: &ControlPlane,
) -> Result<Option<Opened>, StartError> {
    match config.queue.backend {
        Backend::Memory => return Ok(None),
        Backend::Journal => {}
    }
    let (directory, bytes_max) = (config.journal_dir(), config.queue.journal.bytes_max);
    let started = Instant::now();
    let telling = control.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let mut told = Instant::now();
        Opened::at(&directory, bytes_max, rand::random(), |done, of| {
            telling.progress(format!("reading the journal: {done} of {of} segments"));
            if told.elapsed() > PROGRESS {
                told = Instant::now();
                tracing::info!(segments = done, of, "reading the journal");
            }
        })
    })
    .await
    .map_err(|panic| StartError::Engine(std::io::Error::other(panic)))??;
    let scanned = &opened.scanned;
    tracing::info!(
        journal = opened.identity.name(),
        records = scanned.records,
        segments = scanned.segments.len(),
        torn_sectors = scanned.torn_sectors,
        ms = started.elapsed().as_millis() as u64,
        "read the journal"
    );
    Ok(Some(opened))
}

/// Compares the journal found with the journal recorded in the database.
pub(super) fn check(
    config: &Config,
    opened: Option<&Opened>,
    noted: Option<&NotedJournal>,
) -> Result<(), StartError> {
    let ours = opened.map(|opened| opened.identity.name());
    let directory = config.journal_dir();
    if let Some(noted) = noted.filter(|noted| noted.in_use && ours.as_ref() != Some(&noted.name)) {
        return Err(StartError::JournalAbsent {
            noted: noted.name.clone(),
            found: match ours {
                None => "queue.backend is not journal".to_owned(),
                Some(ours) => format!("{} has journal {ours}", directory.display()),
            },
        });
    }
    if let Some(opened) = opened
        && opened.scanned.records > 0
        && noted.map(|noted| &noted.name) != ours.as_ref()
    {
        return Err(StartError::JournalForeign {
            directory,
            records: opened.scanned.records,
        });
    }
    Ok(())
}

/// All order ids of the journal lie before this moment.
pub(super) fn id_high_water(opened: Option<&Opened>) -> UnixMillis {
    opened.map_or(UnixMillis(0), |opened| opened.scanned.id_high_water)
}
