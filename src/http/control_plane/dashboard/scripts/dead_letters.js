// --- Page: dead letters -----------------------------------------------------------------------

let letters = { discarded: false, limit: PAGE };

function letterCard(letter, changed) {
  const open = !letter.discarded_at;
  return el(
    "li",
    { className: "card" },
    el(
      "div",
      { className: "top" },
      el("b", {}, many(letter.quantity, "unit") + " of " + letter.sku_id),
      chip(open ? "open" : "discarded", open ? "bad" : ""),
      open &&
        el(
          "div",
          { className: "acts" },
          button("Retry…", () => retryLetter(letter, changed), { className: "go" }),
          button("Discard…", () => discardLetter(letter, changed)),
        ),
    ),
    el("p", { className: "what" }, el("code", {}, letter.sqlstate), " ", letter.reason),
    facts([
      ["Order", toOrder(letter.order_id)],
      ["Buyer", toOrder(letter.user_id)],
      ["Amount", money(letter.amount, letter.currency)],
      ["Refused", moment(letter.at)],
      ["Discarded", moment(letter.discarded_at)],
      ["Note", letter.note],
    ]),
    letter.attributes &&
      el("details", {}, el("summary", {}, "Attributes"), el("pre", {}, JSON.stringify(letter.attributes, null, 2))),
  );
}

function retryLetter(letter, changed) {
  ask({
    title: "Retry the order of " + letter.user_id + "?",
    yes: "Retry",
    text: [
      "Holds " +
        many(letter.quantity, "unit") +
        " of " +
        letter.sku_id +
        " again and writes the row. The buyer may then pay " +
        money(letter.amount, letter.currency) +
        " within the usual time from now. The buyer was told 500 before, and has to be told.",
      "If the cause is still there, the database refuses it again and nothing changes.",
    ],
    act: () => send("POST", "dead-letters/" + letter.id + "/retry"),
    done: () => {
      changed();
      return "Order " + letter.order_id + " is written and payable.";
    },
    unsure: "Press Retry again: an order is written only once.",
  });
}

function discardLetter(letter, changed) {
  ask({
    title: "Discard the order of " + letter.user_id + "?",
    danger: true,
    yes: "Discard",
    text: ["Order " + letter.order_id + " stays failed for good and holds nothing. It cannot be retried any more."],
    fields: [{ name: "note", label: "Note", hint: "For the books: was the buyer told?", set: { maxLength: 1000 } }],
    act: ({ note }) => send("POST", "dead-letters/" + letter.id + "/discard", note ? { note } : {}),
    done: () => {
      changed();
      return "Discarded.";
    },
    unsure: "It may or may not be discarded: refresh the list.",
  });
}

// One after the other, until one is refused: the next would be, too.
function retryAll() {
  ask({
    title: "Retry every open dead letter?",
    yes: "Retry all",
    text: [
      "Retries the open ones, the oldest first: each holds its units again, its row is written, and its buyer may pay from now. Mend the cause first.",
      "It ends with the first that is refused again. Those that find no free unit stay open.",
    ],
    act: async () => {
      const open = (await read("dead-letters?limit=1000")).dead_letters.reverse();
      let written = 0;
      let without = 0;
      for (const letter of open) {
        try {
          await send("POST", "dead-letters/" + letter.id + "/retry");
          written++;
        } catch (failure) {
          if (failure.code === "sold_out") {
            without++;
            continue;
          }
          if (failure.code === "unknown_dead_letter") continue;
          if (!(failure instanceof Refused)) throw failure;
          throw new Unfit(
            many(written, "order is", "orders are") +
              " written. Then order " +
              letter.order_id +
              " was refused: " +
              failure.message,
          );
        } finally {
          say($("ask-yes"), count(written + without) + " of " + count(open.length));
        }
      }
      return [written, without];
    },
    done: ([written, without]) => {
      openLetters(letters.discarded);
      return (
        many(written, "order is", "orders are") +
        " written and payable" +
        (without ? "; " + count(without) + " found no free unit." : ".")
      );
    },
    unsure: "Press Retry all again: an order is written only once.",
  });
}

async function openLetters(discarded) {
  letters = { discarded, limit: PAGE };
  for (const tab of $("letters-tabs").children)
    markCurrent(tab, tab.getAttribute("href") === (discarded ? "#/dead-letters/discarded" : "#/dead-letters"));
  await loadLetters();
}

async function loadLetters() {
  const { discarded, limit } = letters;
  const list = $("letters-list");
  try {
    const found = (await read("dead-letters?limit=" + limit + (discarded ? "&discarded=true" : ""))).dead_letters;
    list.replaceChildren(
      cardList(
        found.map((letter) => letterCard(letter, loadLetters)),
        discarded ? "There has been none." : "None is open. There is nothing to do here.",
      ),
    );
    $("letters-more").hidden = found.length < limit || limit >= 1000;
    $("letters-all").hidden = found.filter((letter) => !letter.discarded_at).length < 2;
  } catch (failure) {
    list.replaceChildren(el("p", { className: "note bad" }, reasonOf(failure)));
    $("letters-more").hidden = $("letters-all").hidden = true;
  }
}

$("letters-all").addEventListener("click", retryAll);
$("letters-again").addEventListener("click", loadLetters);
$("letters-more").addEventListener("click", () => {
  letters.limit = Math.min(1000, letters.limit * 4);
  loadLetters();
});
