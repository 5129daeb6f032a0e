/** A message, its answer, and beside it what plain decoding writes. Text of the model is put in as text only. */

import { firstDifference } from "./answer.js";
import { paint } from "./colours.js";

export function made(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  element.className = classes;
  element.textContent = text;
  return element;
}

/** An answer on the page. */
export class Column {
  /** `shown(answer, step)` is called for a word that is clicked. */
  constructor(answer, title, shown) {
    this.answer = answer;
    this.count = 0; // words that are on the page
    this.root = made("section", "answer");
    this.root.append(made("h3", "", title));
    this.body = made("div", "text");
    this.rest = made("span", "rest");
    this.body.append(this.rest);
    this.figures = made("p", "figures");
    this.root.append(this.body, this.figures);
    this.body.addEventListener("click", ({ target }) => {
      if (target.dataset.steps) shown(answer, Number.parseInt(target.dataset.steps, 10));
    });
  }

  update() {
    const { answer } = this;
    this.rest.before(...answer.words.slice(this.count).flatMap(drawn));
    this.count = answer.words.length;
    this.rest.textContent = answer.places.rest;
    this.root.classList.toggle("running", answer.state === "running");
    this.root.setAttribute("aria-busy", answer.state === "running");
    this.figures.textContent = told(answer);
  }

  mark(step) {
    for (const word of this.body.querySelectorAll(".marked")) word.classList.remove("marked");
    for (const word of this.body.querySelectorAll(`[data-steps~="${step}"]`)) word.classList.add("marked");
  }
}

/** A word, painted; space before it stays plain, unless there is nothing else. */
function drawn({ text, drafters, steps }) {
  const said = text.trimStart() || text;
  const word = made("span", "word", said);
  if (steps.length) word.dataset.steps = steps.join(" ");
  if (drafters.length) word.title = drafters.join(", ");
  paint(word, drafters);
  return said === text ? [word] : [text.slice(0, -said.length), word];
}

/** What an answer cost, in words. */
function told(answer) {
  const parts = [`${answer.ids.length} tokens`, `${answer.seconds.toFixed(2)} s`];
  if (answer.speed !== null) parts.push(`${answer.speed.toFixed(0)} tokens/s`);
  if (answer.length !== null) parts.push(`${answer.length.toFixed(2)} a forward`);
  if (answer.body.temperature !== 0) parts.push(`seed ${answer.body.seed}`);
  if (answer.state === "stopped") parts.push("stopped");
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

/** Whether two answers have the same token ids, in words. */
export function verdict(drafted, plain) {
  const [one, other] = [drafted.ids, plain.ids];
  if (!one.length || !other.length) return "There are no token ids to compare.";
  const place = firstDifference(one, other);
  if (place < 0) return `identical: all ${one.length} token ids are the same`;
  if (plain.state === "stopped" && place === other.length) return `the first ${place} token ids are the same so far`;
  return `they differ from token ${place + 1} on; the ${place} before are the same`;
}

export class Turn {
  constructor(text, answer, shown, compare) {
    this.text = text;
    this.shown = shown;
    this.answer = answer;
    this.root = made("article", "turn");
    this.columns = [new Column(answer, "with drafts", shown)];
    this.pair = made("div", "answers");
    this.pair.append(this.columns[0].root);
    this.tools = made("div", "tools");
    this.button = made("button", "", "Compare with plain");
    this.button.type = "button";
    this.button.addEventListener("click", () => compare(this));
    this.verdict = made("p", "verdict");
    this.verdict.setAttribute("role", "status");
    this.tools.append(this.button, this.verdict);
    this.root.append(made("p", "asked", text), this.pair, this.tools);
    this.update(true);
  }

  /** Puts the answer of plain decoding beside the other. */
  beside(plain) {
    if (this.columns[1]) this.columns.pop().root.remove();
    this.columns.push(new Column(plain, "plain", this.shown));
    this.pair.append(this.columns[1].root);
    this.pair.classList.add("two");
    this.verdict.textContent = "";
  }

  /** Takes plain decoding away again. */
  alone() {
    this.columns.pop().root.remove();
    this.pair.classList.remove("two");
  }

  update(busy) {
    for (const column of this.columns) column.update();
    const worth = this.answer.state !== "running" && this.answer.ids.length && this.answer.body.speculation !== "off";
    this.button.hidden = !worth;
    this.button.disabled = busy;
  }

  judge() {
    const [drafted, plain] = this.columns.map((column) => column.answer);
    this.verdict.textContent = verdict(drafted, plain);
    this.verdict.classList.toggle("differs", firstDifference(drafted.ids, plain.ids) >= 0);
  }

  mark(answer, step) {
    for (const column of this.columns) column.mark(column.answer === answer ? step : -1);
  }
}
