//! Errors of the control plane as answers.

use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::http::problem::{MEDIA_TYPE, Problem};
use crate::pipeline::admin::operator::OperatorError;
use crate::pipeline::orders::lookup::LookupError;
use crate::profile::ProfileError;
use crate::store::StoreError;

/// A problem as an answer.
#[derive(Debug)]
pub(super) struct Failure(pub(super) Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Failure(problem)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let detail = error.to_string();
        if matches!(error, StoreError::AuditRunning) {
            return Failure(Problem::new(409, "audit_running", detail));
        }
        if matches!(error, StoreError::PreflightRunning) {
            return Failure(Problem::new(409, "preflight_running", detail));
        }
        if error.is_transient() {
            tracing::warn!(reason = %detail, "an operator's request failed");
            return Failure(Problem::new(503, "not_ready", detail).retry_after(1));
        }
        tracing::error!(reason = %detail, "an operator's request failed");
        Failure(Problem::new(500, "internal", detail))
    }
}

impl From<OperatorError> for Failure {
    fn from(error: OperatorError) -> Self {
        let detail = error.to_string();
        Failure(match error {
            OperatorError::UnknownSku(_) => Problem::new(404, "unknown_sku", detail),
            OperatorError::UnknownDeadLetter(_) => Problem::new(404, "unknown_dead_letter", detail),
            OperatorError::TotalBelowCommitted(_) => {
                Problem::new(409, "total_below_committed", detail)
            }
            OperatorError::DrawFixed { .. } | OperatorError::BeaconFixed(_) => {
                Problem::new(409, "draw_fixed", detail)
            }
            OperatorError::AllocationFixed => Problem::new(409, "allocation_fixed", detail),
            OperatorError::NoDraw(_) => Problem::new(404, "no_draw", detail),
            OperatorError::NoBeaconWanted => Problem::new(409, "no_beacon", detail),
            OperatorError::EntriesNotFixed => Problem::new(409, "entries_not_fixed", detail),
            OperatorError::TotalOutOfRange => Problem::new(400, "invalid_field", detail),
            OperatorError::KeyReused { .. } => Problem::new(422, "idempotency_key_reused", detail),
            OperatorError::SoldOut { available } => Problem {
                available: Some(available),
                ..Problem::new(409, "sold_out", detail)
            },
            OperatorError::StockElsewhere | OperatorError::LaneMoves | OperatorError::UnitsOut => {
                Problem::new(503, "not_ready", detail).retry_after(1)
            }
            OperatorError::RefusedAgain(_) => Problem::new(409, "refused_again", detail),
            OperatorError::CountersRefused { .. } => Problem::new(409, "counters_refused", detail),
            OperatorError::PauseNotStored { .. } | OperatorError::ResumeNotStored { .. } => {
                tracing::warn!(reason = %detail, "a pause or resume is not stored");
                Problem::new(503, "not_stored", detail).retry_after(1)
            }
            OperatorError::Store(error) => return error.into(),
        })
    }
}

impl From<LookupError> for Failure {
    fn from(error: LookupError) -> Self {
        match error {
            LookupError::Store(error) => error.into(),
            LookupError::Log(_) => {
                tracing::error!(reason = %error, "an operator's request failed");
                Failure(Problem::new(500, "internal", error.to_string()))
            }
        }
    }
}

impl From<ProfileError> for Failure {
    fn from(error: ProfileError) -> Self {
        let detail = error.to_string();
        Failure(match error {
            ProfileError::Running => Problem::new(409, "profile_running", detail),
            ProfileError::Unsupported => Problem::new(501, "profile_unsupported", detail),
            ProfileError::Failed(_) => {
                tracing::error!(reason = %detail, "a profile failed");
                Problem::new(500, "profile_failed", detail)
            }
        })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after = self
            .0
            .retry_after
            .map(|s| (header::RETRY_AFTER, s.to_string()));
        let challenge: Option<(HeaderName, String)> =
            (self.0.status == 401).then(|| (header::WWW_AUTHENTICATE, "Bearer".to_owned()));
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, MEDIA_TYPE)], body).into_response();
        for (name, value) in retry_after.into_iter().chain(challenge) {
            if let Ok(value) = value.parse() {
                response.headers_mut().insert(name, value);
            }
        }
        response
    }
}
