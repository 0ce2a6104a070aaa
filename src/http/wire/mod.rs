//! The JSON of both planes: bodies that are read and checked, views that are written.
//!
//! | module | content |
//! |---|---|
//! | [`json`] | the only way from JSON to a struct |
//! | [`orders`], [`order_history`], [`skus`], [`dead_letters`], [`payments`], [`events`] | bodies and views |
//! | `lanes`, `nodes` | the lanes and the nodes of a cluster |
//! | [`headers`], [`Preference`], [`query`] | header fields and query fields |
//! | [`mod@write`] | writing an answer |

pub mod dead_letters;
pub mod events;
pub mod headers;
pub mod json;
mod lanes;
mod nodes;
pub mod order_history;
pub mod orders;
pub mod payments;
mod preference;
pub mod query;
pub mod skus;
mod text;
mod time;
pub mod write;

pub use dead_letters::{DeadLetterView, NoteBody};
pub use headers::{idempotency_key, no_batch_key, parse_key, require_identity};
pub use json::no_members;
pub use lanes::{LaneView, LanesView};
pub use nodes::{NodeView, NodesView};
pub use orders::{ATTRIBUTES_BYTES_MAX, BatchLine, OrderBody, OrderList, OrderView, UndecidedView};
pub use preference::Preference;
pub use skus::{DrawBody, OperatorSkuView, PutSkuView, RestockBody, SkuBody, SkuView};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::SkuId;

    #[test]
    fn an_array_is_no_object_in_any_body() {
        let id = SkuId::new("A").unwrap();
        for (body, problem) in [
            (
                r#"["u","A",1,0,null,"k"]"#,
                BatchLine::parse(br#"["u","A",1,0,null,"k"]"#).err(),
            ),
            (
                r#"["t",1,"CNY",7]"#,
                SkuBody::parse(&id, br#"["t",1,"CNY",7]"#).err(),
            ),
            ("[5]", RestockBody::parse(b"[5]").err()),
            (r#"["n"]"#, NoteBody::parse(br#"["n"]"#).err()),
            (
                r#"["r","n",true]"#,
                payments::RefundedBody::parse(br#"["r","n",true]"#).err(),
            ),
            (
                r#"["n","r"]"#,
                payments::CloseBody::parse(br#"["n","r"]"#).err(),
            ),
        ] {
            let problem = problem.unwrap_or_else(|| panic!("taken: {body}"));
            assert_eq!((problem.status, problem.code), (400, "invalid_field"));
            assert!(problem.detail.contains("expected an object"), "{body}");
        }
    }
}
