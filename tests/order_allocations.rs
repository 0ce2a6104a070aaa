//! An order costs a small number of allocations, whatever becomes of it, and that number is known.
//! Alone in its process, to count.

mod support;

use std::time::{Duration, Instant};

use serde_json::json;
use support::allocations;
use support::http::Connection;
use support::postgres::TestDatabase;
use support::server::TestServer;
use tokio::runtime::{Builder, Runtime};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

/// Buyers at once, each on a connection of its own.
const CROWD: usize = 128;
/// Rounds of each case. The one with the fewest batches counts: it tells most of a single order.
const ROUNDS: usize = 10;
/// What a batch of many allocates beyond a batch of one: lists that grow to its length.
const LONGER_BATCH: usize = 6;
/// What a group of the journal allocates.
const GROUP: usize = 4;

const ON_SALE: &str = "on-sale";
const SOLD_OUT: &str = "sold-out";

/// How long buyers' names are: 8 digits, which are held inline, or 36 characters, which are not.
#[derive(Clone, Copy)]
enum Names {
    Number,
    Uuid,
}

impl Names {
    /// The `user_id` of a buyer, as JSON.
    fn json(self, buyer: usize) -> String {
        match self {
            Names::Number => format!("{}", 10_000_000 + buyer),
            Names::Uuid => format!("\"{}\"", uuid(buyer)),
        }
    }
}

fn uuid(number: usize) -> String {
    format!("5b0c6a5e-3f0b-4d5e-8f00-{number:012}")
}

struct Case {
    what: &'static str,
    names: Names,
    sku_id: &'static str,
    /// Members of the body behind the two ids.
    more: &'static str,
    prefer: Option<&'static str>,
    /// The same buyers come with the same keys each round.
    again: bool,
    status: u16,
    /// Allocations an order.
    most: usize,
}

const PLACED: Case = Case {
    what: "placed",
    names: Names::Number,
    sku_id: ON_SALE,
    more: "",
    prefer: None,
    again: false,
    status: 201,
    // The order itself.
    most: 1,
};

const PLACED_UUID: Case = Case {
    what: "placed, long names",
    names: Names::Uuid,
    // And the name, which the order and the buyer's record share.
    most: 2,
    ..PLACED
};

const CASES: [Case; 9] = [
    PLACED,
    PLACED_UUID,
    Case {
        what: "placed, with attributes",
        more: r#","quantity":2,"adjustment":-5,"attributes":{"address_id":"a-7"}"#,
        // And the attributes.
        most: 2,
        ..PLACED
    },
    Case {
        what: "accepted",
        prefer: Some("respond-async"),
        status: 202,
        ..PLACED
    },
    Case {
        what: "accepted, long names",
        prefer: Some("respond-async"),
        status: 202,
        ..PLACED_UUID
    },
    Case {
        what: "sold out",
        sku_id: SOLD_OUT,
        status: 409,
        most: 0,
        ..PLACED
    },
    Case {
        what: "sold out, long names",
        sku_id: SOLD_OUT,
        status: 409,
        // The name, which the refusal keeps.
        most: 1,
        ..PLACED_UUID
    },
    Case {
        what: "duplicate",
        again: true,
        status: 200,
        most: 0,
        ..PLACED
    },
    Case {
        what: "duplicate, long names",
        again: true,
        status: 200,
        // The name as it was read.
        most: 1,
        ..PLACED_UUID
    },
];

/// What a round of orders took.
#[derive(Clone, Copy, Debug)]
struct Round {
    allocations: usize,
    batches: usize,
    groups: usize,
}

struct Shop {
    runtime: Runtime,
    server: TestServer,
    control: Connection,
    crowd: Vec<Connection>,
    next_buyer: usize,
    _database: TestDatabase,
}

impl Shop {
    fn open() -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let (database, server) = runtime.block_on(async {
            let database = TestDatabase::create().await;
            // One worker: its batches grow with what comes while it writes.
            let server = TestServer::start(&database, |config| config.workers.count = 1).await;
            server.put_sku(ON_SALE, 1_000_000, json!({})).await;
            server.put_sku(SOLD_OUT, 0, json!({})).await;
            (database, server)
        });
        let open = |address| Connection::open(address).expect("a connection");
        Shop {
            control: open(server.control),
            crowd: (0..CROWD).map(|_| open(server.data)).collect(),
            next_buyer: 0,
            runtime,
            server,
            _database: database,
        }
    }

    /// Batches and groups so far.
    fn written(&mut self) -> (usize, usize) {
        let sent = self.control.send("GET", "/metrics", &[], "");
        let text = String::from_utf8(sent.expect("metrics").body).expect("text");
        let metric = |name: &str| {
            let mut values = text.lines().filter_map(|line| line.strip_prefix(name));
            let value = values.next().expect("it is counted");
            value.trim().parse::<usize>().expect("a whole number")
        };
        (
            metric("millrace_batches_total "),
            metric("millrace_journal_groups_total "),
        )
    }

    /// `orders` come at once; returns when all are answered and none is in flight.
    fn round(&mut self, case: &Case, orders: usize) -> Round {
        let (batches, groups) = self.written();
        let before = allocations::so_far();
        for (at, connection) in self.crowd.iter_mut().enumerate().take(orders) {
            let buyer = if case.again {
                at
            } else {
                self.next_buyer += 1;
                CROWD + self.next_buyer
            };
            let key = uuid(buyer);
            let mut fields = vec![
                ("Content-Type", "application/json"),
                ("Idempotency-Key", &key),
            ];
            fields.extend(case.prefer.map(|prefer| ("Prefer", prefer)));
            let body = format!(
                r#"{{"user_id":{},"sku_id":"{}"{}}}"#,
                case.names.json(buyer),
                case.sku_id,
                case.more
            );
            connection
                .begin("POST", "/v1/orders", &fields, &body)
                .expect("sent");
        }
        for connection in self.crowd.iter_mut().take(orders) {
            let answer = connection.answer().expect("an answer");
            // The first round of a duplicate places it.
            assert!(
                answer.status == case.status || case.again && answer.status == 201,
                "{}: {answer:?}",
                case.what
            );
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.server.millrace().state().pending.is_empty() {
            assert!(Instant::now() < deadline, "{}: still in flight", case.what);
            std::thread::yield_now();
        }
        let allocations = allocations::so_far() - before;
        let written = self.written();
        Round {
            allocations,
            batches: written.0 - batches,
            groups: written.1 - groups,
        }
    }
}

#[test]
fn an_order_allocates_little_whatever_becomes_of_it() {
    allocations::leave_out_this_thread();
    let mut shop = Shop::open();

    // An order alone is a batch of its own, which its allocations are then almost all of.
    let alone = (0..ROUNDS)
        .map(|_| shop.round(&PLACED, 1))
        .filter(|round| round.batches == 1)
        .map(|round| round.allocations)
        .min()
        .expect("an order alone in its batch");
    println!("a batch of one order: {alone}");

    let mut over = Vec::new();
    for case in &CASES {
        // Buffers get their sizes, and the coroutines their stacks.
        shop.round(case, CROWD);
        let shared = |round: &Round| round.batches * (alone + LONGER_BATCH) + round.groups * GROUP;
        // Half of an order's for what goes on beside it.
        let most = |round: &Round| CROWD * case.most + CROWD / 2 + shared(round);
        let best = (0..ROUNDS)
            .map(|_| shop.round(case, CROWD))
            .min_by_key(|round| round.allocations as i64 - most(round) as i64)
            .expect("some rounds");
        let most = most(&best);
        println!("{}: {best:?} for {CROWD} orders, {most} at most", case.what);
        if best.allocations > most {
            over.push(case.what);
        }
    }
    assert!(
        over.is_empty(),
        "more allocations than there should be: {over:?}"
    );
    assert!(shop.runtime.block_on(shop.server.stop()), "nothing is left");
}
