// --- Page: checks -----------------------------------------------------------------------------

const table = (titles, rows) =>
  el(
    "table",
    { className: "list" },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        titles.map((title) => el("th", { scope: "col" }, title)),
      ),
    ),
    el("tbody", {}, rows),
  );

function showReadiness() {
  const shown = [
    ...checks.map(({ name, ok, detail }) => [ok ? "ok" : "fails", ok ? "good" : "bad", name, detail]),
    ...warnings.map(({ name, detail }) => ["warning", "warn", name, detail]),
  ];
  keyed(
    $("readiness"),
    shown.map((row, i) => [i + row[2], ...row]),
    ([key]) => key,
    ([, , , name]) => el("tr", {}, el("td"), el("td", {}, el("code", {}, name)), el("td")),
    (row, [, word, is, , detail]) => {
      if (row.firstChild.textContent !== word) row.firstChild.replaceChildren(chip(word, is));
      say(row.lastChild, detail);
    },
  );
}

async function audit() {
  const note = $("audit-note");
  $("audit").disabled = true;
  say(note, "reading every row; this takes a second for each million orders…");
  try {
    const report = await answerOf(ADMIN + "audit");
    say(
      note,
      (report.ok ? "every promise holds" : "something does not add up") + ", " + new Date().toLocaleTimeString(),
    );
    // What fails first: that is what somebody looks for.
    const sorted = [...report.checks].sort((a, b) => a.ok - b.ok);
    $("audit-report").replaceChildren(
      table(
        ["", "Promise", "Check", "Found"],
        sorted.map((check) =>
          el(
            "tr",
            {},
            el("td", {}, chip(check.ok ? "ok" : "wrong", check.ok ? "good" : "bad")),
            el("td", { "data-name": "Promise" }, check.promise),
            el("td", {}, check.name),
            el("td", {}, check.detail),
          ),
        ),
      ),
    );
  } catch (failure) {
    say(note, "failed: " + reasonOf(failure));
  } finally {
    $("audit").disabled = false;
  }
}

async function preflight(prepare) {
  const note = $("preflight-note");
  const buttons = [$("preflight"), $("prepare")];
  for (const button of buttons) button.disabled = true;
  say(note, "measuring, some ten seconds…");
  try {
    showPreflight(await answerOf(ADMIN + "preflight?prepare=" + prepare, { method: "POST" }));
  } catch (failure) {
    say(note, "failed: " + reasonOf(failure));
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

function showPreflight(report) {
  const mark = { good: ["ok", "good"], warn: ["better", "warn"], bad: ["bad", "bad"], unknown: ["not known", ""] };
  const name = (text) => words(text).replace("wal ", "WAL ");
  say(
    $("preflight-note"),
    (report.ok ? "nothing is bad" : "mend what is bad before the sale opens") +
      ", " +
      new Date(report.at).toLocaleTimeString() +
      ", for " +
      count(report.orders) +
      " orders",
  );
  const row = ([word, is], title, found, remedy, sql) =>
    el(
      "tr",
      {},
      el("td", {}, chip(word, is)),
      el("td", {}, title),
      el("td", {}, found),
      el(
        "td",
        {},
        remedy,
        sql.map((statement) => el("pre", {}, statement)),
      ),
    );
  $("preflight-report").replaceChildren(
    table(
      ["", "Check", "Found", "Remedy"],
      [
        ...(report.prepared || []).map((s) =>
          row(s.done ? ["done", "good"] : ["not done", "warn"], "prepare: " + name(s.name), s.detail, "", s.sql),
        ),
        ...report.checks.map((c) => row(mark[c.verdict], name(c.name), c.figure, c.remedy || "", c.sql)),
      ],
    ),
  );
}

$("audit").addEventListener("click", audit);
$("preflight").addEventListener("click", () => preflight(false));
$("prepare").addEventListener("click", () =>
  ask({
    title: "Prepare the database for a sale?",
    yes: "Prepare and look",
    text: [
      "Reads stock and newest orders into memory, makes the WAL segments that the sale will need, and waits for a checkpoint. Commits become slower meanwhile: do it an hour before a sale, never during one.",
    ],
    act: async () => {
      preflight(true);
    },
    done: "Preparing and looking; the result comes below.",
  }),
);
