// --- Page: sinks of events, and what they did not take ----------------------------------------

const SINK_STATES = {
  delivering: "good",
  refilling: "warn",
  failing: "bad",
  disabled: "bad",
  elsewhere: "",
  starting: "warn",
};

let eventLetters = { shown: false, limit: PAGE };

const size = (bytes) => (bytes < 1 << 20 ? count(bytes / 1024) + " KiB" : count(bytes / 2 ** 20) + " MiB");

function showSinks() {
  if (!live) return;
  say($("sinks-empty"), live.sinks.length ? "" : "No sink is configured: nobody else hears of orders.");
  $("sinks-table").hidden = !live.sinks.length;
  keyed(
    $("sinks-rows"),
    live.sinks,
    (sink) => sink.name,
    (sink) =>
      el(
        "tr",
        {},
        el("td", {}, el("b", {}, sink.name), el("small", {}, sink.to)),
        el("td", {}, chip("", ""), el("small")),
        el("td", { "data-name": "Delivered up to" }),
        el("td", { "data-name": "Behind" }),
        el("td", { "data-name": "Not taken" }),
        el("td", {}, el("div", { className: "acts" }, button("Resync…", () => resync(sink.name)))),
      ),
    (row, sink) => {
      const [, state, place, behind, left] = row.children;
      say(state.firstChild, sink.state);
      state.firstChild.dataset.is = SINK_STATES[sink.state] || "";
      say(state.lastChild, sink.reason || "");
      if (place.dataset.at !== String(sink.place_at)) {
        place.dataset.at = String(sink.place_at);
        place.replaceChildren(moment(sink.place_at) || "nothing yet");
      }
      say(
        behind,
        (sink.behind_ms < 1000 ? "by nothing" : "by " + age(sink.behind_ms / 1000)) +
          "; the database keeps " +
          size(sink.kept_bytes),
      );
      say(left, many(sink.waiting, "waits", "wait") + ", " + many(sink.dead_letters, "dead letter"));
    },
  );
}

function resync(name) {
  const sink = live.sinks.find((sink) => sink.name === name);
  ask({
    title: "Refill " + name + " from the rows?",
    danger: true,
    yes: "Refill",
    text: [
      "Every order, dead letter and open payment that has changed since its place is told to it again, as it stands now, marked resync: true. It hears again what it knows, and never the changes in between.",
      ...(sink.state === "disabled" ? ["It is disabled now, and gets events again from this moment on."] : []),
    ],
    fields: [
      {
        name: "after",
        label: "Orders above",
        hint: "Empty: what has changed since its place. 0: every order that there is, which may be millions. An order's id: those with a higher one.",
        set: { inputMode: "numeric", maxLength: 19 },
      },
    ],
    act: ({ after }) =>
      send("POST", "events/" + encodeURIComponent(name) + "/resync" + (after && "?after=" + encodeURIComponent(after))),
    done: name + " is refilled from the rows.",
    unsure: "Asking again does no harm: look at its state first.",
  });
}

function eventCard(letter) {
  const order = (letter.event && letter.event.data.order_id) || null;
  return el(
    "li",
    { className: "card" },
    el(
      "div",
      { className: "top" },
      el("b", {}, letter.type),
      chip("not taken by " + letter.sink, "bad"),
      el(
        "div",
        { className: "acts" },
        button("Retry…", () => retryEvent(letter), { className: "go" }),
        button("Discard…", () => discardEvent(letter)),
      ),
    ),
    el("p", { className: "what" }, letter.reason),
    facts([
      ["Order", order && toOrder(order)],
      ["Event", letter.event_id],
      ["Tried", many(letter.attempts, "time")],
      ["Since", moment(letter.first_failed_at)],
      ["Given up", moment(letter.dead_at)],
    ]),
    letter.event && el("details", {}, el("summary", {}, "As it is sent"), el("pre", {}, JSON.stringify(letter.event, null, 2))),
  );
}

const retryOf = (letter) => send("POST", "event-dead-letters/" + letter.id + "/retry");

function retryEvent(letter) {
  ask({
    title: "Deliver " + letter.type + " to " + letter.sink + " again?",
    yes: "Retry",
    text: [
      "It is tried for another day, and is a dead letter again after that. Mend the receiver first: the reason is its answer.",
      "Later events of the order may have been delivered. A receiver that goes by the numbers of the ids ignores an old one; another one may go back to an old state.",
    ],
    act: () => retryOf(letter),
    done: () => {
      loadEventLetters();
      return letter.event_id + " is delivered again.";
    },
    unsure: "Refresh the list: it is there if nothing has happened.",
  });
}

function discardEvent(letter) {
  ask({
    title: "Discard " + letter.type + " for " + letter.sink + "?",
    danger: true,
    yes: "Discard",
    text: [letter.sink + " never hears of " + letter.event_id + ", unless it is refilled. The order itself stays as it is."],
    act: () => send("POST", "event-dead-letters/" + letter.id + "/discard"),
    done: () => {
      loadEventLetters();
      return "Discarded.";
    },
    unsure: "Refresh the list: it is there if nothing has happened.",
  });
}

function retryEvents() {
  ask({
    title: "Deliver every dead letter of an event again?",
    yes: "Retry all",
    text: [
      "Each is tried for another day, the oldest first. Mend the receivers first.",
      "A receiver that does not go by the numbers of the ids may go back to old states.",
    ],
    act: async () => {
      const all = (await read("event-dead-letters?limit=1000")).event_dead_letters.reverse();
      let retried = 0;
      for (const letter of all) {
        try {
          await retryOf(letter);
          retried++;
        } catch (failure) {
          // Somebody else has decided it.
          if (failure.code !== "unknown_dead_letter") throw failure;
        }
        say($("ask-yes"), count(retried) + " of " + count(all.length));
      }
      return retried;
    },
    done: (retried) => {
      loadEventLetters();
      return many(retried, "event is", "events are") + " delivered again.";
    },
    unsure: "Press Retry all again: one that is tried already stays so.",
  });
}

async function openEvents(which) {
  eventLetters = { shown: which === "dead-letters", limit: PAGE };
  for (const tab of $("events-tabs").children)
    markCurrent(tab, tab.getAttribute("href") === "#/events" + (eventLetters.shown ? "/dead-letters" : ""));
  $("sinks").hidden = eventLetters.shown;
  $("event-letters").hidden = !eventLetters.shown;
  if (eventLetters.shown) await loadEventLetters();
  else showSinks();
}

async function loadEventLetters() {
  const { limit } = eventLetters;
  const list = $("event-letters-list");
  try {
    const found = (await read("event-dead-letters?limit=" + limit)).event_dead_letters;
    list.replaceChildren(cardList(found.map(eventCard), "There is none. There is nothing to do here."));
    $("event-letters-more").hidden = found.length < limit || limit >= 1000;
    $("event-letters-all").hidden = found.length < 2;
  } catch (failure) {
    list.replaceChildren(el("p", { className: "note bad" }, reasonOf(failure)));
    $("event-letters-more").hidden = $("event-letters-all").hidden = true;
  }
}

$("event-letters-all").addEventListener("click", retryEvents);
$("event-letters-again").addEventListener("click", loadEventLetters);
$("event-letters-more").addEventListener("click", () => {
  eventLetters.limit = Math.min(1000, eventLetters.limit * 4);
  loadEventLetters();
});
