//! Units of a SKU at several nodes: wants that nobody has any more, totals that are lowered at two nodes.

use millrace::order::{SkuId, SkuNumber, UnixMillis};
use millrace::store::cluster::recall::{self, Lowered, Lowering};
use millrace::store::cluster::shares::{self, Supply};
use millrace::store::cluster::takeover::{self, Suspect};
use millrace::store::cluster::{lanes, membership};
use millrace::store::postgres::skus;

use crate::lending::{Node, assert_sound};
use crate::twin::Bed;

const SKU: SkuNumber = SkuNumber(1);

#[tokio::test]
async fn a_want_that_was_withdrawn_is_no_reason_to_say_sold_out() {
    let bed = Bed::open().await;
    bed.skus(&[1]).await;
    let (own, other) = (bed.join(1).await, bed.join(2).await);
    shares::lend(&bed.database, other, SKU, 1, 1).await.unwrap();
    bed.settle(other, 1, 1, 0).await.unwrap();
    shares::lend(&bed.database, own, SKU, 1, 1).await.unwrap();
    let want = shares::wants(&bed.database).await.unwrap()[0];
    shares::answer(&bed.database, other, &want, 0, 1)
        .await
        .unwrap();
    let supply = || shares::supply(&bed.database, &want, false);
    assert_eq!(supply().await.unwrap(), Some(Supply::None));
    shares::withdraw(&bed.database, own, SKU).await.unwrap();
    // Its order is cancelled, and it has no want to answer any more.
    bed.settle(other, 1, -1, 0).await.unwrap();
    assert_eq!(supply().await.unwrap(), None);
}

#[tokio::test]
async fn what_a_dead_node_has_answered_counts_no_longer() {
    let bed = Bed::open().await;
    bed.skus(&[1]).await;
    let (own, dead, taker) = (bed.join(1).await, bed.join(2).await, bed.join(3).await);
    lanes::claim_free(&bed.database, dead).await.unwrap();
    shares::lend(&bed.database, dead, SKU, 1, 1).await.unwrap();
    shares::lend(&bed.database, own, SKU, 1, 1).await.unwrap();
    let want = shares::wants(&bed.database).await.unwrap()[0];
    // An order in its memory has the unit, and is gone with it.
    shares::answer(&bed.database, dead, &want, 0, 1)
        .await
        .unwrap();
    let nodes = membership::nodes(&bed.database).await.unwrap();
    let suspect = Suspect {
        node: dead.node,
        epoch: dead.epoch,
        renewals: nodes[usize::try_from(dead.node).unwrap()].renewals,
    };
    let mut session = bed.database.connect("test").await.unwrap();
    let fenced = takeover::fence(&bed.database, &mut session, taker, suspect).await;
    assert!(fenced.unwrap().is_some());
    let supply = shares::supply(&bed.database, &want, false).await.unwrap();
    assert_eq!(supply, Some(Supply::Unanswered));
}

#[tokio::test]
async fn a_node_that_leaves_wants_nothing_any_more() {
    let bed = Bed::open().await;
    bed.skus(&[1]).await;
    let (leaving, staying) = (bed.join(1).await, bed.join(2).await);
    shares::lend(&bed.database, staying, SKU, 1, 1)
        .await
        .unwrap();
    let lent = shares::lend(&bed.database, leaving, SKU, 1, 1)
        .await
        .unwrap();
    assert!(lent.want.is_some());
    let left = membership::leave(&bed.database, leaving, UnixMillis(0)).await;
    assert!(left.unwrap());
    shares::give_back(&bed.database, staying, SKU, 1)
        .await
        .unwrap();
    let lent = shares::lend(&bed.database, staying, SKU, 1, 1)
        .await
        .unwrap();
    assert_eq!(lent.units, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_total_whose_lowering_nobody_ends_is_lent_again() {
    let bed = Bed::open().await;
    bed.logged_skus(&[10]).await;
    let nodes = [Node::start(&bed, 1).await, Node::start(&bed, 2).await];
    // The first step of a process that is gone after it.
    bed.sql("UPDATE sku SET recall = 7").await;
    assert!(
        nodes[1].buy(10).await.is_some(),
        "all of them are lent to it"
    );
    assert_sound(&bed, &nodes).await;
}

#[tokio::test]
async fn a_total_that_is_raised_while_it_is_lowered_by_some_units_has_both() {
    let bed = Bed::open().await;
    bed.logged_skus(&[100]).await;
    let (own, other) = (bed.join(1).await, bed.join(2).await);
    shares::lend(&bed.database, other, SKU, 95, 1)
        .await
        .unwrap();
    let lower = || {
        let lowering = Lowering::By(10);
        recall::lower_total(&bed.database, own, SKU, lowering, "restock", Some("x"))
    };
    assert_eq!(lower().await.unwrap(), Lowered::Waiting);
    let id = SkuId::new("S0").unwrap();
    let raised = skus::restock(&bed.database, other, &id, 20, Some("y")).await;
    raised.unwrap();
    assert_eq!(lower().await.unwrap(), Lowered::Done);
    assert_eq!(bed.number("SELECT total FROM sku").await, 110);
}
