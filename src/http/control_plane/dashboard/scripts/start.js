// --- Pages and the poll -----------------------------------------------------------------------

const EVERY_MS = 1000;

function markCurrent(anchor, is) {
  if (is) anchor.setAttribute("aria-current", "page");
  else anchor.removeAttribute("aria-current");
}

// Where #/NAME/ARGUMENT leads: the page, what to do on arrival, what to do with each poll.
const ROUTES = {
  "": () => ["live", () => live && last && showStock()],
  skus: (id) => (id === undefined ? ["skus", showSkus] : ["sku", () => openSku(id)]),
  "new-sku": () => ["sku", () => openSku(null)],
  orders: (text) => ["orders", () => openOrders(text || "")],
  payments: (state) => ["payments", () => openPayments(state)],
  "dead-letters": (which) => ["letters", () => openLetters(which === "discarded")],
  events: (which) => ["events", () => openEvents(which)],
  nodes: () => ["nodes", () => {}],
  checks: () => ["checks", showReadiness],
};
const ON_POLL = { live: showLive, skus: showSkus, sku: showSku, events: showSinks, checks: showReadiness };

let page = "";

function route() {
  const [name, argument] = location.hash.replace(/^#\/?/, "").split("/");
  let to;
  try {
    to = argument === undefined ? undefined : decodeURIComponent(argument);
  } catch {
    to = argument;
  }
  const [shown, arrive] = (ROUTES[name] || ROUTES[""])(to);
  const moved = page !== "";
  page = shown;
  for (const box of document.querySelectorAll(".page")) box.hidden = box.id !== shown;
  for (const anchor of document.querySelectorAll("nav a"))
    markCurrent(
      anchor,
      anchor.getAttribute("href") === "#/" + (name === "new-sku" ? "skus" : ROUTES[name] ? name : ""),
    );
  // Those who hear the page begin at its content; the first page is left to the browser.
  if (moved) {
    $("content").focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  arrive();
}

let asking = false;
let polls = 0;

async function poll() {
  if (asking) return;
  asking = true;
  const signal = AbortSignal.timeout(4000);
  try {
    if (polls++ % 3 === 0 || (live && live.state !== "ready"))
      ({ checks, warnings } = await (await fetch("/readyz", { cache: "no-store", signal })).json());
    live = await answerOf(ADMIN + "live", { signal });
    if (live.state !== "recovering" && polls % NODES_EVERY === 1) readNodes();
    clockAhead = Date.parse(live.now) - Date.now();
    const figures = record(performance.now());
    showState();
    say($("clock"), "As of " + new Date(live.now).toLocaleTimeString());
    if (ON_POLL[page]) ON_POLL[page](figures);
  } catch (error) {
    console.warn(error);
    live = null;
    showState();
  } finally {
    asking = false;
  }
}

$("logout").hidden = document.body.dataset.access !== "session";
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("content").focus();
});
addEventListener("hashchange", () => {
  if ($("ask").open) $("ask").close();
  route();
});
route();
poll();
setInterval(poll, EVERY_MS);
