// --- Page: orders -----------------------------------------------------------------------------

let lookedFor = "";

async function openOrders(text) {
  lookedFor = text;
  const box = $("found");
  const input = $("find-text");
  if (input.value.trim() !== text) input.value = text;
  if (!text) {
    box.replaceChildren(
      el(
        "p",
        { className: "note" },
        "An order by its id, with its whole history, or the orders of a buyer. Without database.user_index, a buyer's orders of the idempotency window are found; an order by its id always.",
      ),
    );
    input.focus();
    return;
  }
  box.replaceChildren(el("p", { className: "empty" }, "Looking…"));
  const name = encodeURIComponent(text);
  const orNull = (failure) => {
    if (failure.status === 404 || failure.status === 400) return null;
    throw failure;
  };
  try {
    // Ids of orders and of buyers may look alike: whoever it is.
    const [history, page] = await Promise.all([
      /^\d{1,19}$/.test(text) ? read("orders/" + name).catch(orNull) : null,
      read("users/" + name + "/orders?limit=50").catch(orNull),
    ]);
    if (lookedFor !== text) return;
    const parts = [];
    if (history) parts.push(...orderHistory(text, history));
    if (page && page.orders.length) parts.push(ordersOf(text, page));
    box.replaceChildren(
      ...(parts.length
        ? parts
        : [
            el(
              "section",
              {},
              el("p", {}, el("b", {}, "Nothing is found under “" + text + "”.")),
              el(
                "p",
                { className: "note" },
                "There is no order with this id, and no buyer with this id has one that Millrace knows of. Without database.user_index, only a buyer's orders of the idempotency window are found.",
              ),
            ),
          ]),
    );
  } catch (failure) {
    if (lookedFor === text) box.replaceChildren(el("p", { className: "note bad" }, reasonOf(failure)));
  }
}

function ordersOf(user, page) {
  const rows = el("tbody");
  const more = button("Older ones", () => load());
  let before = page.next_before;
  const add = (orders) =>
    rows.append(
      ...orders.map((order) =>
        el(
          "tr",
          {},
          el("td", {}, toOrder(order.order_id)),
          el("td", {}, orderChip(order.status)),
          el("td", { "data-name": "SKU" }, toSku(order.sku_id)),
          el("td", { className: "num", "data-name": "Units" }, count(order.quantity)),
          el("td", { className: "num", "data-name": "Amount" }, money(order.amount, order.currency)),
          el("td", { "data-name": "Placed" }, moment(order.created_at)),
        ),
      ),
    );
  const load = async () => {
    try {
      const next = await read("users/" + encodeURIComponent(user) + "/orders?limit=50&before=" + before);
      add(next.orders);
      before = next.next_before;
      more.hidden = !before;
    } catch (failure) {
      tell(reasonOf(failure));
    }
  };
  add(page.orders);
  more.hidden = !before;
  return el(
    "section",
    {},
    el("h3", {}, "Orders of buyer " + user),
    el(
      "table",
      { className: "list", "aria-label": "Orders of buyer " + user },
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          ["Order", "State", "SKU", "Units", "Amount", "Placed"].map((title, i) =>
            el("th", { scope: "col", className: i === 3 || i === 4 ? "num" : "" }, title),
          ),
        ),
      ),
      rows,
    ),
    el("p", { className: "more" }, more),
  );
}

$("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("find-text").value.trim();
  const to = "#/orders/" + encodeURIComponent(text);
  if (!text) return;
  if (location.hash === to) openOrders(text);
  else location.hash = to;
});
