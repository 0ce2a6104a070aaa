//! The bodies that operators send, on any bytes; the first byte chooses which. Nothing panics, a refusal is a `400` with
//! a code of the contract, and what is taken keeps its limits.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::http::problem::Problem;
use millrace::http::wire::{NoteBody, RestockBody, SkuBody, no_members, payments};
use millrace::order::SkuId;
use millrace::store::settlement::refunds::RefundNote;

fn refused(problem: &Problem) {
    assert_eq!(problem.status, 400);
    let codes = ["malformed_json", "unknown_field", "invalid_field"];
    assert!(codes.contains(&problem.code), "{}", problem.code);
}

/// Text that is stored: PostgreSQL takes no NUL.
fn text(text: &str, bytes_max: usize) {
    assert!(text.len() <= bytes_max && !text.contains('\0'));
}

fn sku(body: &[u8]) {
    let id = SkuId::new("A").expect("an id");
    match SkuBody::parse(&id, body) {
        Err(problem) => refused(&problem),
        Ok(SkuBody { terms, .. }) => {
            text(&terms.title, 200);
            assert!(terms.unit_price >= 0);
            assert!(terms.per_user_limit != Some(0));
            assert!(
                terms
                    .currency
                    .as_str()
                    .bytes()
                    .all(|byte| byte.is_ascii_uppercase())
            );
            for moment in [terms.opens_at, terms.closes_at].into_iter().flatten() {
                // What is answered can be sent again.
                let again = format!(
                    r#"{{"unit_price":1,"currency":"EUR","total":1,"opens_at":"{moment}"}}"#
                );
                let again = SkuBody::parse(&id, again.as_bytes()).expect("a time of ours");
                assert_eq!(again.terms.opens_at, Some(moment));
            }
            if let (Some(opens_at), Some(closes_at)) = (terms.opens_at, terms.closes_at) {
                assert!(opens_at < closes_at);
            }
        }
    }
}

fn note(note: Result<RefundNote, Problem>) {
    match note {
        Err(problem) => refused(&problem),
        Ok(note) => [note.note, note.reference]
            .iter()
            .flatten()
            .for_each(|one| text(one, 1_000)),
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, body)) = input.split_first() else {
        return;
    };
    match kind % 6 {
        0 => sku(body),
        1 => match RestockBody::parse(body) {
            Ok(body) => {
                assert!(body.quantity != 0 && body.quantity.unsigned_abs() <= u64::from(u32::MAX))
            }
            Err(problem) => refused(&problem),
        },
        2 => match NoteBody::parse(body) {
            Ok(body) => body.note.iter().for_each(|note| text(note, 1_000)),
            Err(problem) => refused(&problem),
        },
        3 => note(payments::RefundedBody::parse(body)),
        4 => note(payments::CloseBody::parse(body)),
        _ => {
            if let Err(problem) = no_members(body) {
                refused(&problem);
            }
        }
    }
});
