//! `POST /v1/payments/{provider}/notify`: the callback of a payment platform.
//!
//! Success is answered only after the message and its effect are committed. Any other answer makes
//! the platform deliver again, which is harmless however often it happens.

use std::time::{Duration, Instant};

use super::providers::{CallbackError, PaymentProvider};
use crate::http::data_plane::context::Context;
use crate::http::data_plane::nodes;
use crate::http::message::{Request, Response};
use crate::http::peers::Hint;
use crate::order::UnixMillis;
use crate::order::payment::{Delivery, Payment};
use crate::pipeline::payments::callbacks::NotStored;
use crate::spans;

/// Longest time until a platform is told to deliver again. Platforms time out after about five
/// seconds.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// Verifies a callback, stores it, and answers in the platform's own dialect.
pub(in crate::http::data_plane) fn notify(
    context: &Context,
    request: &Request<'_>,
    response: &mut Response,
    provider: &dyn PaymentProvider,
) {
    // Read first: it decides whether the payment came in time.
    let (started, received_at) = (Instant::now(), context.callbacks.now());
    let outcome = provider
        .read(request, UnixMillis::now())
        .and_then(|notice| {
            let callbacks = context.callbacks.clone();
            let delivery = Delivery {
                notice,
                received_at,
            };
            let kind = match delivery.notice.payment {
                None => Some(delivery.notice.kind.clone()),
                Some(_) => None,
            };
            let order_id = delivery.notice.payment.as_ref().and_then(Payment::order_id);
            let nodes = context.nodes.as_ref();
            if let Some(id) = order_id {
                // It does not let the order expire meanwhile.
                let arrives = Hint::PaymentArrives(id, delivery.paid_at());
                nodes::tell_owner(nodes, id, &arrives);
            }
            // The next owner of the lane would not know of a payment that is not stored yet.
            let _held = order_id.map(|id| nodes::hold(nodes, id));
            let storing = async move { callbacks.ingest(delivery).await };
            let read_at = request.trace.map(|trace| (trace, Instant::now()));
            let stored = context.on_tokio(request, started + ANSWER_WITHIN, storing);
            if let Some((trace, read_at)) = read_at {
                let order = order_id.map(spans::order_id);
                trace.child("store payment", read_at, order.into_iter().collect());
            }
            match stored {
                Ok(Ok(())) => {
                    if let Some(id) = order_id {
                        nodes::tell_owner(nodes, id, &Hint::Payment(id));
                    }
                    Ok(kind)
                }
                Ok(Err(NotStored::Busy | NotStored::Stopped | NotStored::Store(_))) | Err(_) => {
                    Err(CallbackError::NotStored)
                }
            }
        });
    match outcome {
        Ok(kind) => {
            if let Some(kind) = kind {
                tracing::info!(
                    provider = %provider.provider(), kind,
                    "a callback that reports no payment was stored"
                );
            }
            context.metrics.payments.callbacks.count("stored");
            context
                .metrics
                .payments
                .callback_seconds
                .observe(started.elapsed().as_secs_f64());
            provider.accept(response);
        }
        Err(error) => {
            context.metrics.payments.callbacks.count(outcome_of(&error));
            provider.refuse(response, &error);
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
