/** What the form of settings says, as fields of a request. */

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const LARGEST_SEED = 2 ** 32;

/** Offers the drafters and shapes that the server can use. */
export function offer({ proposers, drafters, shapes }) {
  document.getElementById("own").textContent = `(${proposers.join(", ") || "none"})`;
  document.getElementById("shapes").replaceChildren(...shapes.map((shape) => new Option(shape, shape)));
  document.getElementById("drafters").replaceChildren(...drafters.map(check));
}

function check(name) {
  const label = document.createElement("label");
  const box = document.createElement("input");
  Object.assign(box, { type: "checkbox", name: "drafter", value: name });
  box.addEventListener("change", () => (form.elements.way.value = "some"));
  label.append(box, ` ${name}`);
  return label;
}

/** The fields of a request, without its messages. A seed is drawn where none is given. */
export function fields() {
  const given = new FormData(form);
  const found = { seed: Math.floor(Math.random() * LARGEST_SEED) };
  for (const name of ["temperature", "seed", "max_tokens"]) {
    if (given.get(name) !== "") found[name] = Number(given.get(name));
  }
  const speculation = speculationOf(given);
  return speculation ? { ...found, speculation } : found;
}

function speculationOf(given) {
  if (given.get("way") === "off") return "off";
  const found = {};
  const chosen = given.getAll("drafter");
  if (given.get("way") === "some" && chosen.length) found.drafter = chosen.join("+");
  if (given.get("shape").trim()) found.shape = given.get("shape").trim();
  return Object.keys(found).length ? found : null;
}

export const systemPrompt = () => new FormData(form).get("system").trim();
export const openSettings = () => dialog.showModal();
