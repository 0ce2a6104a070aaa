// --- Page: SKUs -------------------------------------------------------------------------------

// Terms of a sale in a line.
function terms(sku) {
  const limit = sku.per_user_limit ? "at most " + count(sku.per_user_limit) + " a buyer" : "no limit a buyer";
  return [el("b", {}, money(sku.unit_price, sku.currency)), ", " + limit, el("small", {}, ...windowOf(sku))];
}

function windowOf(sku) {
  if (!sku.opens_at && !sku.closes_at) return ["no sale window"];
  const opens = sku.opens_at && ["opens ", moment(sku.opens_at)];
  const closes = sku.closes_at && ["closes ", moment(sku.closes_at)];
  return [opens, opens && closes && ", ", closes].filter(Boolean).flat();
}

function showSkus() {
  if (!live) return;
  const text = $("skus-filter").value.trim().toLowerCase();
  $("skus-bar").hidden = live.skus.length < 8 && !text;
  const shown = live.skus.filter(
    (sku) => sku.sku_id.toLowerCase().includes(text) || sku.title.toLowerCase().includes(text),
  );
  $("skus-empty").hidden = shown.length > 0;
  say($("skus-empty"), text ? "No SKU has this in its id or title." : "There is no SKU yet.");
  keyed(
    $("skus-rows"),
    shown,
    (sku) => sku.sku_id,
    (sku) =>
      el(
        "tr",
        {},
        el("td", {}, toSku(sku.sku_id), el("small"), el("span")),
        el("td"),
        el("td"),
        el(
          "td",
          {},
          el(
            "div",
            { className: "acts" },
            link("skus/" + encodeURIComponent(sku.sku_id), "Change", { className: "button" }),
            button("Restock…", () => restock(sku.sku_id)),
            pauseButton(sku.sku_id),
          ),
        ),
      ),
    (row, sku) => {
      const [name, stock, what, acts] = row.children;
      say(name.children[1], sku.title === sku.sku_id ? "" : sku.title);
      name.children[2].replaceChildren(stateChip(sku));
      stock.replaceChildren(...units(sku));
      // Its times are of the minute: anew only if something differs.
      const now = JSON.stringify([sku.unit_price, sku.currency, sku.per_user_limit, sku.opens_at, sku.closes_at]);
      if (what.dataset.now !== now) {
        what.replaceChildren(...terms(sku));
        what.dataset.now = now;
      }
      showPauseButton(acts.firstChild.lastChild, sku);
    },
  );
}

$("skus-filter").addEventListener("input", showSkus);
