// --- Page: live -------------------------------------------------------------------------------

const STOCK_SHOWN = 40;
const rates = []; // The orders a second of each group, the newest last.
const burn = new Map(); // The free units of each SKU, likewise.
const sums = []; // The answers since the start of each kind of TOTALS, likewise.
let last = null; // The poll before: {at, live}.

// A tile is [name, value, note, emphasis: none, "hint" or "alarm"].
function tiles(box, values) {
  values.forEach(([name, value, note, loud], i) => {
    const tile = box.children[i] || box.appendChild(el("div", { className: "tile" }, el("span"), el("b"), el("span")));
    say(tile.children[0], name);
    say(tile.children[1], value);
    say(tile.children[2], note);
    tile.classList.toggle("alarm", loud === "alarm");
    tile.classList.toggle("hint", loud === "hint");
  });
}

// The time within which a share of the batches between two polls was written.
function quantile(before, now, share) {
  const all = now.count - before.count;
  if (all <= 0) return null;
  for (let i = 0; i < now.within.length; i++) {
    const was = before.within[i] ? before.within[i].count : 0;
    if (now.within[i].count - was >= share * all) return now.within[i].le;
  }
  return Infinity;
}
const ms = (s) =>
  s === null ? "–" : s === Infinity ? "> 10 s" : s >= 1 ? "≤ " + s + " s" : "≤ " + +(s * 1000).toFixed(1) + " ms";

// Takes a poll in, on whichever page.
function record(at) {
  const seconds = last ? Math.max(0.2, (at - last.at) / 1000) : 1;
  const before = last ? last.live : live;
  // Counters of a restarted process begin at zero.
  const since = (a, b) => Math.max(0, (b || 0) - (a || 0)) / seconds;
  const outcome = (name) => since(before.orders[name], live.orders[name]);
  const groups = GROUPS.map(([, , outcomes]) => outcomes.reduce((sum, name) => sum + outcome(name), 0));
  groups.push(
    Object.keys(live.orders)
      .filter((name) => !GROUPED.has(name))
      .reduce((sum, name) => sum + outcome(name), 0),
  );
  if (last) {
    rates.push(groups);
    if (rates.length > KEEP) rates.shift();
  }
  for (const sku of live.skus) {
    const points = burn.get(sku.sku_id) || [];
    points.push(sku.free);
    if (points.length > KEEP) points.shift();
    burn.set(sku.sku_id, points);
  }
  sums.push(TOTALS.map(([, outcomes]) => outcomes.reduce((sum, name) => sum + (live.orders[name] || 0), 0)));
  if (sums.length > KEEP) sums.shift();
  const figures = { groups, since, before };
  last = { at, live };
  return figures;
}

function showLive({ groups, since, before }) {
  const all = groups.reduce((a, b) => a + b, 0);
  const rows = since(before.batches.rows, live.batches.rows);
  const batches = since(before.batches.count, live.batches.count);
  const retries = Object.values(live.batch_retries).reduce((a, b) => a + b, 0);
  tiles($("tiles"), [
    ["orders a second", rate(all), rate(groups[0] + groups[1]) + " placed or accepted"],
    [
      "queue",
      count(live.queue.depth),
      "of " + count(live.queue.capacity),
      live.queue.depth > live.queue.capacity / 2 && "alarm",
    ],
    ["in flight", count(live.orders_in_flight), many(live.connections, "connection")],
    ["rows a batch", batches ? rate(rows / batches) : "–", rate(rows) + " rows a second"],
    [
      "batch written, p99",
      ms(quantile(before.batches, live.batches, 0.99)),
      retries
        ? many(retries, "retry", "retries") + " since the start"
        : "half " + ms(quantile(before.batches, live.batches, 0.5)),
    ],
    [
      "dead letters",
      live.dead_letters_open > 9999 ? "> 9,999" : count(live.dead_letters_open),
      "open; " + count(live.dead_letters) + " since the start",
      live.dead_letters_open > 0 && "alarm",
    ],
  ]);
  const w = live.waitlist;
  const lists = live.skus.filter((sku) => sku.waiting);
  $("lists").hidden = !lists.length && !w.assigned && !w.expired;
  tiles($("waiting"), [
    ["orders wait", count(lists.reduce((sum, sku) => sum + sku.waiting, 0)), "for " + many(lists.length, "SKU")],
    [
      "assigned a second",
      rate(since(before.waitlist.assigned, w.assigned)),
      count(w.assigned) + " assigned, " + count(w.expired) + " expired since the start",
    ],
    ["the oldest waits for", lists.length ? age(w.oldest_seconds) : "–", ""],
    [
      "units kept for the next",
      w.overdue_seconds >= 1 ? age(w.overdue_seconds) : "–",
      w.overdue_seconds >= 1 ? "not assigned for so long" : "none longer than a second",
      w.overdue_seconds >= 10 && "alarm",
    ],
  ]);
  const p = live.payments;
  tiles($("money"), [
    ["paid their order", count(p.matched), rate(since(before.payments.matched, p.matched)) + " a second"],
    [
      "without an order",
      count(p.orphans),
      p.orphans ? "the oldest for " + age(p.orphan_oldest_seconds) : "none",
      overdue(p) && "hint",
    ],
    [
      "to be refunded",
      count(p.refunds_due),
      p.refunds_due ? "the oldest for " + age(p.refund_due_oldest_seconds) : "none",
      refundOverdue(p) && "hint",
    ],
    [
      "orders expired",
      count(p.orders_expired),
      rate(since(before.payments.orders_expired, p.orders_expired)) + " a second",
    ],
  ]);
  const shown = [...GROUPS, REST].map(([colour, name], i) => ({ colour, name, n: groups[i] }));
  // Only once there is such an outcome: one that this page does not know.
  if (!rates.some((groups) => groups[GROUPS.length] > 0)) shown.pop();
  keyed(
    $("legend"),
    shown,
    (group) => group.colour,
    ({ colour, name }) => {
      const box = el("i");
      box.style.background = "var(--" + colour + ")";
      return el("li", {}, box, name, el("b"));
    },
    (item, { n }) => say(item.lastChild, rate(n)),
  );
  drawChart($("chart"), rates);
  showTotals();
  showStock();
  $("live-sinks").hidden = !live.sinks.length;
  tiles(
    $("live-sinks-tiles"),
    live.sinks.map(({ name, state, reason, behind_ms: behind }) => [
      name,
      state,
      reason || (behind < 1000 ? "up to date" : "behind by " + age(behind / 1000)),
      isStopped({ state }) ? "alarm" : state === "refilling" && "hint",
    ]),
  );
}

// What the chart no longer shows.
function showTotals() {
  tiles(
    $("totals"),
    TOTALS.map(([name, , loud], i) => {
      const now = sums[sums.length - 1][i];
      // Counters of a restarted process begin at zero.
      const fresh = Math.max(0, now - sums[0][i]);
      return [name, count(now), "since the start; lately " + count(fresh), fresh > 0 && loud];
    }),
  );
}

function showStock() {
  const busiest = [...live.skus].sort((a, b) => b.held + b.sold - a.held - a.sold || (a.sku_id < b.sku_id ? -1 : 1));
  // One that the database has paused is never among those left out.
  busiest.sort((a, b) => Boolean(b.counters_refused) - Boolean(a.counters_refused));
  const shown = busiest.slice(0, STOCK_SHOWN);
  $("stock-note").replaceChildren(
    ...(live.skus.length === 0
      ? ["nothing is on sale: ", link("new-sku", "create a SKU")]
      : live.skus.length > STOCK_SHOWN
        ? ["the busiest " + STOCK_SHOWN + " of ", link("skus", count(live.skus.length) + " SKUs")]
        : ["free units burn down on the right"]),
  );
  keyed(
    $("stock"),
    shown,
    (sku) => sku.sku_id,
    (sku) =>
      el(
        "div",
        { className: "sku" },
        el("div", { className: "name" }, toSku(sku.sku_id), el("span", { className: "soft" }), el("span")),
        el("div", { className: "stock" }),
        el("canvas", { "aria-hidden": "true" }),
        el("div", { className: "acts" }, pauseButton(sku.sku_id)),
      ),
    (row, sku) => {
      const [name, stock, canvas, acts] = row.children;
      say(name.children[0], sku.title);
      say(name.children[1], sku.title === sku.sku_id ? "" : sku.sku_id + " ");
      name.children[2].replaceChildren(stateChip(sku));
      stock.replaceChildren(...units(sku));
      drawBurn(canvas, burn.get(sku.sku_id) || [], sku.total);
      showPauseButton(acts.firstChild, sku);
    },
  );
}

addEventListener("resize", () => {
  if (!$("live").hidden) drawChart($("chart"), rates);
});
