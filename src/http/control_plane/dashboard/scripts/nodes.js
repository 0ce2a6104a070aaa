// --- Page: nodes ------------------------------------------------------------------------------

const LANES = 64;
// How long ago the nodes were read at most, in polls.
const NODES_EVERY = 3;

// The last answer of the control plane; null before the first.
let cluster = null;

// The word for a node, how bad it is, and what it means.
function nodeWord(node) {
  if (node.state === "active" && node.drain)
    return node.lanes
      ? ["handing over", "warn", "Its lanes go to the other nodes."]
      : ["drained", "warn", "It has no lanes, passes requests on, and gets none until its process starts again."];
  return (
    {
      active: ["active", "good", ""],
      joining: ["joining", "warn", "It reads its order log, or waits for another node to read it."],
      dead: [
        "gone",
        "bad",
        "Node " + node.taken_over_by + " replays its order log. Until then its buyers get 503 with Retry-After: 1.",
      ],
      left: ["left", "", "It has handed everything over, or what it had was taken over."],
    }[node.state] || [words(node.state), "", ""]
  );
}

// Reads the nodes out of the database, which may be away: nothing waits for it. A process on its own has none, and no
// page of them.
let readingNodes = false;
async function readNodes() {
  if (readingNodes) return;
  readingNodes = true;
  try {
    cluster = await read("nodes");
    $("nav-nodes").hidden = cluster.node === null;
    badge($("count-nodes"), cluster.nodes.filter((node) => node.state === "dead").length, true);
    showNodes();
  } catch (failure) {
    say($("nodes-note"), "The nodes cannot be read: " + reasonOf(failure));
  } finally {
    readingNodes = false;
  }
}

function showNodes() {
  if (!cluster) return;
  const { nodes } = cluster;
  const active = nodes.filter((node) => node.state === "active");
  const shown = nodes.filter((node) => node.state !== "left" || node.lanes || node.log_in_use);
  const lanes = nodes.reduce((sum, node) => sum + node.lanes, 0);
  const blocked = nodes.reduce((sum, node) => sum + node.lanes_blocked, 0);
  say(
    $("nodes-note"),
    many(active.length, "node is", "nodes are") +
      " active" +
      (blocked ? "; " + many(blocked, "lane waits", "lanes wait") + " for the log of a node that is gone" : "") +
      (lanes < LANES ? "; " + many(LANES - lanes, "lane is", "lanes are") + " nobody’s" : ""),
  );
  say(
    $("nodes-left"),
    shown.length < nodes.length ? many(nodes.length - shown.length, "node has", "nodes have") + " left." : "",
  );
  keyed(
    $("nodes-rows"),
    shown,
    (node) => node.node,
    (node) =>
      el(
        "tr",
        {},
        el("td", {}, el("b", {}, "Node " + node.node), el("small"), el("span")),
        el(
          "td",
          { "data-name": "Lanes" },
          el("div", { className: "gauge" }, el("i", { className: "s" }), el("i", { className: "h" })),
          el("small"),
        ),
        el("td", { "data-name": "Units" }, el("span"), el("small")),
        el("td", { "data-name": "Order log" }, el("span"), el("small")),
        el(
          "td",
          {},
          el(
            "div",
            { className: "acts" },
            button("Drain…", () => drainNode(node.node)),
          ),
        ),
      ),
    (row, node) => {
      const [name, has, units, log, acts] = row.children;
      const [word, is, means] = nodeWord(node);
      say(name.children[1], (node.address || "no address") + (node.node === cluster.node ? ", this process" : ""));
      if (name.children[2].dataset.now !== word + means) {
        name.children[2].replaceChildren(chip(word, is, means), means && el("small", {}, means));
        name.children[2].dataset.now = word + means;
      }
      const [open, shut] = has.firstChild.children;
      open.style.width = (100 * (node.lanes - node.lanes_blocked)) / LANES + "%";
      shut.style.width = (100 * node.lanes_blocked) / LANES + "%";
      say(
        has.lastChild,
        many(node.lanes, "lane") +
          (node.lanes_blocked ? ", " + count(node.lanes_blocked) + " blocked" : "") +
          (node.node === cluster.node ? ", " + count(cluster.lanes_open_here) + " open here" : ""),
      );
      say(units.firstChild, many(node.units_lent, "unit") + " lent");
      say(units.lastChild, count(node.units_held) + " of them held");
      say(log.firstChild, node.log || "none");
      const taken = nodes.filter((other) => other.taken_over_by === node.node).map((other) => other.node);
      say(
        log.lastChild,
        taken.length
          ? "takes over node " + taken.join(", ")
          : node.log_in_use
            ? "may hold orders that are not rows yet"
            : node.log
              ? "nothing is left in it"
              : "",
      );
      acts.firstChild.firstChild.hidden = node.state !== "active" || node.drain;
    },
  );
}

function drainNode(number) {
  const node = cluster.nodes.find((node) => node.node === number);
  const others = cluster.nodes.filter((other) => other.state === "active" && !other.drain && other.node !== number);
  ask({
    title: "Drain node " + number + "?",
    danger: true,
    yes: "Drain",
    text: others.length
      ? [
          "It hands its " +
            many(node.lanes, "lane") +
            " and " +
            many(node.units_lent, "unit") +
            " to " +
            (others.length === 1 ? "node " + others[0].node : "the other " + count(others.length) + " nodes") +
            ". While a lane moves, its buyers get 503 with Retry-After: 1; nothing is lost.",
          "It gets no lane until its process starts again. It goes on answering by passing requests on, so take it out of the load balancer next, and stop it then.",
        ]
      : [
          "No other node is active and takes lanes, so it keeps all of its own, and goes on serving them. Start another node first.",
        ],
    act: () => send("POST", "nodes/" + number + "/drain"),
    done: () => {
      readNodes();
      return "Node " + number + " hands its lanes over.";
    },
    unsure: "It may or may not be asked to: see its row. Asking again does no harm.",
  });
}
