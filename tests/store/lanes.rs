//! From which order id on ids name the lanes of buyers.

use millrace::order::{Cutover, OrderId, UnixMillis};
use millrace::store::StoreError;
use millrace::store::postgres::{Database, NodeLease, lanes};
use millrace::store::schema;

use crate::support::postgres::TestDatabase;
use crate::support::sale::{SCHEMA, STEP, Sale, take_over};

fn id(ms: i64) -> OrderId {
    OrderId::floor_of(UnixMillis(1_800_000_000_000 + ms))
}

#[tokio::test]
async fn every_id_of_a_new_database_names_its_lane() {
    let sale = Sale::open(1).await;
    for first in [id(1), id(2)] {
        let cutover = lanes::note_cutover(&sale.database, sale.lease(), first).await;
        assert_eq!(cutover.unwrap(), Cutover(OrderId::MIN));
    }
}

#[tokio::test]
async fn ids_of_a_release_before_lanes_name_none_and_the_first_start_settles_that_for_good() {
    let test = TestDatabase::create().await;
    let database = Database::with_config(test.config(), SCHEMA, 2, STEP).unwrap();
    let mut client = database.connect("test").await.unwrap();
    let all = schema::print(SCHEMA);
    let lanes_at = all.find("__lanes").unwrap();
    let before_lanes = &all[..all[..lanes_at].rfind("\n-- V").unwrap()];
    client
        .batch_execute(&format!(
            "{before_lanes}\nINSERT INTO node (node, epoch, ids_leased_until_ms, started_at) VALUES (0, 7, 0, now());
             COMMIT"
        ))
        .await
        .unwrap();
    schema::migrate(&mut client, SCHEMA).await.unwrap();
    let taken = take_over(&database, 1).await.unwrap();
    for first in [id(5), id(9)] {
        let cutover = lanes::note_cutover(&database, taken.lease, first).await;
        assert_eq!(cutover.unwrap(), Cutover(id(5)));
    }
    let replaced = NodeLease {
        epoch: taken.lease.epoch - 1,
        ..taken.lease
    };
    let refused = lanes::note_cutover(&database, replaced, id(1)).await;
    assert!(
        matches!(refused, Err(StoreError::Fenced { .. })),
        "{refused:?}"
    );
}
