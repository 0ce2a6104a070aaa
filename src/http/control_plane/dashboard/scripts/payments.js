// --- Page: payments ---------------------------------------------------------------------------

const PAGE = 50;

// What each reason of a refund means, and what to do.
const REFUND_REASONS = {
  order_expired:
    "The order had expired before its payment was booked; its units may be sold by now. Send the money back.",
  order_cancelled: "The buyer had cancelled the order and paid all the same. Send the money back.",
  not_assigned:
    "The order waits for units, or has left the waiting list without any. Send the money back; it keeps its place, and gains none.",
  order_failed: "The database had refused the order; a dead letter keeps it. Send the money back, and mend the cause.",
  already_paid:
    "A second payment of an order that is paid and stays paid. Send this one back, not the one that paid it.",
  already_refunded: "The order's money is going back, or went back, already. Send this money back as well.",
  amount_mismatch:
    "The payment is not of the order's amount. Send the money back, and find out who asked for the wrong amount.",
  currency_mismatch: "The payment is of another currency than the order. Send the money back.",
  receipt_missing:
    "No such order was ever found, and the payment brought no receipt to recover it from. Find the buyer at the platform; send the money back, or place the order by hand.",
  receipt_invalid:
    "No such order was ever found, and the receipt is altered, of another order or database, or signed with a key that is not in receipt.key. Send the money back, or add the earlier key.",
  sold_out:
    "The order was lost, and its units are sold to others. Send the money back; or restock and place a new order for the buyer.",
  ordered_again: "The order was lost, and its buyer has ordered again under the same key. Send the money back.",
  unknown_sku: "The order was lost, and its SKU is not in this database. Send the money back.",
};

const STATES = {
  orphan: [
    "looks for its order",
    "warn",
    "Verified payments whose order has not been found yet. Each is looked for again by itself; normally it is matched, recovered from its receipt or due for a refund within half a minute. If orders are behind, wait.",
  ],
  refund_due: [
    "to be refunded",
    "bad",
    "Millrace never sends money back. Refund each at its platform, by its payment id, and record it here with the platform's reference.",
  ],
  matched: ["paid its order", "good", "Payments that have paid their order, newest first."],
  refunded: ["refunded", "", "Payments whose money went back, as operators have recorded it, newest first."],
};

let payments = { state: null, next: null };

function paymentCard(payment, changed) {
  const [word, is] = STATES[payment.state] || [words(payment.state), ""];
  const acts = el("div", { className: "acts" });
  if (payment.state === "orphan") acts.append(button("Decide now…", () => decideNow(payment, changed)));
  if (payment.state === "orphan" && !payment.has_order)
    acts.append(button("Close…", () => closePayment(payment, changed)));
  if (payment.state === "refund_due")
    acts.append(
      button(
        payment.has_order ? "Record the refund…" : "Close…",
        () => (payment.has_order ? recordRefund(payment.order_id, changed) : closePayment(payment, changed)),
        { className: "go" },
      ),
    );
  const receipt = payment.order_in_receipt;
  return el(
    "li",
    { className: "card" },
    el(
      "div",
      { className: "top" },
      el("b", {}, money(payment.amount, payment.currency)),
      chip(word, is),
      payment.refund_reason && chip(words(payment.refund_reason)),
      acts.childNodes.length ? acts : null,
    ),
    payment.refund_reason &&
      payment.state === "refund_due" &&
      el("p", { className: "what" }, REFUND_REASONS[payment.refund_reason] || ""),
    facts([
      [
        "Order",
        payment.order_id && (payment.has_order || payment.state !== "refunded")
          ? el("span", {}, toOrder(payment.order_id), payment.has_order ? "" : ", not there")
          : payment.order_ref || "none was named",
      ],
      ["Payment", payment.payment_id],
      ["Platform", payment.provider],
      ["Came in", moment(payment.received_at)],
      ["Paid", payment.paid_at !== payment.received_at && moment(payment.paid_at)],
      ["Last change", payment.changed_at !== payment.received_at && moment(payment.changed_at)],
      ["Looked for", payment.state === "orphan" && (payment.checks === 1 ? "once" : count(payment.checks) + " times")],
      ["Looked for again", payment.next_check_at && moment(payment.next_check_at)],
      ["Reference", payment.reference],
      ["Note", payment.note],
    ]),
    receipt &&
      el(
        "details",
        {},
        el("summary", {}, "The order in its receipt"),
        facts([
          ["Order", receipt.order_id],
          ["Buyer", receipt.user_id],
          ["SKU", receipt.sku_id || "not known any more"],
          ["Units", count(receipt.quantity)],
          ["Amount", money(receipt.amount, receipt.currency)],
          ["Placed", moment(receipt.created_at)],
          ["Payable until", moment(receipt.expires_at)],
        ]),
      ),
  );
}

function decideNow(payment, changed) {
  ask({
    title: "Decide this payment now?",
    danger: true,
    yes: "Decide now",
    text: [
      money(payment.amount, payment.currency) + ", payment " + payment.payment_id + " of " + payment.provider + ".",
      "Its order is looked for now. If it is not there, it is written anew from the receipt; without a valid receipt, or without free units, the payment becomes due for a refund at once.",
      "Do not use it to look again while orders are behind: that is done by itself, and costs nobody an order.",
    ],
    act: () => send("POST", "orphan-payments/" + payment.id + "/retry"),
    done: (now) => {
      changed();
      return now.state === "orphan"
        ? "Its order is still on its way; the payment goes on looking for it."
        : "The payment now " +
            (now.state === "refund_due"
              ? "has to be refunded: " + words(now.refund_reason) + "."
              : (STATES[now.state] || [words(now.state)])[0] + ".");
    },
    unsure: "The payment may or may not have been decided: refresh the list.",
  });
}

function closePayment(payment, changed) {
  ask({
    title: "Close this payment?",
    danger: true,
    yes: "Close it",
    text: [
      money(payment.amount, payment.currency) +
        ", payment " +
        payment.payment_id +
        " of " +
        payment.provider +
        ", without an order.",
      "This records that you have dealt with the money. Millrace sends nothing: refund it at the platform first. A closed payment looks for no order any more, and cannot be opened again.",
    ],
    fields: [
      { name: "note", label: "Note", hint: "Who did what, for the books.", required: true, set: { maxLength: 1000 } },
      {
        name: "reference",
        label: "Reference of the refund",
        hint: "The platform's, if money was sent back.",
        set: { maxLength: 1000 },
      },
    ],
    act: ({ note, reference }) =>
      send("POST", "orphan-payments/" + payment.id + "/close", reference ? { note, reference } : { note }),
    done: () => {
      changed();
      return "The payment is closed.";
    },
    unsure: "It may or may not be closed: refresh the list before you repeat it.",
  });
}

const dueOf = (history) => history.payments.filter((payment) => payment.state === "refund_due");

// Records the refund of an order's payments that are due; of a paid order without any, gives the sale up.
async function recordRefund(id, changed) {
  let history;
  try {
    history = await read("orders/" + encodeURIComponent(id));
  } catch (failure) {
    tell(reasonOf(failure));
    return;
  }
  const due = dueOf(history);
  const ids = due.map((payment) => payment.id).join();
  const order = history.order;
  const givesUp = !due.length && order && order.status === "paid";
  if (!due.length && !givesUp) {
    tell("None of the payments of this order has to be refunded any more.");
    changed();
    return;
  }
  ask({
    title: givesUp ? "Give up this sale?" : "Record the refund of order " + id + "?",
    danger: true,
    yes: givesUp ? "Give the sale up" : "Record it",
    text: givesUp
      ? [
          "The order is paid, and none of its payments is due for a refund. Recording one gives the sale itself up: order and payment become refunded, and it cannot be undone.",
          "Millrace sends nothing: refund " +
            history.payments
              .filter((payment) => payment.state === "matched")
              .map((payment) => money(payment.amount, payment.currency))
              .join(" and ") +
            " at the platform first.",
        ]
      : [
          el(
            "p",
            {},
            "This records that the money of ",
            due.length === 1 ? "this payment" : "these " + count(due.length) + " payments",
            " went back. Millrace sends nothing: refund ",
            due.length === 1 ? "it" : "each",
            " at the platform first.",
          ),
          el(
            "ul",
            {},
            due.map((payment) =>
              el(
                "li",
                {},
                money(payment.amount, payment.currency) + ", payment " + payment.payment_id + " of " + payment.provider,
              ),
            ),
          ),
          order && order.status === "paid" ? "The order itself is paid and stays so." : null,
        ].filter(Boolean),
    fields: [
      {
        name: "reference",
        label: "Reference of the refund",
        hint: "The platform's. Sent again with the same reference, nothing is done twice.",
        required: true,
        set: { maxLength: 1000 },
      },
      { name: "note", label: "Note", set: { maxLength: 1000 } },
      ...(givesUp
        ? [
            {
              name: "restock",
              label: "Put its units on sale again",
              type: "checkbox",
              hint: "Otherwise they leave the sale.",
            },
          ]
        : []),
    ],
    act: async ({ reference, note, restock }) => {
      // With another reference, a paid order of which nothing is due any more would lose its sale.
      const now = await read("orders/" + encodeURIComponent(id));
      const known = now.payments.some((payment) => payment.state === "refunded" && payment.reference === reference);
      if (
        !known &&
        dueOf(now)
          .map((payment) => payment.id)
          .join() !== ids
      )
        throw new Unfit("Somebody else has changed the payments of this order meanwhile. Close this and look again.");
      return send("POST", "orders/" + encodeURIComponent(id) + "/refunded", {
        reference,
        ...(note ? { note } : {}),
        ...(givesUp ? { restock } : {}),
      });
    },
    done: (now) => {
      changed();
      return (
        "Recorded. The order is " +
        words(now.status) +
        (now.restocked ? "; " + many(now.restocked, "unit is", "units are") + " on sale again." : ".")
      );
    },
    unsure: "Press again with the same reference: nothing is recorded twice.",
  });
}

async function openPayments(state) {
  const known = STATES[state] ? state : "orphan";
  payments = { state: known, next: null };
  for (const tab of $("payments-tabs").children) markCurrent(tab, tab.getAttribute("href") === "#/payments/" + known);
  say($("payments-note"), STATES[known][2]);
  await loadPayments(false);
}

async function loadPayments(older) {
  const { state, next } = payments;
  const list = $("payments-list");
  try {
    const page = await read("payments?state=" + state + "&limit=" + PAGE + (older && next ? "&before=" + next : ""));
    if (payments.state !== state) return;
    payments.next = page.next_before;
    const cards = page.payments.map((payment) => paymentCard(payment, () => loadPayments(false)));
    if (older) list.firstChild.append(...cards);
    else
      list.replaceChildren(
        cardList(
          cards,
          state === "orphan" || state === "refund_due" ? "None. There is nothing to do here." : "None yet.",
        ),
      );
    $("payments-more").hidden = !page.next_before;
  } catch (failure) {
    list.replaceChildren(el("p", { className: "note bad" }, reasonOf(failure)));
    $("payments-more").hidden = true;
  }
}

$("payments-again").addEventListener("click", () => loadPayments(false));
$("payments-more").addEventListener("click", () => loadPayments(true));
