// --- Drawings ---------------------------------------------------------------------------------

const KEEP = 120; // seconds

// The outcomes of the orders-a-second chart, from the bottom up: colour, name, values of `live.orders`. What is in no
// group is shown as the last.
const GROUPS = [
  ["placed", "placed", ["created"]],
  ["accepted", "accepted early or waitlisted", ["accepted", "waitlisted"]],
  ["replayed", "replayed", ["replayed"]],
  [
    "refused",
    "sold out or refused",
    [
      "sold_out",
      "waitlist_full",
      "draw_under_way",
      "purchase_limit",
      "sale_not_open",
      "sale_closed",
      "sale_paused",
    ],
  ],
  [
    "busy",
    "overloaded or rate-limited",
    ["overloaded", "rate_limited", "not_ready", "draining", "journal_full", "journal_failed", "queue_unavailable"],
  ],
  ["wrong", "invalid requests", ["unknown_sku", "invalid_field", "idempotency_key_reused", "other"]],
  ["lost", "late or failed", ["timed_out", "undecided", "unwritten", "failed"]],
];
// Answers that nobody should miss: name, values of `live.orders`, emphasis if there were any lately.
const TOTALS = [
  ["late or failed", GROUPS.find(([colour]) => colour === "lost")[2], "alarm"],
  ["overloaded", ["overloaded"], "hint"],
  ["refused while paused", ["sale_paused"]],
  [
    "refused with another 503",
    ["not_ready", "draining", "journal_full", "journal_failed", "queue_unavailable"],
    "hint",
  ],
];
const GROUPED = new Set(GROUPS.flatMap(([, , outcomes]) => outcomes));
const REST = ["other", "other outcomes"];

const css = (name) =>
  getComputedStyle(document.documentElement)
    .getPropertyValue("--" + name)
    .trim();

function surface(canvas) {
  const scale = window.devicePixelRatio || 1;
  const w = canvas.clientWidth;
  const h = canvas.clientHeight;
  if (canvas.width !== Math.round(w * scale) || canvas.height !== Math.round(h * scale)) {
    canvas.width = Math.round(w * scale);
    canvas.height = Math.round(h * scale);
  }
  const c = canvas.getContext("2d");
  c.setTransform(scale, 0, 0, scale, 0, 0);
  c.clearRect(0, 0, w, h);
  return [c, w, h];
}

// The least round number from `top` on.
function nice(top) {
  if (top <= 4) return 4;
  const unit = 10 ** Math.floor(Math.log10(top));
  return [1, 2, 2.5, 5, 10].map((m) => m * unit).find((m) => m >= top);
}

// Bars of one second each, one part a group; `rates` has the newest last.
function drawChart(canvas, rates) {
  const [c, w, h] = surface(canvas);
  const left = 52;
  const bottom = 18;
  const top = 6;
  const plot = h - bottom - top;
  const wide = w - left;
  const max = nice(Math.max(1, ...rates.map((groups) => groups.reduce((a, b) => a + b, 0))));
  c.font = "12px system-ui, sans-serif";
  c.textBaseline = "middle";
  c.textAlign = "right";
  for (const part of [0, 0.5, 1]) {
    const y = top + plot * (1 - part);
    c.strokeStyle = css("line");
    c.lineWidth = 1;
    c.beginPath();
    c.moveTo(left, Math.round(y) + 0.5);
    c.lineTo(w, Math.round(y) + 0.5);
    c.stroke();
    c.fillStyle = css("soft");
    c.fillText(count(max * part), left - 8, y);
  }
  const slot = wide / KEEP;
  const colours = [...GROUPS, REST].map(([colour]) => css(colour));
  rates.forEach((groups, i) => {
    const x = w - (rates.length - i) * slot;
    let y = top + plot;
    groups.forEach((n, g) => {
      const tall = (n / max) * plot;
      if (tall <= 0) return;
      c.fillStyle = colours[g];
      c.fillRect(x, y - tall, Math.max(1, slot - (slot > 4 ? 1 : 0)), tall);
      y -= tall;
    });
  });
  c.fillStyle = css("soft");
  c.textBaseline = "alphabetic";
  c.textAlign = "left";
  c.fillText("2 min ago", left, h - 3);
  c.textAlign = "right";
  c.fillText("now", w, h - 3);
}

// The free units of a SKU over the last two minutes.
function drawBurn(canvas, points, total) {
  const [c, w, h] = surface(canvas);
  const slot = w / (KEEP - 1);
  const y = (n) => h - 2 - (h - 4) * (total ? n / total : 0);
  c.fillStyle = css("track");
  c.fillRect(0, h - 1, w, 1);
  if (points.length < 2) return;
  c.beginPath();
  points.forEach((n, i) => {
    const x = w - (points.length - 1 - i) * slot;
    if (i) c.lineTo(x, y(n));
    else c.moveTo(x, y(n));
  });
  c.strokeStyle = css("act");
  c.lineWidth = 2;
  c.lineJoin = "round";
  c.stroke();
  c.lineTo(w, h - 1);
  c.lineTo(w - (points.length - 1) * slot, h - 1);
  c.closePath();
  c.globalAlpha = 0.14;
  c.fillStyle = css("act");
  c.fill();
  c.globalAlpha = 1;
}
