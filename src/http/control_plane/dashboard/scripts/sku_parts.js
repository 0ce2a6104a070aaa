// --- What is shown of a SKU in several places -------------------------------------------------

const STATE_WORDS = {
  open: ["open", "good"],
  not_open: ["not open yet", ""],
  closed: ["closed", ""],
  paused: ["paused", "warn"],
  sold_out: ["sold out", "bad"],
  entries_open: ["entries until the draw", "good"],
  entries_fixed: ["before the draw", "warn"],
  drawn: ["drawn", "good"],
};

function stateChip(sku) {
  if (sku.counters_refused)
    return chip("paused by the database", "bad", "Resuming cannot help until its row is mended.");
  if (live && live.paused) return chip("paused with all sales", "warn");
  const [word, is] = STATE_WORDS[sku.state] || [words(sku.state), ""];
  return chip(word, is);
}

function units(sku) {
  const share = (n) => (sku.total ? (100 * n) / sku.total : 0) + "%";
  const sold = el("i", { className: "s" });
  const held = el("i", { className: "h" });
  sold.style.width = share(sku.sold);
  held.style.width = share(sku.held);
  const unit = (n, word, key) => el("span", {}, key && el("i", { className: key }), el("b", {}, count(n)), " " + word);
  return [
    el("div", { className: "gauge", "aria-hidden": "true" }, sold, held),
    el(
      "div",
      { className: "units" },
      unit(sku.free, "free", "f"),
      unit(sku.held, "held", "h"),
      unit(sku.sold, "sold", "s"),
      unit(sku.total, "in total"),
      sku.waiting
        ? el("span", {}, el("b", {}, count(sku.waiting)), sku.waiting === 1 ? " order waits" : " orders wait")
        : null,
    ),
  ];
}

// The button that pauses or resumes a SKU, or says why resuming cannot help.
function pauseButton(id) {
  return button("Pause", () => {
    const sku = skuNow(id);
    if (sku) pauseOrResume(sku);
    else tell(NO_ANSWER);
  });
}

const skuNow = (id) => live && live.skus.find((sku) => sku.sku_id === id);

function showPauseButton(box, sku) {
  const refused = Boolean(sku.counters_refused);
  say(box, refused ? "Cannot resume…" : sku.paused ? "Resume" : "Pause");
  const all = live.paused && !refused;
  box.disabled = all;
  box.title = all
    ? "Every sale is paused: resume them all first."
    : refused
      ? "The database refuses its counters; resuming cannot help."
      : "";
}

function pauseOrResume(sku) {
  const id = sku.sku_id;
  const path = "skus/" + encodeURIComponent(id);
  if (sku.counters_refused) {
    explainRefused(sku);
    return;
  }
  if (!sku.paused) {
    ask({
      title: "Pause the sale of " + id + "?",
      danger: true,
      yes: "Pause",
      text: [
        "Every new order of " + id + " is refused with 409 sale_paused from this moment on; other SKUs go on.",
        "Its " +
          many(sku.held, "held unit stays", "held units stay") +
          " held: those orders are written, can be paid and expire as usual. The pause survives restarts.",
      ],
      act: () => send("POST", path + "/pause"),
      done: id + " is paused.",
      unsure: "The pause may or may not be in force: see the state of the SKU.",
    });
  } else {
    ask({
      title: "Resume the sale of " + id + "?",
      yes: "Resume",
      text: [
        "New orders are taken again at once, within the sale's window. " +
          many(sku.free, "unit is", "units are") +
          " free.",
      ],
      act: () => send("POST", path + "/resume"),
      done: id + " is resumed.",
    });
  }
}

// What helps a SKU whose counters the database refuses.
function refusedHelp(sku) {
  return [
    el(
      "p",
      {},
      el(
        "b",
        {},
        "The database refuses the counters of " +
          sku.sku_id +
          ", so its sale is paused. Resuming cannot help until its row agrees with its orders.",
      ),
      " Other SKUs go on.",
    ),
    el("p", {}, "The database says: ", el("code", {}, sku.counters_refused.reason)),
    el(
      "ol",
      {},
      el("li", {}, "Find the difference: run the ", link("checks", "audit"), "."),
      el(
        "li",
        {},
        "Undo exactly that edit of the row in the table ",
        el("code", {}, "sku"),
        ", or drop the constraint or trigger that was added to it.",
      ),
      el(
        "li",
        {},
        "It is tried again by itself every few seconds: " +
          many(sku.counters_refused.parked, "parked order becomes a row", "parked orders become rows") +
          ", and the sale resumes.",
      ),
    ),
  ];
}

function explainRefused(sku) {
  ask({
    title: "Resuming " + sku.sku_id + " cannot help yet",
    text: refusedHelp(sku),
    yes: "Try the counters now",
    no: "Close",
    act: () => send("POST", "skus/" + encodeURIComponent(sku.sku_id) + "/resume"),
    done: "The database accepts the counters again; " + sku.sku_id + " is resumed.",
  });
}

// Adds units to a sale, or takes some off. The same key goes with the same number of units, however often it is sent.
function restock(id) {
  const sku = skuNow(id);
  if (!sku) {
    tell(NO_ANSWER);
    return;
  }
  const preview = el("p", { className: "soft", role: "status" });
  let key = freshKey();
  let keyOf = "";
  const show = (text) => {
    const units = Number(text);
    const now = skuNow(id) || sku;
    say(
      preview,
      !text.trim()
        ? now.sku_id + " has " + count(now.total) + " in total, " + count(now.free) + " of them free."
        : !Number.isSafeInteger(units) || units === 0
          ? "A whole number other than 0."
          : units > 0
            ? many(units, "unit") +
              " more can be bought at once: " +
              count(now.total) +
              " become " +
              count(now.total + units) +
              " in total."
            : -units > now.free
              ? "Only " + count(now.free) + " are free: fewer than " + count(-units) + " can leave the sale."
              : many(-units, "free unit leaves", "free units leave") +
                " the sale and can no longer be bought: " +
                count(now.total) +
                " become " +
                count(now.total + units) +
                " in total.",
    );
  };
  show("");
  ask({
    title: "Restock " + id,
    yes: "Restock",
    text: [preview],
    fields: [
      {
        name: "quantity",
        label: "Units to add",
        hint: "A negative number takes free units off the sale.",
        required: true,
        set: { inputMode: "text" },
        on: show,
      },
    ],
    act: ({ quantity }) => {
      const units = Number(quantity);
      if (!Number.isSafeInteger(units) || units === 0) throw new Unfit("Units: a whole number other than 0.");
      if (keyOf !== quantity) {
        if (keyOf) key = freshKey();
        keyOf = quantity;
      }
      return send(
        "POST",
        "skus/" + encodeURIComponent(id) + "/restock",
        { quantity: units },
        { "Idempotency-Key": key },
      );
    },
    unsure: "Press Restock again: under the same key it is done only once.",
    done: (now) => id + " has " + count(now.total) + " in total now, " + count(now.free) + " free.",
  });
}
