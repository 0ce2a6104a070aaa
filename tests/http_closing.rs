//! Connections that are closed right after an answer that had to wait for somebody else.

mod support;

use support::block_on;
use support::http::try_call;
use support::postgres::TestDatabase;
use support::server::TestServer;

/// Each look-up parks its coroutine, is woken by another thread at once, and its connection ends:
/// the coroutine may end inside the very call that was to park it, and must not take a thread of
/// the runtime with it.
#[test]
fn a_connection_that_ends_as_it_is_woken_takes_no_thread_with_it() {
    block_on(async {
        let database = TestDatabase::create().await;
        let server = TestServer::start(&database, |_| {}).await;
        let data = server.data;
        let callers = (0..4).map(|caller| {
            tokio::task::spawn_blocking(move || {
                for number in 1..2_000 {
                    let target = format!("/v1/orders/{caller}{number}1");
                    let answer = try_call(data, "GET", &target, &[], "");
                    // Order 0… is no order id at all; either way there is an answer.
                    let answer = answer.unwrap_or_else(|error| panic!("{target}: {error}"));
                    assert_eq!(answer.status, 404, "{answer:?}");
                }
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.expect("answers");
        }
        assert!(server.stop().await);
    });
}
