//! Nodes of several releases: what a node does of which another release has written the row, or migrated the schema.

use serde_json::json;

use crate::nodes::{Buyers, Cluster, assert_all_there};
use crate::support::block_on;
use crate::support::http::call;
use crate::{SKU, UNITS};

async fn execute(cluster: &Cluster, sql: &str) {
    let client = cluster.database.connect().await;
    client.batch_execute(sql).await.expect(sql);
}

#[test]
fn a_release_joins_no_nodes_whose_logs_it_cannot_read_or_that_cannot_read_its_own() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let one = cluster.start("one");
        let refused = |format: i16, by: &str| {
            let cluster = &cluster;
            let by = by.to_owned();
            async move {
                let sql = format!("UPDATE millrace.node SET reads_format = {format}");
                execute(cluster, &sql).await;
                let ended = match by.as_str() {
                    "alone" => cluster.try_start_alone("alone"),
                    name => cluster.try_start(name),
                };
                ended.err().expect("it must not start").log
            }
        };
        let log = refused(9, "two").await;
        let reason = "their logs may be in format 9, and this release reads none newer than 1";
        assert!(log.contains(reason), "{log}");
        let log = refused(0, "two").await;
        assert!(
            log.contains("node 0 reads no log newer than format 0"),
            "{log}"
        );
        // The one that runs goes on.
        one.served.put_sku(SKU, UNITS);
        let fields = [("Content-Type", "application/json")];
        let body = json!({ "user_id": "u", "sku_id": SKU }).to_string();
        let order = call(one.served.data, "POST", "/v1/orders", &fields, &body);
        assert_eq!(order.status, 201, "{order:?}");
        // Neither its own process nor one on its own reads what a later release has left.
        one.served.kill();
        for by in ["one", "alone"] {
            let log = refused(9, by).await;
            assert!(log.contains(reason), "{by}: {log}");
        }
        execute(&cluster, "UPDATE millrace.node SET reads_format = 1").await;
        let nodes = ["one", "two"].map(|name| cluster.start(name));
        Cluster::wait_for_lanes(&nodes.each_ref(), &[32, 32]).await;
        for node in nodes {
            node.stop();
        }
    });
}

#[test]
fn nodes_go_on_when_a_newer_release_adds_to_the_schema_and_no_older_one_starts_after_that() {
    block_on(async {
        let Some(cluster) = Cluster::open().await else {
            return;
        };
        let [one, two, three] = crate::three(&cluster).await;
        let all = [&one, &two, &three].map(|node| node.served.data);
        let buyers = Buyers::start(6, SKU, all.to_vec());
        buyers.wait_for(60).await;
        // As `millrace serve` of that release does it, while the nodes of this one run.
        let tables = [
            "orders",
            "sku",
            "node",
            "lane",
            "writer",
            "stock_share",
            "payments",
            "stock_log",
        ];
        for table in tables {
            let add = format!("ALTER TABLE millrace.{table} ADD COLUMN of_later text DEFAULT ''");
            execute(&cluster, &add).await;
        }
        let version = "CREATE TABLE millrace.of_later (id integer);
            INSERT INTO millrace.refinery_schema_history VALUES (999, 'of_later', '2030-01-01T00:00:00Z', '1')";
        execute(&cluster, version).await;
        buyers.wait_for(120).await;
        // One that starts again has to be of the newer release; until then the others have its lanes.
        let left = all[..2].to_vec();
        buyers.go_to(left);
        buyers.wait_for(20).await;
        three.stop();
        let refused = cluster.try_start("three").err().expect("it must not start");
        assert!(
            refused
                .log
                .contains("schema millrace is newer than this release"),
            "{}",
            refused.log
        );
        Cluster::wait_for_lanes(&[&one, &two], &[32, 32]).await;
        buyers.wait_for(60).await;
        let (placed, strange) = buyers.stop();
        assert!(strange.is_empty(), "{strange:?}");
        assert_all_there(&cluster.database, &placed).await;
        // Takeovers go on too.
        two.served.kill();
        Cluster::wait_for_lanes(&[&one], &[64]).await;
        let audit = call(one.served.control, "GET", "/admin/v1/audit", &[], "").json();
        assert_eq!(audit["ok"], true, "{audit:#}");
        one.stop();
    });
}
