// --- What is known of an order -----------------------------------------------------------------

const ORDER_STATES = {
  accepted: ["accepted, not a row yet", "warn"],
  undecided: ["being written", "warn"],
  waitlisted: ["waits for units", "warn"],
  pending_payment: ["waits for payment", ""],
  paid: ["paid", "good"],
  cancelled: ["cancelled", ""],
  expired: ["expired", ""],
  failed: ["failed", "bad"],
  refund_due: ["refund due", "bad"],
  refunded: ["refunded", ""],
};
const orderChip = (status) => chip(...(ORDER_STATES[status] || [words(status), ""]));
const PLACES = {
  in_flight: "in memory, on its way to the database",
  order_log: "in the order log, on its way to the database",
  database: "in the database",
};

// Everything that is known of an order: the facts, what happened in its sequence, and what can be done.
function orderHistory(id, history) {
  const { order, payments, dead_letter: letter } = history;
  const again = () => {
    if (lookedFor === id) openOrders(id);
  };
  const due = dueOf(history);
  const acts = el("div", { className: "acts" });
  if (due.length && order)
    acts.append(button("Record the refund…", () => recordRefund(id, again), { className: "go" }));
  if (order && order.status === "paid" && !due.length)
    acts.append(button("Give the sale up…", () => recordRefund(id, again)));
  const attributes = order && order.attributes;
  const head = el(
    "section",
    {},
    el(
      "div",
      { className: "head" },
      el("h3", {}, "Order " + id + " ", order ? orderChip(order.status) : chip("not there", "bad")),
      acts,
    ),
    order
      ? facts([
          ["Buyer", toOrder(order.user_id)],
          ["SKU", toSku(order.sku_id)],
          ["Units", count(order.quantity)],
          ["Amount", money(order.amount, order.currency)],
          ["Adjustment", order.adjustment ? money(order.adjustment, order.currency) : null],
          ["Refund reason", order.refund_reason && words(order.refund_reason)],
          ["Placed", moment(order.created_at)],
          ["Payable until", moment(order.expires_at)],
          ["Where it is", PLACES[history.place] || words(history.place || "")],
        ])
      : el("p", { className: "note" }, "There is no such order, but payments name it."),
    order &&
      order.refund_reason &&
      order.status === "refund_due" &&
      el("p", { className: "what" }, REFUND_REASONS[order.refund_reason] || ""),
    attributes &&
      el("details", {}, el("summary", {}, "Attributes"), el("pre", {}, JSON.stringify(attributes, null, 2))),
    order && order.receipt && el("details", {}, el("summary", {}, "Receipt"), el("pre", {}, order.receipt)),
  );
  const parts = [
    head,
    el("section", {}, el("h3", {}, "What happened"), el("ol", { className: "story" }, storyOf(history))),
  ];
  if (payments.length)
    parts.push(
      el(
        "section",
        {},
        el("h3", {}, "Payments"),
        el(
          "ul",
          { className: "cards" },
          payments.map((payment) => paymentCard(payment, again)),
        ),
      ),
    );
  if (letter)
    parts.push(
      el("section", {}, el("h3", {}, "Dead letter"), el("ul", { className: "cards" }, letterCard(letter, again))),
    );
  return parts;
}

const signed = (n) => (n > 0 ? "+" : n < 0 ? "−" : "") + count(Math.abs(n));

function storyOf({ order, payments, payment_events: events, dead_letter: letter, stock_log: stock }) {
  const story = [];
  const add = (at, is, ...what) => story.push({ at, is, what: what.filter(Boolean) });
  if (order) {
    add(
      order.created_at,
      "",
      "Placed by ",
      order.user_id,
      ": ",
      many(order.quantity, "unit") + " of " + order.sku_id + " for " + money(order.amount, order.currency) + ".",
    );
    if (order.status === "pending_payment") add(order.expires_at, "", "Expires, unless it is paid by then.");
    if (order.status === "expired") add(order.expires_at, "warn", "Its time to be paid ended.");
  }
  for (const event of events) {
    add(
      event.received_at,
      "",
      "Message ",
      el("b", {}, event.kind),
      " of " + event.provider + " about payment " + event.payment_id + ", id " + event.event_id + ".",
      el("details", {}, el("summary", {}, "The message as it came"), el("pre", {}, event.body)),
    );
  }
  for (const payment of payments) {
    const sum = money(payment.amount, payment.currency);
    const name = "payment " + payment.payment_id;
    // Without the message, which retention may have deleted.
    if (!events.some((event) => event.payment_id === payment.payment_id && event.provider === payment.provider))
      add(payment.received_at, "", "Payment " + payment.payment_id + " of " + sum + " came in.");
    switch (payment.state) {
      case "matched":
        add(payment.changed_at, "good", "Paid: " + sum + " by " + name + ".");
        break;
      case "refund_due":
        add(
          payment.changed_at,
          "bad",
          "Refund due: " + sum + ", " + name + ", because of ",
          el("b", {}, words(payment.refund_reason)),
          ".",
        );
        break;
      case "refunded":
        add(
          payment.changed_at,
          "",
          "Refund recorded: " +
            sum +
            ", " +
            name +
            (payment.reference ? ", reference " + payment.reference : "") +
            (payment.note ? " (" + payment.note + ")" : "") +
            ".",
        );
        break;
      default:
        add(payment.changed_at, "warn", sum + ", " + name + ", looks for its order.");
    }
  }
  if (letter) {
    add(letter.at, "bad", "The database refused the row: ", el("code", {}, letter.sqlstate), " " + letter.reason);
    if (letter.discarded_at)
      add(letter.discarded_at, "", "Discarded by an operator" + (letter.note ? ": " + letter.note : "") + ".");
  }
  for (const entry of stock) {
    if (entry.cause === "dead letter retried")
      add(
        entry.at,
        "warn",
        "It was a dead letter until an operator retried it: the database had refused its row, and a waiting buyer was told 500.",
      );
    const moved = [
      ["total", entry.total_delta],
      ["held", entry.held_delta],
      ["sold", entry.sold_delta],
    ]
      .filter(([, n]) => n)
      .map(([name, n]) => signed(n) + " " + name);
    add(
      entry.at,
      "",
      "Stock: ",
      el("b", {}, entry.cause),
      moved.length ? ", " + moved.join(", ") : "",
      ". Then " +
        count(entry.total_after) +
        " in total, " +
        count(entry.held_after) +
        " held, " +
        count(entry.sold_after) +
        " sold.",
    );
  }
  story.sort((a, b) => Date.parse(a.at) - Date.parse(b.at));
  return story.map(({ at, is, what }) => el("li", { "data-is": is }, moment(at), el("div", {}, what)));
}
