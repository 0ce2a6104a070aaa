// --- The control plane ------------------------------------------------------------------------

const ADMIN = "/admin/v1/";
const NO_ANSWER = "The control plane does not answer.";

// What the control plane refused or failed at, in its own words.
class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || "the control plane answered " + status);
    this.status = status;
    this.code = problem.code || "";
    this.problem = problem;
  }
}

async function answerOf(path, options) {
  const answer = await fetch(path, { cache: "no-store", ...options });
  // The session is over: the page that comes instead asks for the token.
  if (answer.status === 401) {
    location.reload();
    await new Promise(() => {});
  }
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, body);
  return body;
}

const read = (path) => answerOf(ADMIN + path, { signal: AbortSignal.timeout(20000) });

// A change. Without a body an empty one is sent.
function send(method, path, body, headers = {}) {
  const json =
    body === undefined
      ? {}
      : { body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } };
  return answerOf(ADMIN + path, { method, ...json });
}

// Random, for an Idempotency-Key. Not `randomUUID`, which needs TLS or loopback.
const freshKey = () =>
  "dashboard-" +
  [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// The reason why a call failed, for people.
const reasonOf = (error) => (error instanceof Refused ? error.message : NO_ANSWER);
