// --- Elements and words -----------------------------------------------------------------------

const $ = (id) => document.getElementById(id);

// An element. `set` has its properties; `data-…` and `aria-…` are attributes. Texts are never read as markup.
function el(tag, set = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(set)) {
    if (value === undefined || value === false) continue;
    if (name.includes("-") || name === "role" || name === "for" || name === "scope") made.setAttribute(name, value);
    else if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else made[name] = value;
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// A list of cards, or the sentence that says that there are none.
function cardList(cards, none) {
  return cards.length ? el("ul", { className: "cards" }, cards) : el("p", { className: "empty" }, none);
}

const button = (text, act, set = {}) => el("button", { type: "button", on: { click: act }, ...set }, text);
const link = (to, text, set = {}) => el("a", { href: "#/" + to, ...set }, text);
const toOrder = (id) => link("orders/" + encodeURIComponent(id), id);
const toSku = (id) => link("skus/" + encodeURIComponent(id), id);

// Changes a text only if it differs, so that what is read out or selected stays.
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Brings the children of `box` in line with `items`: the child of a key stays the same element.
function keyed(box, items, key, make, update) {
  const names = new Set(items.map((item) => String(key(item))));
  for (const child of [...box.children]) if (!names.has(child.dataset.key)) child.remove();
  const before = new Map([...box.children].map((child) => [child.dataset.key, child]));
  // What is moved loses the keyboard's focus.
  const stays = box.contains(document.activeElement);
  let place = box.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let child = before.get(name);
    if (!child) {
      child = make(item);
      child.dataset.key = name;
      box.insertBefore(child, stays ? null : place);
    } else if (child === place) place = place.nextElementSibling;
    else if (!stays) box.insertBefore(child, place);
    if (update) update(child, item);
  }
}

const count = (n) => Math.round(n).toLocaleString("en");
const rate = (n) => (n > 0 && n < 10 ? n.toFixed(1) : count(n));
const many = (n, one, more = one + "s") => count(n) + " " + (n === 1 ? one : more);
const words = (name) => name.replaceAll("_", " ");

// An amount in minor units, as people write it.
function money(amount, currency) {
  try {
    const digits = new Intl.NumberFormat("en", { style: "currency", currency }).resolvedOptions().maximumFractionDigits;
    const text = (amount / 10 ** digits).toLocaleString("en", {
      minimumFractionDigits: digits,
      maximumFractionDigits: digits,
    });
    return text + " " + currency;
  } catch {
    return amount + " minor units of " + currency;
  }
}

// A moment in the browser's time zone; its title has UTC.
function moment(iso) {
  if (!iso) return null;
  const at = new Date(iso);
  const today = at.toDateString() === new Date().toDateString();
  const time = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  const day = at.toLocaleDateString([], { year: "numeric", month: "short", day: "numeric" });
  return el("time", { dateTime: iso, title: iso }, today ? "today, " + time : day + ", " + time);
}

function age(seconds) {
  const [n, unit] = [
    [86400, "day"],
    [3600, "hour"],
    [60, "minute"],
    [1, "second"],
  ].find(([n]) => seconds >= 2 * n) || [1, "second"];
  return many(Math.max(1, Math.floor(seconds / n)), unit);
}

function chip(text, is, title) {
  return el("span", { className: "chip", "data-is": is || "", title: title || "" }, text);
}

// A list of names and values; what has no value is left out.
function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== false && value !== "");
  return el(
    "dl",
    { className: "facts" },
    shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}
