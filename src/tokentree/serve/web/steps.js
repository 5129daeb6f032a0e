/** The panel beside the chat: figures, legend, and the tree of one step of the answer that is shown. */

import { colourOf, stripes } from "./colours.js";
import { describe, draw } from "./tree.js";

const PAUSE = 60; // milliseconds between two trees while an answer comes
const at = (id) => document.getElementById(id);
const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));

export class Steps {
  /** `marked(answer, step)` is called when another step is shown. */
  constructor(marked) {
    this.answer = null;
    this.step = 0;
    this.follows = true; // the newest step
    this.marked = marked;
    this.drawn = null;
    this.drawnAt = 0;
    at("step").addEventListener("input", () => this.#go(at("step").valueAsNumber - 1));
    at("before").addEventListener("click", () => this.#go(this.step - 1));
    at("after").addEventListener("click", () => this.#go(this.step + 1));
    this.clear();
  }

  clear() {
    this.answer = null;
    for (const id of ["speed", "length", "count", "forwards"]) at(id).textContent = "–";
    for (const id of ["step", "before", "after"]) at(id).disabled = true;
    at("legend").replaceChildren(entry("the model itself", null, []));
    at("told").textContent = "The tree of each step is drawn here.";
    at("tree").replaceChildren();
  }

  /** Shows `answer`: its newest step, or `step`. */
  show(answer, step = null) {
    this.answer = answer;
    this.follows = step === null;
    if (step !== null) this.step = step;
    this.drawn = null;
    this.update(true);
  }

  /** Draws what is new. */
  update(atOnce = false) {
    const { answer } = this;
    if (!answer) return;
    at("speed").textContent = number(answer.speed, 0);
    at("length").textContent = number(answer.length, 2);
    at("count").textContent = answer.ids.length;
    at("forwards").textContent = answer.trees.length;
    const last = answer.trees.length - 1;
    if (last < 0) return;
    if (this.follows) this.step = last;
    at("step").max = last + 1;
    const now = performance.now();
    if (atOnce || answer.state !== "running" || now - this.drawnAt > PAUSE) {
      this.drawnAt = now;
      this.#legend();
      this.#draw();
    }
  }

  #go(step) {
    const last = this.answer.trees.length - 1;
    this.step = Math.min(Math.max(step, 0), last);
    this.follows = this.step === last;
    this.#draw();
  }

  #draw() {
    const { answer, step } = this;
    const count = answer.trees.length;
    const slider = at("step");
    slider.disabled = false;
    slider.value = step + 1;
    at("before").disabled = step === 0;
    at("after").disabled = step === count - 1;
    const tree = answer.trees[step];
    if (this.drawn === tree) return;
    this.drawn = tree;
    const said = `Step ${step + 1} of ${count}. ${describe(tree)}`;
    slider.setAttribute("aria-valuetext", said);
    at("told").textContent = said;
    at("tree").replaceChildren(draw(tree));
    at("tree").scrollTo(0, 0);
    this.marked(answer, this.follows && answer.state === "running" ? -1 : step);
  }

  #legend() {
    const counts = new Map();
    let own = 0;
    for (const drafters of this.answer.writers) {
      if (!drafters.length) own++;
      for (const name of drafters) counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    const drafted = [...counts].map(([name, count]) => entry(name, count, [name]));
    const several = this.answer.writers.find((drafters) => drafters.length > 1);
    const striped = several ? [entry("several proposed the same", null, several)] : [];
    at("legend").replaceChildren(...drafted, entry("the model itself", own, []), ...striped);
  }
}

function entry(text, count, drafters) {
  const item = document.createElement("li");
  const swatch = document.createElement("span");
  swatch.className = drafters.length ? "swatch" : "swatch plain";
  swatch.style.backgroundImage = drafters.length ? stripes(drafters.map(colourOf)) : "";
  item.append(swatch, text);
  if (count !== null) {
    const told = document.createElement("b");
    told.textContent = count;
    item.append(" ", told);
  }
  return item;
}
