// --- Asking before something is done ----------------------------------------------------------

// Tells what has been done, for some seconds.
let saidUntil = 0;
function tell(text) {
  say($("said"), text);
  clearTimeout(saidUntil);
  saidUntil = setTimeout(() => say($("said"), ""), 8000);
}

// Asks before `act` is done, and names its consequence.
//
// `text`: lines or elements. `fields`: {name, label, hint, type, required, value, on}. `act` gets their values; the
// dialog stays open, with the reason, if it throws. `unsure`: what to say if no answer comes. `done`: what to tell.
let asked = 0;
function ask({ title, text = [], fields = [], yes, danger = false, act, unsure, done, no = "Cancel" }) {
  const dialog = $("ask");
  const error = $("ask-error");
  const mine = ++asked;
  if (dialog.open) dialog.close();
  say($("ask-title"), title);
  error.textContent = "";
  $("ask-text").replaceChildren(...[text].flat().map((line) => (typeof line === "string" ? el("p", {}, line) : line)));
  const inputs = fields.map((field) => {
    const input = el("input", {
      id: "ask-" + field.name,
      name: field.name,
      type: field.type || "text",
      autocomplete: "off",
      ...field.set,
    });
    if (field.value !== undefined) input.value = field.value;
    if (field.required) input.required = true;
    if (field.on) input.addEventListener("input", () => field.on(input.value));
    return input;
  });
  $("ask-fields").replaceChildren(
    ...fields.map((field, i) => {
      const hint = field.hint && el("small", {}, field.hint);
      const label =
        inputs[i].type === "checkbox"
          ? el("label", {}, inputs[i], field.label)
          : el("label", { for: inputs[i].id }, field.label);
      return el("div", { className: "field" }, label, inputs[i].type === "checkbox" ? null : inputs[i], hint);
    }),
  );
  const go = $("ask-yes");
  go.hidden = !yes;
  say(go, yes || "");
  go.className = danger ? "danger" : "go";
  go.disabled = false;
  say($("ask-no"), no);
  $("ask-form").onsubmit = async (event) => {
    event.preventDefault();
    if (!yes || go.disabled) return;
    const missing = inputs.find((input) => input.required && !input.value.trim());
    for (const input of inputs) input.setAttribute("aria-invalid", String(input === missing));
    if (missing) {
      error.textContent = "“" + fields[inputs.indexOf(missing)].label + "” is needed.";
      missing.focus();
      return;
    }
    const values = Object.fromEntries(
      inputs.map((input) => [input.name, input.type === "checkbox" ? input.checked : input.value.trim()]),
    );
    go.disabled = true;
    error.textContent = "";
    // Somebody may have left it while it was under way, and opened another.
    const isOpen = () => dialog.open && asked === mine;
    try {
      const result = await act(values);
      if (isOpen()) dialog.close();
      tell(typeof done === "function" ? done(result) : done || "Done.");
      poll();
    } catch (failure) {
      const unknown = !(failure instanceof Refused) && !(failure instanceof Unfit);
      if (unknown) console.warn(failure);
      const text = unknown
        ? NO_ANSWER + " " + (unsure || "The request may or may not have taken effect: look before you repeat it.")
        : failure.message;
      if (isOpen()) error.textContent = text;
      else tell(title + " " + text);
    } finally {
      if (asked === mine) {
        go.disabled = false;
        say(go, yes);
      }
    }
  };
  dialog.showModal();
  // Enter must not do what has not been read yet.
  (inputs[0] || (danger ? $("ask-no") : go)).focus();
}

// Input that is wrong, found before anything is sent.
class Unfit extends Error {}

$("ask-no").addEventListener("click", () => $("ask").close());
