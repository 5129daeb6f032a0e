/** The page: a chat, with the steps of its answers beside it. */

import { Answer } from "./answer.js";
import { getJson, keepKey } from "./api.js";
import { fields, offer, openSettings, systemPrompt } from "./settings.js";
import { Steps } from "./steps.js";
import { Turn } from "./turn.js";

const at = (id) => document.getElementById(id);
const AGAIN = 1000; // milliseconds after which a server that isn't ready is asked again
const turns = [];
const steps = new Steps((answer, step) => turns.forEach((turn) => turn.mark(answer, step)));
let stopper = null; // of the answer that comes now

const show = (answer, step) => steps.show(answer, step);

function notice(text = "") {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

// -- one answer at a time --------------------------------------------------------------------------------------------

/** Writes an answer of a turn. Returns whether the server gave one, be it stopped. */
async function run(turn, answer) {
  stopper = new AbortController();
  let asked = false;
  const draw = () => {
    asked = false;
    turn.update(stopper !== null);
    steps.update();
    if (stopper) toEnd(turn);
  };
  const changed = () => {
    if (!asked) requestAnimationFrame(draw);
    asked = true;
  };
  buttons();
  notice();
  for (const each of turns) each.update(true);
  try {
    await answer.run(stopper.signal, changed);
    return true;
  } catch (error) {
    refused(error);
    return false;
  } finally {
    stopper = null;
    buttons();
    for (const each of turns) each.update(false);
    steps.update();
  }
}

/** One button sends or stops; it keeps the focus. */
function buttons() {
  const [shown, hidden] = stopper ? [at("stop"), at("send")] : [at("send"), at("stop")];
  const held = document.activeElement === hidden;
  shown.hidden = false;
  hidden.hidden = true;
  if (held) shown.focus();
  at("fresh").disabled = stopper !== null;
}

/** Keeps the end of a growing answer in sight of who was looking at it. */
function toEnd(turn) {
  const place = at("scroll");
  if (turn === turns.at(-1) && place.scrollHeight - place.scrollTop - place.clientHeight < 150) {
    place.scrollTop = place.scrollHeight;
  }
}

function refused(error) {
  notice(error.status === undefined ? "The server can't be reached." : sentence(error.message));
  if (error.status === 401) askForKey();
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${text.endsWith(".") ? "" : "."}`;

// -- the conversation ------------------------------------------------------------------------------------------------

function messages(text) {
  const system = systemPrompt();
  const before = turns.filter((turn) => turn.answer.text).flatMap((turn) => [
    { role: "user", content: turn.text }, { role: "assistant", content: turn.answer.text },
  ]);
  return [...(system ? [{ role: "system", content: system }] : []), ...before, { role: "user", content: text }];
}

async function send() {
  const text = at("message").value.trim();
  if (!text || stopper) return;
  const answer = new Answer({ messages: messages(text), ...fields() });
  const turn = new Turn(text, answer, show, compare);
  turns.push(turn);
  at("welcome").hidden = true;
  at("turns").append(turn.root);
  turn.root.scrollIntoView({ block: "nearest" });
  at("message").value = "";
  steps.show(answer);
  const answered = await run(turn, answer);
  if (!answered && !answer.ids.length) { // the message can be sent again
    turns.pop();
    turn.root.remove();
    at("message").value = text;
  }
}

/** Decodes the same plainly: the same messages, options and seed. */
async function compare(turn) {
  if (stopper) return;
  const { body, ids, state } = turn.answer;
  const same = { ...body, speculation: "off" };
  if (state !== "done") same.max_tokens = ids.length;
  const plain = new Answer(same);
  turn.beside(plain);
  if (await run(turn, plain)) turn.judge();
  else turn.alone();
}

function fresh() {
  turns.splice(0);
  at("turns").replaceChildren();
  at("welcome").hidden = false;
  steps.clear();
  notice();
  at("message").focus();
}

// -- the server ------------------------------------------------------------------------------------------------------

async function meet() {
  try {
    const [{ data }, ways] = await Promise.all([getJson("v1/models"), getJson("speculation")]);
    at("model").textContent = data[0].id;
    offer(ways);
    notice();
  } catch (error) {
    refused(error);
    if (error.status === 503) setTimeout(meet, AGAIN);
  }
}

function askForKey() {
  if (!at("key-dialog").open) at("key-dialog").showModal();
}

at("key-dialog").addEventListener("submit", () => {
  keepKey(at("key").value);
  at("key").value = "";
  meet();
});
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stopper?.abort();
});
at("stop").addEventListener("click", () => stopper?.abort());
at("fresh").addEventListener("click", fresh);
at("open-settings").addEventListener("click", openSettings);
at("message").focus();
meet();
