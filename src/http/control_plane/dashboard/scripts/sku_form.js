// --- Page: one SKU, to create or change -------------------------------------------------------

// A `PUT` replaces every term, so all that came goes back, those included that this form has no field for: only these
// members of a SKU are no terms. A new term that people are to change here gets a field in page.html, which `name`s it,
// and a line in CONSEQUENCES.
const NO_TERMS = [
  "sku_id",
  "free",
  "held",
  "sold",
  "state",
  "now",
  "paused",
  "counters_refused",
  "waiting",
  "draw_commitment",
];
const TERM_WORDS = {
  title: "Title",
  unit_price: "Unit price",
  currency: "Currency",
  total: "Total",
  per_user_limit: "Units a buyer",
  opens_at: "Opens",
  closes_at: "Closes",
  waitlist_max: "Orders that may wait",
  waitlist_payment_ttl_ms: "Time to pay once assigned",
  assign_between: "Assign between",
  waitlist_skips: "Later orders may pass",
};
const NUMBERS = ["unit_price", "total", "per_user_limit", "waitlist_max", "waitlist_payment_ttl_ms"];
const TIMES = ["opens_at", "closes_at"];
const FLAGS = ["waitlist_skips"];
const UNITS_MAX = 4294967295;

// What a change of a term does to a sale: a sentence, and whether it stops buyers.
const CONSEQUENCES = {
  total: (sku, was, now) =>
    now > was
      ? [many(now - was, "unit") + (sku.waiting ? " more, first for the orders that wait." : " more can be bought at once.")]
      : [
          many(was - now, "free unit leaves", "free units leave") +
            " the sale and can no longer be bought." +
            (sku.waiting ? " Orders that wait for more than " + count(now) + " expire." : ""),
          true,
        ],
  unit_price: () => ["New orders cost this; orders that are placed keep their amount."],
  currency: () => ["New orders are in this currency. The payment of an order that is placed has to be in its old one."],
  per_user_limit: (sku, was, now) => [
    now ? "New orders are refused beyond it, live orders from before counted." : "A buyer may buy any number.",
    Boolean(now) && (!was || now < was),
  ],
  opens_at: (sku, was, now) =>
    now && Date.parse(now) > serverNow() && sku.state !== "not_open"
      ? ["The sale stops at once, and opens again then.", true]
      : [
          !now || Date.parse(now) <= serverNow()
            ? "The sale is open from the start."
            : "Until then orders are refused with 409 sale_not_open.",
        ],
  closes_at: (sku, was, now) =>
    now && Date.parse(now) <= serverNow()
      ? ["The sale is over at once: every further order is refused with 409 sale_closed.", true]
      : [
          now ? "From then on orders are refused with 409 sale_closed." : "The sale has no end.",
          Boolean(now) && (!was || Date.parse(now) < Date.parse(was)),
        ],
  waitlist_max: () => ["Further orders that would wait are refused with 409 waitlist_full; who waits already stays."],
  waitlist_payment_ttl_ms: () => ["It counts for orders that are assigned from now on."],
  assign_between: (sku, was, now) => [
    now ? "Units that come back at other times are kept until then." : "Units that come back are assigned at once.",
  ],
  waitlist_skips: (sku, was, now) => [
    now
      ? "A later order may take units that do not suffice for an earlier one, which may then wait for ever."
      : "Nobody is served while an earlier order waits.",
  ],
};

let base = null; // The SKU as the form got it; null: a new one.
let formFor = null; // Its id, or "" for a new one.

// By Millrace's clock, which decides about sale windows.
let clockAhead = 0;
const serverNow = () => Date.now() + clockAhead;

const termsOf = (sku) => Object.fromEntries(Object.entries(sku).filter(([name]) => !NO_TERMS.includes(name)));
const shownTerm = (name, value, sku) =>
  value === null || value === undefined
    ? "none"
    : name === "unit_price"
      ? money(value, sku.currency)
      : NUMBERS.includes(name)
        ? count(value)
        : TIMES.includes(name)
          ? moment(value)
          : FLAGS.includes(name)
            ? value
              ? "yes"
              : "no"
            : fieldText(name, value);

// A term as the text of its field.
function fieldText(name, value) {
  if (value === null || value === undefined) return "";
  if (Array.isArray(value)) return value.join(" to ");
  return TIMES.includes(name) ? toLocal(value) : String(value);
}

// A moment as the value of an input in the browser's time zone, and back.
function toLocal(iso) {
  if (!iso) return "";
  const at = new Date(iso);
  const two = (n) => String(n).padStart(2, "0");
  return (
    at.getFullYear() +
    "-" +
    two(at.getMonth() + 1) +
    "-" +
    two(at.getDate()) +
    "T" +
    two(at.getHours()) +
    ":" +
    two(at.getMinutes()) +
    ":" +
    two(at.getSeconds())
  );
}

function fillForm(sku) {
  base = sku;
  const form = $("sku-form").elements;
  for (const name of ["sku_id", ...Object.keys(TERM_WORDS)]) {
    const value = sku ? sku[name] : name === "currency" && live && live.skus.length ? live.skus[0].currency : null;
    if (FLAGS.includes(name)) form[name].checked = Boolean(value);
    else form[name].value = fieldText(name, value);
    // Browsers write a time in their own way; unchanged, it keeps its milliseconds.
    form[name].dataset.was = form[name].value;
    form[name].removeAttribute("aria-invalid");
  }
  form.sku_id.disabled = Boolean(sku);
  say($("sku-error"), "");
  $("sku-note").hidden = true;
  say($("sku-save"), sku ? "Save…" : "Create…");
  explainForm();
}

// What the values mean, below their fields.
function explainForm() {
  const form = $("sku-form").elements;
  const price = wholeNumber(form.unit_price.value);
  const currency = form.currency.value.trim();
  say(
    $("sku-price-means"),
    Number.isSafeInteger(price) && /^[A-Z]{3}$/.test(currency)
      ? "Minor units: " + money(price, currency) + "."
      : "In minor units of the currency: 1999 is 19.99 EUR.",
  );
  for (const [name, box] of [
    ["opens_at", $("sku-opens-means")],
    ["closes_at", $("sku-closes-means")],
  ]) {
    const at = new Date(form[name].value);
    say(
      box,
      isNaN(at)
        ? (name === "opens_at" ? "Empty: from the start. " : "Empty: no end. ") +
            "In your time zone, " +
            Intl.DateTimeFormat().resolvedOptions().timeZone +
            "."
        : at.toISOString().slice(0, 19).replace("T", " ") +
            " UTC" +
            (Math.abs(clockAhead) > 2000
              ? "; Millrace's clock is " +
                (clockAhead > 0 ? "ahead of" : "behind") +
                " this device's by " +
                age(Math.abs(clockAhead) / 1000)
              : ""),
    );
  }
}

const wholeNumber = (text) => (/^\d{1,16}$/.test(text.trim()) ? Number(text) : NaN);

// The terms as the form has them. Throws what is wrong, with its field.
function formTerms() {
  const form = $("sku-form").elements;
  const terms = base ? termsOf(base) : {};
  const wrong = (name, text) => {
    form[name].setAttribute("aria-invalid", "true");
    form[name].focus();
    throw new Unfit(text);
  };
  for (const name of ["sku_id", ...Object.keys(TERM_WORDS)]) form[name].removeAttribute("aria-invalid");
  const id = form.sku_id.value.trim();
  if (!/^[\x21-\x7e]{1,32}$/.test(id)) wrong("sku_id", "SKU: 1 to 32 visible ASCII characters.");
  terms.title = form.title.value.trim() || id;
  terms.unit_price = wholeNumber(form.unit_price.value);
  if (!Number.isSafeInteger(terms.unit_price))
    wrong("unit_price", "Unit price: a whole number of minor units, 0 or more.");
  terms.currency = form.currency.value.trim();
  if (!/^[A-Z]{3}$/.test(terms.currency)) wrong("currency", "Currency: three capitals, as in EUR.");
  terms.total = wholeNumber(form.total.value);
  if (!(terms.total <= UNITS_MAX)) wrong("total", "Total: a whole number, 0 to " + count(UNITS_MAX) + ".");
  terms.per_user_limit = form.per_user_limit.value.trim() ? wholeNumber(form.per_user_limit.value) : null;
  if (terms.per_user_limit !== null && !(terms.per_user_limit >= 1 && terms.per_user_limit <= UNITS_MAX))
    wrong("per_user_limit", "Units a buyer: 1 or more, or empty.");
  terms.waitlist_max = form.waitlist_max.value.trim() ? wholeNumber(form.waitlist_max.value) : null;
  if (Number.isNaN(terms.waitlist_max)) wrong("waitlist_max", "Orders that may wait: a whole number, or empty.");
  const ttl = form.waitlist_payment_ttl_ms.value;
  terms.waitlist_payment_ttl_ms = ttl.trim() ? wholeNumber(ttl) : null;
  if (Number.isNaN(terms.waitlist_payment_ttl_ms))
    wrong("waitlist_payment_ttl_ms", "Time to pay once assigned: milliseconds, or empty.");
  const between = form.assign_between.value.trim();
  terms.assign_between = between ? between.split(/\s+to\s+/) : null;
  if (terms.assign_between && terms.assign_between.length !== 2)
    wrong("assign_between", "Assign between: as in 09:00+08:00 to 21:00+08:00, or empty.");
  terms.waitlist_skips = form.waitlist_skips.checked;
  for (const name of TIMES) {
    const input = form[name];
    if (input.validity.badInput) wrong(name, TERM_WORDS[name] + ": the time is not complete.");
    if (input.value !== input.dataset.was || !base)
      terms[name] = input.value ? new Date(input.value).toISOString() : null;
  }
  if (terms.opens_at && terms.closes_at && Date.parse(terms.closes_at) <= Date.parse(terms.opens_at))
    wrong("closes_at", "Closes: it has to close after it opens.");
  return [id, terms];
}

const differing = (a, b) =>
  Object.keys({ ...a, ...b }).filter((name) => JSON.stringify(a[name] ?? null) !== JSON.stringify(b[name] ?? null));

async function skuByName(id) {
  return (await read("skus")).skus.find((sku) => sku.sku_id === id) || null;
}

async function saveForm() {
  say($("sku-error"), "");
  $("sku-note").hidden = true;
  let id;
  let terms;
  let fresh;
  $("sku-save").disabled = true;
  try {
    [id, terms] = formTerms();
    fresh = await skuByName(id);
  } catch (failure) {
    say($("sku-error"), failure instanceof Unfit ? failure.message : reasonOf(failure));
    return;
  } finally {
    $("sku-save").disabled = false;
  }
  const path = "skus/" + encodeURIComponent(id);
  const put = () => send("PUT", path, terms);
  if (!base) {
    if (fresh) {
      say($("sku-error"), "There is a SKU " + id + " already: change that one.");
      return;
    }
    ask({
      title: "Create " + id + "?",
      yes: "Create",
      text: [
        count(terms.total) +
          " units for " +
          money(terms.unit_price, terms.currency) +
          " each, " +
          (terms.per_user_limit ? "at most " + count(terms.per_user_limit) + " a buyer." : "any number a buyer."),
        el(
          "p",
          {},
          terms.opens_at && Date.parse(terms.opens_at) > serverNow()
            ? ["Orders are taken from ", moment(terms.opens_at), " on."]
            : "Orders are taken at once.",
          terms.closes_at ? [" It closes ", moment(terms.closes_at), "."] : "",
        ),
      ],
      act: put,
      done: () => {
        location.hash = "#/skus/" + encodeURIComponent(id);
        return id + " is created.";
      },
      unsure: "Press Create again: the same terms are put only once.",
    });
    return;
  }
  // A PUT replaces every term, so it must not undo what somebody else has changed since.
  const meanwhile = fresh ? differing(termsOf(base), termsOf(fresh)) : [];
  if (!fresh || meanwhile.length) {
    const note = $("sku-note");
    note.className = "note stale";
    note.hidden = false;
    note.replaceChildren(
      fresh
        ? "Somebody else has changed " +
            meanwhile.map((name) => TERM_WORDS[name] || words(name)).join(", ") +
            " since this form was filled. Your changes would undo that. "
        : "This SKU is gone. ",
      fresh ? button("Load it anew", () => fillForm(fresh)) : "",
    );
    note.scrollIntoView({ block: "center" });
    return;
  }
  const changed = differing(termsOf(base), terms);
  if (!changed.length) {
    say($("sku-error"), "Nothing differs from what is in force.");
    return;
  }
  let stops = false;
  const lines = changed.map((name) => {
    const [text, stop] = (CONSEQUENCES[name] || (() => [""]))(fresh, base[name], terms[name]);
    stops = stops || Boolean(stop);
    return el(
      "li",
      {},
      el("b", {}, TERM_WORDS[name] || words(name)),
      ": ",
      shownTerm(name, base[name], base),
      " → ",
      shownTerm(name, terms[name], terms),
      ". ",
      text,
    );
  });
  ask({
    title: "Change " + id + "?",
    yes: "Change",
    danger: stops,
    text: [el("ul", {}, lines)],
    act: put,
    done: ({ changed: names, ...now }) => {
      fillForm(now);
      return id + " is changed: " + names.map((name) => TERM_WORDS[name] || words(name)).join(", ") + ".";
    },
    unsure: "Press Change again: the same terms are put only once.",
  });
}

async function openSku(id) {
  formFor = id ?? "";
  $("sku-stock").replaceChildren();
  $("sku-fault").replaceChildren();
  if (id === null) {
    say($("sku-title"), "New SKU");
    $("sku-acts").replaceChildren();
    $("sku-form").hidden = false;
    fillForm(null);
    $("sku-form").elements.sku_id.focus();
    return;
  }
  say($("sku-title"), id);
  $("sku-form").hidden = true;
  $("sku-acts").replaceChildren(
    button("Restock…", () => restock(id)),
    pauseButton(id),
  );
  try {
    const sku = await skuByName(id);
    if (formFor !== id) return;
    if (sku) {
      fillForm(sku);
      $("sku-form").hidden = false;
      showSku();
    } else $("sku-fault").replaceChildren(el("p", { className: "note bad" }, "There is no SKU " + id + "."));
  } catch (failure) {
    $("sku-fault").replaceChildren(el("p", { className: "note bad" }, reasonOf(failure)));
  }
}

// The live part of the page.
function showSku() {
  const sku = formFor && skuNow(formFor);
  for (const act of $("sku-acts").children) act.hidden = !sku;
  if (!sku) return;
  say($("sku-title"), sku.title === sku.sku_id ? sku.sku_id : sku.title + " · " + sku.sku_id);
  const box = $("sku-stock");
  if (!box.firstChild) box.replaceChildren(el("section", {}, el("p"), el("div")));
  const [state, stock] = box.firstChild.children;
  state.replaceChildren(stateChip(sku), " ", ...windowOf(sku));
  stock.replaceChildren(...units(sku));
  showPauseButton($("sku-acts").lastChild, sku);
  const refused = sku.counters_refused;
  const seen = refused ? refused.reason + refused.parked : "";
  if ($("sku-fault").dataset.seen !== seen) {
    $("sku-fault").dataset.seen = seen;
    $("sku-fault").replaceChildren(refused ? el("div", { className: "fault", role: "alert" }, refusedHelp(sku)) : "");
  }
  // What is shown as the total is what is in force, unless somebody is changing it.
  const total = $("sku-form").elements.total;
  if (
    base &&
    base.sku_id === sku.sku_id &&
    base.total !== sku.total &&
    total.value === total.dataset.was &&
    !$("ask").open
  ) {
    base = { ...base, total: sku.total };
    total.value = total.dataset.was = String(sku.total);
  }
}

$("sku-form").addEventListener("input", explainForm);
$("sku-currency").addEventListener("change", () => {
  $("sku-currency").value = $("sku-currency").value.toUpperCase();
  explainForm();
});
$("sku-form").addEventListener("submit", (event) => {
  event.preventDefault();
  saveForm();
});
