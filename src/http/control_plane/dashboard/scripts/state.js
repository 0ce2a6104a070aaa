// --- The state in a word ----------------------------------------------------------------------

// What is shown is what the last poll brought.
let live = null;
let checks = [];
let warnings = [];

// The order log does not take orders: the word, and what that means for whom.
const LOG_WORDS = {
  failed: ["Order log failed", "respond-async orders are refused until a restart; orders that wait go on."],
  full: ["Order log full", "respond-async orders are refused until there is room; orders that wait go on."],
  away: ["Broker away", "respond-async orders are refused until it is back; orders that wait go on."],
  no_lease: ["Order log on hold", "respond-async orders are refused until the database answers again."],
};

// The word, how bad it is, and the reasons: [word, "good" | "warn" | "bad", […]].
function headline() {
  if (!live) return ["No answer", "bad", ["The control plane does not answer; the figures below are the last ones."]];
  const failed = checks.filter((check) => !check.ok);
  const fails = (name) => failed.some((check) => check.name === name);
  const details = failed.map((check) => check.name + ": " + check.detail);
  const reasons = details.length || !live.reason ? details : [live.reason];
  const log = live.order_log && LOG_WORDS[live.order_log.state];
  switch (live.state) {
    case "poisoned":
      return ["Stopped by a fault", "bad", reasons];
    case "draining":
      return ["Shutting down", "warn", reasons];
    case "recovering":
      return ["Recovering", "warn", reasons];
  }
  if (live.state === "not_ready" && !(log && !failed.some((check) => check.name !== "journal"))) {
    if (fails("intake") || fails("recovery")) return ["Not ready", "bad", reasons];
    if (fails("database")) return ["Database away", "bad", reasons];
    if (fails("progress")) return ["Orders are not written", "bad", reasons];
    return ["Not ready", "bad", reasons];
  }
  if (live.paused)
    return [
      "Paused",
      "warn",
      ["Every sale is paused by an operator.", ...(log ? [log[0] + ": " + live.order_log.detail] : [])],
    ];
  if (log) return [log[0], "warn", [log[1], live.order_log.detail].filter(Boolean)];
  const isPart = live.skus.some((sku) => sku.counters_refused);
  return ["Taking orders", isPart ? "warn" : "good", []];
}

// Each by its name, under which the runbook has a heading.
function showWarnings() {
  keyed(
    $("warnings"),
    warnings.map((warning, i) => ({ key: i + warning.name, ...warning })),
    (warning) => warning.key,
    ({ name }) => el("li", {}, link(warningPage(name), name), " ", el("span")),
    (line, { detail }) => say(line.lastChild, detail + "."),
  );
}

// Orphans are counted every few seconds, so one that the last check has just decided may still be in the count.
const overdue = (p) => p.orphans > 0 && p.orphan_oldest_seconds > p.orphan_checks_seconds + 10;
// Some refunds are due in every sale; one that waits for longer than a day is an alert.
const refundOverdue = (p) => p.refunds_due > 0 && p.refund_due_oldest_seconds > 86400;

// Whether a sink gets no events just now.
const isStopped = ({ state }) => state === "failing" || state === "disabled";
// The page on which a warning is looked after.
const warningPage = (name) => (name.startsWith("events_") ? "events" : "checks");

// Events that sinks did not take for a day.
const lostEvents = () => live.sinks.reduce((sum, sink) => sum + sink.dead_letters, 0);

function showState() {
  const [word, is, reasons] = headline();
  $("state").dataset.is = is;
  say($("word"), word);
  document.title = word + (warnings.length ? ", " + many(warnings.length, "warning") : "") + " · Millrace";
  showWarnings();
  const why = reasons.map((text) => el("span", {}, text));
  if (live) {
    const refused = live.skus.filter((sku) => sku.counters_refused);
    for (const sku of refused)
      why.push(
        el(
          "span",
          {},
          toSku(sku.sku_id),
          " is paused by the database: " + many(sku.counters_refused.parked, "order is", "orders are") + " parked.",
        ),
      );
    if (!refused.length && live.orders_parked > 0)
      why.push(el("span", {}, many(live.orders_parked, "order is", "orders are") + " parked."));
    if (live.dead_letters_open > 0)
      why.push(
        link(
          "dead-letters",
          many(live.dead_letters_open, "dead letter") + (live.dead_letters_open === 1 ? " is open." : " are open."),
        ),
      );
    if (overdue(live.payments))
      why.push(link("payments/orphan", "Payments are without an order for longer than their checks take."));
    if (lostEvents() > 0)
      why.push(link("events/dead-letters", many(lostEvents(), "event was", "events were") + " not taken by a sink."));
    if (!why.length) why.push(el("span", {}, checks.map((check) => check.name + " " + check.detail).join(" · ")));
  }
  // A link that somebody is about to follow stays.
  if ($("why").textContent !== why.map((part) => part.textContent).join(""))
    $("why").replaceChildren(...why.map((part) => el("div", {}, part)));
  const off = !live || live.state === "recovering";
  $("pause-all").disabled = $("resume-all").disabled = off;
  $("pause-all").hidden = Boolean(live && live.paused);
  $("resume-all").hidden = !(live && live.paused);
  if (!live) return;
  badge(
    $("count-payments"),
    live.payments.orphans + live.payments.refunds_due,
    overdue(live.payments) || refundOverdue(live.payments),
  );
  badge($("count-letters"), live.dead_letters_open, true);
  badge($("count-events"), lostEvents() + live.sinks.filter(isStopped).length, true);
}

// The number of things that wait for an operator.
function badge(box, n, loud) {
  box.hidden = n === 0;
  say(box, n === 0 ? "" : n > 9999 ? "> 9,999" : count(n));
  box.classList.toggle("hint", Boolean(loud));
  box.title = "open";
}

$("pause-all").addEventListener("click", () =>
  ask({
    title: "Pause every sale?",
    danger: true,
    yes: "Pause everything",
    text: [
      "Every new order, of every SKU, is refused with 409 sale_paused from this moment on.",
      "Orders that are held stay, are written, can be paid and expire as usual. The pause survives restarts.",
    ],
    act: () => send("POST", "pause"),
    done: "Every sale is paused.",
    unsure: "The pause may or may not be in force: see the head of this page.",
  }),
);
$("resume-all").addEventListener("click", () =>
  ask({
    title: "Resume every sale?",
    yes: "Resume",
    text: [
      "New orders are taken again at once, within each sale's window. SKUs that were paused one by one stay paused.",
    ],
    act: () => send("POST", "resume"),
    done: "Sales are resumed.",
  }),
);
