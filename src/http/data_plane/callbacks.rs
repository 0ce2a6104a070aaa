//! `POST /v1/payments/{provider}/notify`: a payment platform says that money has come.
//!
//! Success is answered once the message and its effect are committed, and only then; anything
//! else makes the platform deliver again, which is harmless however often it does.

use std::time::{Duration, Instant};

use super::message::{Request, Response};
use super::payments::{CallbackError, PaymentProvider};
use super::service::DataPlane;
use crate::order::UnixMillis;
use crate::order::payment::Delivery;
use crate::pipeline::payments::callbacks::NotStored;

/// Longest time until a platform is told to come again: they give up after about five seconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

impl DataPlane {
    /// Verifies, stores, answers in the platform's own dialect.
    pub(super) fn take_callback(
        &self,
        request: &Request<'_>,
        response: &mut Response,
        provider: &dyn PaymentProvider,
    ) {
        // Before anything else: whether a payment came in time is judged by it.
        let (started, received_at) = (Instant::now(), self.callbacks.now());
        let outcome = provider
            .read(request, UnixMillis::now())
            .and_then(|notice| {
                let callbacks = self.callbacks.clone();
                let delivery = Delivery {
                    notice,
                    received_at,
                };
                let storing = async move { callbacks.take_in(delivery).await };
                match self.on_tokio(request, started + ANSWER_WITHIN, storing) {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(NotStored::Busy | NotStored::Stopped | NotStored::Store(_)))
                    | Err(_) => Err(CallbackError::NotStored),
                }
            });
        match outcome {
            Ok(()) => {
                self.metrics.payments.callbacks.count("stored");
                self.metrics
                    .payments
                    .callback_seconds
                    .observe(started.elapsed().as_secs_f64());
                provider.accept(response);
            }
            Err(error) => {
                self.metrics.payments.callbacks.count(outcome_of(&error));
                provider.refuse(response, &error);
            }
        }
    }
}

/// The value of the metric's label.
fn outcome_of(error: &CallbackError) -> &'static str {
    match error {
        CallbackError::BadSignature(_) | CallbackError::SignatureProbe => "bad_signature",
        CallbackError::Stale { .. } => "stale",
        CallbackError::NotForUs(_) => "not_ours",
        CallbackError::Malformed(_) | CallbackError::Unbookable(_) => "malformed",
        CallbackError::NotStored => "not_stored",
    }
}
