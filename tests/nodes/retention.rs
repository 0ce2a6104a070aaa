//! Of several nodes one deletes old rows.

use std::time::{Duration, Instant};

use millrace::order::{OrderId, SkuNumber, UnixMillis};
use millrace::store::cluster::shares;
use millrace::store::cluster::takeover::{self, LogEnd, Suspect};
use millrace::store::postgres::pruning::{Part, PrunedPart, Pruner};

use crate::twin::Bed;

#[tokio::test]
async fn one_node_deletes_old_rows_and_another_one_goes_on_when_it_is_gone() {
    let bed = Bed::open().await;
    bed.skus(&[100]).await;
    let [one, two] = [bed.join(1).await, bed.join(2).await];
    shares::lend(&bed.database, one, SkuNumber(1), 30, 1)
        .await
        .unwrap();
    bed.sql(
        "INSERT INTO orders (order_id, user_id, sku, quantity, adjustment, amount, currency, status, created_at, expires_at,
                             payload_hash)
         SELECT n, 'u', 1, 1, 0, 1, 'EUR', 3, now(), now(), 0 FROM generate_series(1, 6) n",
    )
    .await;
    let delete = async |pruner: &mut Pruner| {
        let part = Part::Orders {
            after: 0,
            below: OrderId::MAX,
            ended: UnixMillis::now(),
        };
        pruner.part(part, 3).await.unwrap()
    };
    let mut first = Pruner::connect(&bed.database, one).await.unwrap();
    let mut second = Pruner::connect(&bed.database, two).await.unwrap();
    assert!(first.is_chosen().await.unwrap());
    assert!(!second.is_chosen().await.unwrap());
    let three = PrunedPart::Done {
        rows: 3,
        next: Some(3),
    };
    assert_eq!(delete(&mut first).await, three);

    // It ends in the middle; the server sees that in a moment.
    drop(first);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !second.is_chosen().await.unwrap() {
        assert!(Instant::now() < deadline, "nobody deletes");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(
        delete(&mut second).await,
        PrunedPart::Done {
            rows: 3,
            next: Some(6)
        }
    );
    assert_eq!(bed.number("SELECT orders FROM orders_checkpoint").await, 6);
}

#[tokio::test]
async fn nobody_deletes_while_the_log_of_a_dead_node_waits_for_its_replay() {
    let bed = Bed::open().await;
    let [one, two] = [bed.join(1).await, bed.join(2).await];
    let suspect = Suspect {
        node: one.node,
        epoch: one.epoch,
        renewals: bed.number("SELECT renewals FROM node WHERE node = 0").await,
    };
    let mut session = bed.database.connect("test").await.unwrap();
    let fenced = takeover::fence(&bed.database, &mut session, two, suspect)
        .await
        .unwrap();
    let dead = fenced.unwrap().dead;
    assert_eq!(dead.len(), 1);
    let pruner = Pruner::connect(&bed.database, two).await.unwrap();
    assert!(!pruner.is_chosen().await.unwrap());
    takeover::finish(&bed.database, two, dead[0].lease, LogEnd::default())
        .await
        .unwrap();
    assert!(pruner.is_chosen().await.unwrap());
}
