//! The generator against a server that answers by rule.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::test_server::{Rules, TestServer};
use super::*;

fn rules() -> Rules {
    Rules {
        stock: vec![("HOT", 100), ("COLD", 1000)],
        ..Rules::default()
    }
}

fn plan(server: &TestServer) -> LoadPlan {
    LoadPlan {
        rate: "1000".parse().unwrap(),
        duration_ms: None,
        requests_max: Some(600),
        one_order_per_buyer: true,
        buyers: 1_000_000,
        connections: 16,
        keep_outcomes: true,
        ..LoadPlan::new(server.url.clone())
    }
    .with_sku("HOT", 90.0)
    .with_sku("COLD", 10.0)
}

async fn load(plan: LoadPlan) -> LoadReport {
    run(plan, &mut Silent).await.unwrap()
}

fn assert_adds_up(report: &LoadReport) {
    let counted: u64 = report.answers.iter().map(|answer| answer.count).sum();
    assert_eq!(counted, report.offered);
    let in_series: u64 = report.series.answers.values().flatten().sum();
    assert_eq!(in_series, report.offered);
    assert_eq!(report.series.offered.iter().sum::<u64>(), report.offered);
    if let Some(outcomes) = &report.outcomes {
        assert_eq!(outcomes.len() as u64, report.offered);
    }
}

#[tokio::test]
async fn what_was_told_agrees_with_what_the_server_did() {
    let server = TestServer::start(rules()).await;
    let report = load(plan(&server)).await;
    assert_adds_up(&report);
    assert_eq!(report.offered, 600);
    assert_eq!(server.seen().len(), 600);
    assert_eq!(server.taken("HOT"), 100);
    assert_eq!(report.placed, 100 + server.taken("COLD"));
    assert_eq!(report.count(AnswerKind::SoldOut), report.codes["sold_out"]);
    let outcomes = report.outcomes.as_ref().unwrap();
    let mut ids = HashSet::new();
    for told in outcomes.iter().filter(|told| told.kind.is_placed()) {
        assert!(ids.insert(told.order_id.unwrap()));
        assert_eq!(told.code, "pending_payment");
    }
    let hot = &report.stock[0];
    assert_eq!(hot.samples.last().unwrap().free, 0);
    assert!(hot.sold_out_after_ms.is_some());
    assert!(report.stock[1].sold_out_after_ms.is_none());
}

#[tokio::test]
async fn a_click_that_decided_nothing_is_repeated_under_its_key() {
    let server = TestServer::start(Rules {
        refuses_first: true,
        ..rules()
    })
    .await;
    let report = load(LoadPlan {
        repeat_ms: 60_000,
        ..plan(&server)
    })
    .await;
    assert_adds_up(&report);
    assert_eq!((report.offered, report.repeated), (600, 600));
    let seen = server.seen();
    assert_eq!(seen.len(), 1_200);
    let bodies: HashSet<_> = seen.iter().map(|seen| (&seen.key, &seen.body)).collect();
    assert_eq!(bodies.len(), 600, "each twice, under one key");
    assert_eq!(report.count(AnswerKind::Unavailable), 0);
    assert_eq!(report.placed, 100 + server.taken("COLD"));
}

#[tokio::test]
async fn a_stall_shows_in_every_request_that_it_delayed() {
    let server = TestServer::start(Rules {
        stall: Some((300, Duration::from_millis(300))),
        ..rules()
    })
    .await;
    let report = load(LoadPlan {
        requests_max: Some(1000),
        connections: 4,
        ..plan(&server)
    })
    .await;
    // Only four requests met the stall in the server; those that fell due behind it, 100 within
    // its first 100 ms, waited 200 ms and more without having been sent.
    let waited = report.outcomes.as_ref().unwrap().iter();
    let waited = waited.filter(|told| told.latency_ns >= 200_000_000).count();
    assert!(waited >= 90, "{waited}");
    assert!(report.latency.all.p99_ms.unwrap() >= 200.0);
    assert!(report.send_lag.max_ms.unwrap() >= 200.0);
    assert!(report.series.p99_ms.iter().flatten().any(|&ms| ms >= 200.0));
}

#[tokio::test]
async fn a_double_click_is_the_same_request_again_and_places_one_order() {
    let server = TestServer::start(Rules {
        stock: vec![("HOT", 10_000), ("COLD", 10_000)],
        ..rules()
    })
    .await;
    let report = load(LoadPlan {
        double_click_share: 0.3,
        ..plan(&server)
    })
    .await;
    assert_adds_up(&report);
    let mut times: HashMap<_, u64> = HashMap::new();
    for seen in server.seen() {
        *times.entry((seen.key, seen.body)).or_default() += 1;
    }
    assert!(times.values().all(|&n| n <= 2));
    let twice = times.values().filter(|&&n| n == 2).count() as u64;
    assert!(twice > 0);
    assert_eq!(report.double_clicks, twice);
    assert_eq!(report.count(AnswerKind::Replayed), twice);
    assert_eq!(report.placed, times.len() as u64);
}

#[tokio::test]
async fn a_seed_decides_every_request_whatever_the_threads() {
    let server = TestServer::start(rules()).await;
    let requests = async |threads: usize, seed: u64| {
        let report = load(LoadPlan {
            threads: Some(threads),
            seed,
            double_click_share: 0.3,
            one_order_per_buyer: false,
            buyers: 500,
            rate: "step:5000".parse().unwrap(),
            ..plan(&server)
        })
        .await;
        let outcomes = report.outcomes.unwrap();
        let mut requests: Vec<_> = outcomes
            .iter()
            .map(|told| (told.scheduled_ns, told.user, told.key, told.sku.to_owned()))
            .collect();
        requests.sort();
        requests
    };
    let first = requests(1, 7).await;
    assert_eq!(first, requests(3, 7).await);
    assert_ne!(first, requests(1, 8).await);
}

#[tokio::test]
async fn a_file_of_orders_is_replayed_as_it_stands() {
    let server = TestServer::start(rules()).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let first = r#"{"user_id": "a",  "sku_id": "HOT", "attributes": {"b": 1, "a": 2}}"#;
    let second = r#"{"idempotency_key": "k1", "user_id": "b", "sku_id": "COLD"}"#;
    std::fs::write(file.path(), format!("{first}\n\n  {second}\r\n{second}")).unwrap();
    let report = load(LoadPlan {
        orders: Some(file.path().to_owned()),
        skus: Vec::new(),
        requests_max: None,
        connections: 1,
        mode: OrderMode::RespondAsync,
        ..plan(&server)
    })
    .await;
    let seen = server.seen();
    assert_eq!(seen.len(), 3);
    assert_eq!(
        (seen[0].key.as_deref(), &seen[0].body[..]),
        (None, first.as_bytes())
    );
    assert_eq!(seen[1].key.as_deref(), Some("k1"));
    assert_eq!(&seen[1].body[..], br#"{"sku_id":"COLD","user_id":"b"}"#);
    assert_eq!(seen[1], seen[2]);
    assert!(
        seen.iter()
            .all(|seen| seen.prefer.as_deref() == Some("respond-async"))
    );
    assert_eq!((report.placed, report.count(AnswerKind::Replayed)), (2, 1));
    let outcomes = report.outcomes.unwrap();
    let told = outcomes.iter().last().unwrap();
    assert_eq!((told.user.as_str(), told.sku), ("b", "COLD"));
}

#[tokio::test]
async fn a_bad_line_of_a_file_is_named() {
    let server = TestServer::start(rules()).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{\"user_id\": \"a\"}\nnonsense\n").unwrap();
    let plan = LoadPlan {
        orders: Some(file.path().to_owned()),
        ..plan(&server)
    };
    let error = run(plan, &mut Silent).await.unwrap_err().to_string();
    assert!(error.starts_with("line 2 of the orders file"), "{error}");
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn undecided_orders_are_asked_for_until_they_are_settled() {
    let server = TestServer::start(Rules {
        undecided_every: Some(10),
        ..rules()
    })
    .await;
    let report = load(LoadPlan {
        requests_max: Some(100),
        ..plan(&server)
    })
    .await;
    assert_adds_up(&report);
    let undecided = &report.undecided;
    assert_eq!(undecided.orders, report.count(AnswerKind::Undecided));
    assert_eq!((undecided.orders, undecided.unsettled), (10, 0));
    assert_eq!(undecided.settled["unknown_order"], 5);
    assert_eq!(undecided.settled["pending_payment"], 5);
    let outcomes = report.outcomes.unwrap();
    for told in outcomes.iter() {
        let expected = (told.kind == AnswerKind::Undecided).then(|| {
            if (told.order_id.unwrap() / 10).is_multiple_of(2) {
                "unknown_order"
            } else {
                "pending_payment"
            }
        });
        assert_eq!(told.final_status, expected);
    }
}

#[tokio::test]
async fn a_server_that_hangs_up_after_each_answer_costs_no_answer() {
    let server = TestServer::start(Rules {
        hang_up: true,
        ..rules()
    })
    .await;
    let report = load(plan(&server)).await;
    assert_eq!(report.answered, 600);
    assert_eq!(server.seen().len(), 600);
}

#[tokio::test]
async fn a_request_without_an_answer_is_given_up_and_holds_up_nobody() {
    let server = TestServer::start(Rules {
        ignored_user: Some("u-000010"),
        ..rules()
    })
    .await;
    let report = load(LoadPlan {
        requests_max: Some(100),
        connections: 2,
        request_timeout_ms: 2000,
        ..plan(&server)
    })
    .await;
    assert_adds_up(&report);
    assert_eq!((report.errors, report.codes["timeout"]), (1, 1));
    assert_eq!(report.answered, 99);
    assert!(report.latency.all.max_ms.unwrap() >= 2000.0);
}

#[tokio::test]
async fn a_stop_ends_the_load_with_a_report() {
    let server = TestServer::start(rules()).await;
    let plan = LoadPlan {
        requests_max: None,
        duration_ms: Some(3_600_000),
        ..plan(&server)
    };
    let stop = async {
        while server.seen().len() < 50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let report = run_until(plan, &mut Silent, stop).await.unwrap();
    assert!(report.interrupted);
    assert!(report.offered >= 50);
    assert_adds_up(&report);
}

#[tokio::test]
async fn a_load_that_cannot_begin_says_so_in_one_sentence() {
    let server = TestServer::start(Rules {
        token: Some("right"),
        ..rules()
    })
    .await;
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let with = |change: fn(&mut LoadPlan)| {
        let mut plan = plan(&server);
        change(&mut plan);
        plan
    };
    let unreachable = LoadPlan {
        target: closed,
        ..plan(&server)
    };
    for (plan, part) in [
        (unreachable, "cannot reach http://127.0.0.1:"),
        (with(|_| ()), "refused the bearer token"),
        (
            with(|p| p.token = Some(Token::new("wrong"))),
            "refused the bearer token",
        ),
        (
            with(|p| {
                p.token = Some(Token::new("right"));
                p.skus[0].sku_id = "GONE".to_owned();
            }),
            "does not know the SKU \"GONE\"",
        ),
    ] {
        let error = run(plan, &mut Silent).await.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert!(!error.contains('\n'));
    }
    let good = with(|p| p.token = Some(Token::new("right")));
    assert_eq!(load(good).await.answered, 600);
}

/// `LOADGEN_PAGES=DIR cargo test pages_and_tables` leaves the pages in DIR, for a look at
/// them in a browser.
#[tokio::test]
async fn pages_and_tables_can_be_made_of_much_and_of_little() {
    let server = TestServer::start(Rules {
        stock: vec![
            ("IPHONE-15", 3000),
            ("CASE-RED", 400),
            ("CHARGER", 600),
            ("LAST", 1),
        ],
        undecided_every: Some(401),
        stall: Some((9000, Duration::from_millis(350))),
        payment_secret: Some(WebhookSecret::of_key(&[1; 32])),
        ..rules()
    })
    .await;
    let full = std::env::var_os("LOADGEN_PAGES").is_some();
    let base = LoadPlan {
        skus: Vec::new(),
        double_click_share: 0.3,
        rate: "step:4000".parse().unwrap(),
        requests_max: (!full).then_some(400),
        duration_ms: Some(8000),
        ..plan(&server)
    };
    let much = load(
        LoadPlan {
            pay_share: 0.7,
            payment_secret: Some(WebhookSecret::of_key(&[1; 32])),
            ..base.clone()
        }
        .with_sku("IPHONE-15", 90.0)
        .with_sku("CASE-RED", 6.0)
        .with_sku("CHARGER", 4.0),
    )
    .await;
    let little = load(
        LoadPlan {
            requests_max: Some(1),
            user_prefix: "v-".to_owned(),
            ..base
        }
        .with_sku("LAST", 1.0),
    )
    .await;
    let check = |name: &str, ok: bool, detail: &str| Check {
        name: name.to_owned(),
        ok,
        detail: detail.to_owned(),
    };
    for (name, report, checks) in [
        (
            "much",
            &much,
            vec![
                check("Every unit sold", true, "4,000 units, 4,000 live orders"),
                check(
                    "None sold twice",
                    true,
                    "no order_id and no key occurs twice",
                ),
                check(
                    "Every answer true",
                    true,
                    "31,004 answers compared row by row",
                ),
                check("Nothing undecided", false, "2 orders could not be settled"),
            ],
        ),
        ("little", &little, Vec::new()),
    ] {
        let options = PageOptions {
            title: "A flash sale through Millrace".to_owned(),
            subtitle: Some("One hot SKU, many times more buyers than units".to_owned()),
            checks,
            ..PageOptions::default()
        };
        let page = render_page(report, &options);
        assert!(page.contains("application/json"));
        assert!(render_table(report).contains("201 placed"));
        let pays = report.payments.is_some();
        assert_eq!(render_table(report).contains("Money: "), pays);
        if let Some(folder) = std::env::var_os("LOADGEN_PAGES") {
            let folder = std::path::PathBuf::from(folder);
            std::fs::write(folder.join(format!("{name}.html")), page).unwrap();
            println!("{}", render_table(report));
        }
    }
}
