//! The numbers of transitions, as the migration keeps them.

use crate::support::block_on;
use crate::support::postgres::TestDatabase;
use crate::support::server::TestServer;
use crate::support::webhook::{Paid, SECRET};

#[test]
fn a_transition_is_numbered_whatever_statement_makes_it() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |config| {
            config.payments.standard.secret.0 = vec![SECRET.to_owned()];
        })
        .await;
        server.put_sku("A", 5, serde_json::Value::Null).await;
        let order = server.order("u", "A", None).await.json();
        let client = database.connect().await;
        let number = async || {
            let sql = "SELECT transition, previous_status FROM millrace.orders";
            let row = client.query_one(sql, &[]).await.expect("the order");
            (row.get::<_, Option<i16>>(0), row.get::<_, Option<i16>>(1))
        };
        assert_eq!(number().await, (None, None), "the first costs no byte");
        assert_eq!(Paid::of(&order).deliver(server.data).await.status, 200);
        assert_eq!(number().await, (Some(2), Some(1)));
        // As a process of the release before would do it.
        for (status, numbered) in [(6, (Some(3), Some(2))), (6, (Some(3), Some(2)))] {
            let sql = format!("UPDATE millrace.orders SET status = {status}");
            client.execute(&sql, &[]).await.expect("an update");
            assert_eq!(number().await, numbered);
        }
        let sql = "UPDATE millrace.payments SET state = 'refunded' RETURNING transition";
        let row = client.query_one(sql, &[]).await.expect("the payment");
        assert_eq!(row.get::<_, Option<i16>>(0), Some(2));
        assert!(server.stop().await);
    });
}
