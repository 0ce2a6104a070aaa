//! The tables of `docs/STATES.md` have exactly the states and transitions of the code. Their last
//! column is written by hand: it is kept for each row and may not be empty.

use std::cell::Cell;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use millrace::order::payment::{OrderFacts, PaymentState, Verdict, judge};
use millrace::order::{Currency, OrderStatus};
use millrace::state::pending::{Settled, Slot, SlotState};

use super::{REMEDY, compare, root};

const PAGE: &str = "STATES.md";

/// The generated cells of a row.
type Row = Vec<String>;

// --- Orders and payments ----------------------------------------------------------------------

fn order_statuses() -> Vec<Row> {
    let cells = |status: OrderStatus| {
        let code = status.code().map_or("–".into(), |code| code.to_string());
        let units = match (status.holds_units(), status.is_live()) {
            (true, _) => "counted",
            (false, true) => "awaited",
            (false, false) => "free",
        };
        vec![format!("`{status}`"), code, units.to_owned()]
    };
    OrderStatus::ALL.map(cells).to_vec()
}

fn payment_states() -> Vec<Row> {
    let cells = |state: &PaymentState| vec![format!("`{state}`")];
    PaymentState::ALL.iter().map(cells).collect()
}

/// The pairs that a transition table allows.
fn pairs<S: Copy + Display>(all: &[S], may_become: fn(S, S) -> bool) -> Vec<Row> {
    let allowed = |from: S| {
        all.iter()
            .filter(move |to| may_become(from, **to))
            .map(move |to| vec![format!("`{from}`"), format!("`{to}`")])
    };
    all.iter().copied().flat_map(allowed).collect()
}

/// What each kind of payment does to an order of each status.
fn verdicts() -> Vec<Row> {
    let currency = |code| Currency::new(code).expect("a currency");
    let kinds = [
        ("fits", 100, currency("EUR")),
        ("another amount", 99, currency("EUR")),
        ("another currency", 100, currency("USD")),
    ];
    let mut rows = Vec::new();
    for status in OrderStatus::ALL {
        // The other two are never rows, so no payment meets them.
        if status.code().is_none() && status != OrderStatus::Failed {
            continue;
        }
        let facts = OrderFacts {
            status,
            amount: 100,
            currency: currency("EUR"),
            was_payable: status != OrderStatus::Waitlisted,
        };
        let outcomes = kinds.map(|(kind, amount, currency)| {
            let (payment, order) = match judge(&facts, amount, currency) {
                Verdict::Pay => ("`matched`".to_owned(), Some(OrderStatus::Paid)),
                Verdict::Refund { reason, order_too } => (
                    format!("`refund_due` (`{reason}`)"),
                    order_too.then_some(OrderStatus::RefundDue),
                ),
            };
            let order = order.map_or("unchanged".into(), |order| format!("`{order}`"));
            (kind, payment, order)
        });
        let same =
            |one: &&(&str, String, String)| (&one.1, &one.2) == (&outcomes[0].1, &outcomes[0].2);
        let is_any = outcomes.iter().filter(same).count() == outcomes.len();
        for (kind, payment, order) in outcomes.into_iter().take(if is_any { 1 } else { 3 }) {
            let kind = if is_any { "any" } else { kind };
            rows.push(vec![format!("`{status}`"), kind.into(), payment, order]);
        }
    }
    rows
}

// --- The slot ---------------------------------------------------------------------------------

const SLOT_STATES: [SlotState; 8] = [
    SlotState::Appending,
    SlotState::Waiting,
    SlotState::Claimed,
    SlotState::Abandoned,
    SlotState::Persisted,
    SlotState::Failed,
    SlotState::Unwritten,
    SlotState::OnDisk,
];

type Start = fn() -> Slot;
type Take = fn(&Slot);

/// Where a slot begins.
const STARTS: [Start; 3] = [
    || Slot::appending(None),
    || Slot::new(None),
    || Slot::recovered(1),
];

/// Every step that moves a slot. A step that its state does not allow panics or changes nothing.
const STEPS: [(&str, Take); 8] = [
    ("appended", |slot| slot.appended(1, true)),
    ("claim", |slot| {
        slot.claim();
    }),
    ("abandon", |slot| {
        slot.abandon();
    }),
    ("spill", |slot| {
        slot.spill();
    }),
    ("settle", |slot| slot.settle(Settled::Persisted)),
    ("settle", |slot| slot.settle(Settled::Failed)),
    ("settle", |slot| slot.settle(Settled::Unwritten)),
    ("settle", |slot| slot.settle(Settled::OnDisk)),
];

/// A transition, and whether the slot was recorded.
type Transition = (SlotState, &'static str, SlotState, bool);

thread_local! {
    /// Whether this thread takes steps that may panic.
    static EXPLORES: Cell<bool> = const { Cell::new(false) };
}

/// Takes a step. False: the slot's state does not allow it, which is no news for standard error.
fn is_taken(take: Take, slot: &Slot) -> bool {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !EXPLORES.get() {
                usual(panic);
            }
        }));
    });
    EXPLORES.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(|| take(slot)));
    EXPLORES.set(false);
    outcome.is_ok()
}

/// Takes every step in every state that can be reached: the states, and the transitions.
fn explore_slot() -> (Vec<(SlotState, bool)>, Vec<Transition>) {
    let (mut visited, mut transitions) = (Vec::new(), Vec::new());
    let mut open: Vec<(Start, Vec<Take>)> = STARTS
        .into_iter()
        .map(|start| (start, Vec::new()))
        .collect();
    while let Some((start, path)) = open.pop() {
        let arrive = || {
            let slot = start();
            path.iter().for_each(|take| take(&slot));
            slot
        };
        let (from, recorded) = (arrive().state(), arrive().is_recorded());
        if visited.contains(&(from, recorded)) {
            continue;
        }
        visited.push((from, recorded));
        for (name, take) in STEPS {
            let slot = arrive();
            if is_taken(take, &slot) && slot.state() != from {
                transitions.push((from, name, slot.state(), recorded));
                open.push((start, path.iter().copied().chain([take]).collect()));
            }
        }
    }
    (visited, transitions)
}

fn slot_states() -> Vec<Row> {
    let cells = |state: SlotState| {
        let last = if state.is_final() { "yes" } else { "no" };
        vec![format!("`{state:?}`"), last.to_owned()]
    };
    SLOT_STATES.map(cells).to_vec()
}

fn slot_transitions() -> Vec<Row> {
    let (visited, transitions) = explore_slot();
    let mut rows = Vec::new();
    for from in SLOT_STATES {
        let is_reached = |recorded| visited.contains(&(from, recorded));
        assert!(
            is_reached(true) || is_reached(false),
            "{from:?} is never reached"
        );
        for to in SLOT_STATES {
            let by = |recorded| {
                let mut found = transitions.iter();
                let found = found.find(|one| (one.0, one.2, one.3) == (from, to, recorded));
                found.map(|one| one.1)
            };
            let step = match (by(false), by(true)) {
                (None, None) => continue,
                (Some(step), None) if is_reached(true) => format!("`{step}`, unless recorded"),
                (None, Some(step)) if is_reached(false) => format!("`{step}`, if recorded"),
                (Some(step), _) | (_, Some(step)) => format!("`{step}`"),
            };
            rows.push(vec![format!("`{from:?}`"), format!("`{to:?}`"), step]);
        }
    }
    rows
}

// --- The page ---------------------------------------------------------------------------------

/// Puts `rows` between the marks of the table `name`, each with its hand-written cell of the page,
/// which is empty for a new row.
fn refresh(page: &str, name: &str, rows: &[Row], by_hand: bool) -> String {
    let (begins, ends) = (
        format!("<!-- {name} -->\n"),
        format!("<!-- end of {name} -->"),
    );
    let parts = page.split_once(&begins).and_then(|(before, rest)| {
        let (table, after) = rest.split_once(&ends)?;
        Some((before, table, after))
    });
    let (before, table, after) =
        parts.unwrap_or_else(|| panic!("docs/{PAGE} has no marks of `{name}`"));
    let (head, old): (Vec<&str>, Vec<&str>) = {
        let mut lines = table.lines();
        (lines.by_ref().take(2).collect(), lines.collect())
    };
    let written = |start: &str| {
        let rest = old.iter().find_map(|line| line.strip_prefix(start));
        rest.map_or("", |rest| rest.trim().trim_end_matches('|').trim())
            .to_owned()
    };
    let mut text = format!("{before}{begins}{}\n", head.join("\n"));
    for row in rows {
        let start = format!("| {} |", row.join(" | "));
        text += &match by_hand {
            true => format!("{start} {} |\n", written(&start)),
            false => format!("{start}\n"),
        };
    }
    text + &ends + after
}

#[test]
fn the_states_page_has_the_transition_tables_of_the_code() {
    let mut page = std::fs::read_to_string(root().join("docs").join(PAGE)).expect("read the page");
    let tables = [
        ("order statuses", order_statuses(), true),
        (
            "order transitions",
            pairs(&OrderStatus::ALL, OrderStatus::may_become),
            true,
        ),
        ("payment states", payment_states(), true),
        (
            "payment transitions",
            pairs(PaymentState::ALL, PaymentState::may_become),
            true,
        ),
        ("verdicts", verdicts(), false),
        ("slot states", slot_states(), true),
        ("slot transitions", slot_transitions(), true),
    ];
    for (name, rows, by_hand) in &tables {
        page = refresh(&page, name, rows, *by_hand);
    }
    compare(PAGE, &page);
    let blank = page.lines().find(|line| line.ends_with("|  |"));
    assert!(
        blank.is_none(),
        "docs/{PAGE}: write the last cell of `{}`, then {REMEDY}",
        blank.unwrap_or_default()
    );
}

#[test]
fn a_row_that_the_code_has_changed_is_written_anew_and_the_words_of_others_stay() {
    let page =
        "a\n<!-- t -->\n| s | w |\n|---|---|\n| `x` | kept |\n| `gone` | w |\n<!-- end of t -->\nb";
    let rows = ["`new`", "`x`"].map(|state| vec![state.to_owned()]);
    assert_eq!(
        refresh(page, "t", &rows, true),
        "a\n<!-- t -->\n| s | w |\n|---|---|\n| `new` |  |\n| `x` | kept |\n<!-- end of t -->\nb"
    );
}
