//! `GET /admin/v1/profile`: a flamegraph of the running process.

use std::time::Duration;

use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use super::failure::Failure;
use crate::http::problem::Problem;
use crate::profile::{Profile, ProfileError};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProfileQuery {
    /// 1 to 60 seconds; default 10.
    #[serde(default = "seconds_default")]
    seconds: u64,
    /// Samples a second of processor time, 1 to 999; default 99, so as not to be in step with work that recurs
    /// every 10 ms.
    #[serde(default = "hz_default")]
    hz: u16,
    #[serde(default)]
    format: Format,
}

fn seconds_default() -> u64 {
    10
}

fn hz_default() -> u16 {
    99
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    /// A picture.
    #[default]
    Svg,
    /// Collapsed stacks, so that two profiles can be compared.
    Folded,
}

/// The rights of the picture: its own script zooms and searches, and reaches nothing of ours.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'";

/// Takes a profile. A client that goes away ends it, since this future is dropped with it.
pub(super) async fn take(
    query: Result<Query<ProfileQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let invalid = |detail: String| Problem::new(400, "invalid_field", detail);
    let Query(query) = query.map_err(|e| invalid(e.body_text()))?;
    let ProfileQuery {
        seconds,
        hz,
        format,
    } = query;
    if !(1..=60).contains(&seconds) {
        return Err(invalid("seconds: must be 1 to 60".to_owned()).into());
    }
    if !(1..=999).contains(&hz) {
        return Err(invalid("hz: must be 1 to 999".to_owned()).into());
    }
    let profile = blocking(move || Profile::start(hz)).await?;
    tracing::info!(seconds, hz, "taking a profile of this process");
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let body = blocking(move || {
        let stacks = profile.finish()?;
        let samples = stacks.samples();
        match format {
            Format::Svg => {
                stacks.flamegraph(&format!("{samples} samples at {hz} Hz in {seconds} s"))
            }
            Format::Folded => Ok(stacks.folded().into_bytes()),
        }
    })
    .await?;
    let media_type = match format {
        Format::Svg => "image/svg+xml",
        Format::Folded => "text/plain; charset=utf-8",
    };
    let fields = [
        (header::CONTENT_TYPE, media_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    Ok((fields, body).into_response())
}

/// Runs blocking work on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ProfileError> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Failure::from),
        Err(error) => {
            tracing::error!(%error, "a profile failed");
            Err(Problem::internal().into())
        }
    }
}
