/** An answer while it comes, and what it cost. Nothing here touches the page. */

import { events } from "./api.js";
import { Words } from "./words.js";

const WANTED = {
  stream: true, stream_options: { include_usage: true }, return_tree: true, return_token_ids: true,
};

const UNKNOWN = { text: "", drafters: [], step: -1 };

export class Answer {
  constructor(body) {
    this.body = body;
    this.ids = [];
    this.trees = [];
    this.writers = []; // for each token the names of its drafters; none: the model itself
    this.coming = []; // tokens of trees whose ids weren't told yet; a text may end amid a path
    this.words = []; // {text, drafters, steps}
    this.state = "running"; // then "done", "stopped" or "failed"
    this.places = new Words();
    this.begun = performance.now();
    this.first = this.last = null; // when the first and the last tokens came
    this.firstCount = 0;
  }

  get text() {
    return this.places.text;
  }

  /** Seconds from the request to the last token. */
  get seconds() {
    return this.last === null ? 0 : (this.last - this.begun) / 1000;
  }

  /** Tokens a second after the first ones, so that reading the prompt doesn't count. */
  get speed() {
    const tokens = this.ids.length - this.firstCount;
    return tokens > 0 ? tokens / ((this.last - this.first) / 1000) : null;
  }

  /** Mean accepted length: tokens that a forward gave. */
  get length() {
    return this.trees.length ? this.ids.length / this.trees.length : null;
  }

  /** Asks for the answer. `changed` is called whenever some of it came. */
  async run(signal, changed) {
    try {
      for await (const event of events("v1/chat/completions", { ...this.body, ...WANTED }, signal)) {
        for (const choice of event.choices) this.#take(choice);
        changed();
      }
      this.state = "done";
    } catch (error) {
      this.state = error.name === "AbortError" ? "stopped" : "failed";
      if (this.state === "failed") throw error;
    } finally {
      this.words.push(...this.places.end());
      changed();
    }
  }

  #take(choice) {
    const ids = choice.token_ids ?? [];
    for (const tree of choice.trees ?? []) {
      const step = this.trees.push(tree) - 1;
      for (const token of tokensOf(tree)) this.coming.push({ ...token, step });
    }
    const told = ids.map((id) => (this.coming[0]?.token === id ? this.coming.shift() : UNKNOWN));
    this.ids.push(...ids);
    this.writers.push(...told.map((token) => token.drafters));
    this.words.push(...this.places.add(choice.delta.content ?? "", told));
    if (ids.length) this.#time(ids.length);
  }

  #time(count) {
    this.last = performance.now();
    if (this.first === null) [this.first, this.firstCount] = [this.last, count];
  }
}

/** The tokens that a step gave: the accepted path behind the root, and what the model added. */
export function tokensOf({ nodes, bonus }) {
  return [...nodes.filter((node, place) => place > 0 && node.accepted), { ...bonus, drafters: [] }];
}

/** Where two lists of ids differ first, or -1 if they don't. */
export function firstDifference(one, other) {
  const most = Math.max(one.length, other.length);
  for (let place = 0; place < most; place++) if (one[place] !== other[place]) return place;
  return -1;
}
