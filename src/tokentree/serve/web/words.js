/** Which part of a text came from which token. */

const HALF = "\ufffd"; // what stands for a part of a character

/**
 * Finds tokens in the text that they became. A token that is a part of a character is put together with its
 * neighbours; one that has no text, such as an end token, is passed over.
 */
export class Words {
  constructor() {
    this.text = "";
    this.found = 0; // characters of the text whose tokens are known
    this.waiting = []; // tokens whose text isn't there yet
  }

  /** Adds text and `tokens` ({text, drafters, step}). Returns the words that are now known. */
  add(text, tokens) {
    this.text += text;
    this.waiting.push(...tokens);
    const words = [];
    while (this.waiting.length && this.found < this.text.length) {
      const [first] = this.waiting;
      if (first.text.includes(HALF)) {
        const group = this.#group();
        if (!group) break;
        words.push(group);
      } else {
        this.waiting.shift();
        const said = this.#said(first.text);
        if (said) words.push(this.#word(said, [first]));
      }
    }
    return words;
  }

  /** The words that are left at the end. */
  end() {
    const rest = this.text.slice(this.found);
    const tokens = this.waiting.splice(0);
    return rest ? [this.#word(rest, tokens)] : [];
  }

  /** Text whose tokens aren't known yet. */
  get rest() {
    return this.text.slice(this.found);
  }

  #said(text) {
    if (this.text.startsWith(text, this.found)) return text;
    const short = text.trimStart(); // tokenizers may drop a text's first space
    return this.found === 0 && short && this.text.startsWith(short) ? short : "";
  }

  #group() {
    const known = (token) => !token.text.includes(HALF) && this.text.includes(token.text, this.found);
    const next = this.waiting.findIndex(known);
    if (next < 0) return null;
    const end = this.text.indexOf(this.waiting[next].text, this.found);
    return this.#word(this.text.slice(this.found, end), this.waiting.splice(0, next));
  }

  #word(text, tokens) {
    this.found += text.length;
    const drafters = [...new Set(tokens.flatMap((token) => token.drafters))];
    const steps = [...new Set(tokens.map((token) => token.step))].filter((step) => step >= 0);
    return { text, drafters, steps };
  }
}
