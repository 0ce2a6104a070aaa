//! `POST /admin/v1/preflight`: whether database and order log will hold a sale, and the warning of `readyz` if
//! nobody has asked.

use std::time::Duration;

use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};

use super::failure::Failure;
use super::{ControlPlane, Parts};
use crate::http::problem::Problem;
use crate::http::wire::query;
use crate::order::UnixMillis;
use crate::pipeline::admin::preflight::Sale;

/// A sale that opens within this time should have had a preflight, in milliseconds.
const SOON_MS: u64 = 3_600_000;
/// An older preflight counts as none.
const FRESH: Duration = Duration::from_secs(86_400);

/// Makes a preflight, and prepares for the sale if `prepare=true`.
pub(super) async fn make(
    State(plane): State<ControlPlane>,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let query = query.unwrap_or_default();
    let sale = Sale {
        orders: number(&query, "orders")?,
        rate: number(&query, "rate")?,
    };
    let prepares = match query::value(&query, "prepare") {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => {
            let detail = "prepare: must be true or false";
            return Err(Problem::new(400, "invalid_field", detail).into());
        }
    };
    let report = plane.parts()?.preflighter.make(sale, prepares).await?;
    Ok(axum::Json(report).into_response())
}

fn number(query: &str, name: &str) -> Result<Option<u64>, Problem> {
    let number = query::number(query, name)?;
    if number.is_none_or(|number| Sale::NUMBERS.contains(&number)) {
        return Ok(number);
    }
    let (least, most) = Sale::NUMBERS.into_inner();
    let detail = format!("{name}: must be a whole number, {least} to {most}");
    Err(Problem::new(400, "invalid_field", detail))
}

/// The warning that a sale opens soon and the last preflight is missing, old or bad.
pub(super) fn warning(parts: &Parts) -> Option<(&'static str, String)> {
    let now = UnixMillis::now();
    let skus = parts.state.catalogue.all();
    let opens = skus.iter().filter_map(|sku| sku.terms().opens_at);
    let opens = opens.filter(|at| *at > now && *at <= now.plus_ms(SOON_MS));
    let opens_at = opens.min()?;
    let last = parts.preflighter.last();
    let last = last.as_ref().map(|last| (last.at.elapsed(), &*last.bad));
    let found = fault(last)?;
    let detail = format!("a sale opens at {opens_at}, and {found} millrace preflight");
    Some(("preflight", detail))
}

/// What is wrong with the last preflight, of this age and with these bad checks.
fn fault(last: Option<(Duration, &[&'static str])>) -> Option<String> {
    match last {
        Some((age, bad)) if age < FRESH => {
            let (minutes, names) = (age.as_secs() / 60, bad.join(", "));
            let found = format!(
                "the preflight {minutes} minutes ago found bad: {names}; mend it and repeat"
            );
            (!bad.is_empty()).then_some(found)
        }
        _ => Some("there was no preflight in the last 24 hours; run".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_an_old_and_a_bad_preflight_are_worth_a_warning() {
        let hour = Duration::from_secs(3_600);
        assert_eq!(fault(Some((hour, &[]))), None);
        let bad = fault(Some((hour, &["commit"]))).expect("a fault");
        assert!(
            bad.contains("60 minutes ago") && bad.contains("commit"),
            "{bad}"
        );
        let old = fault(Some((24 * hour, &[])));
        assert!(old.is_some_and(|old| old.contains("no preflight")));
        assert!(fault(None).is_some());
    }
}
