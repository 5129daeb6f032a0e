/** A colour for each drafter. Several that proposed the same share a word, in stripes. */

const KNOWN = ["eagle", "suffix", "recycling", "ngram", "medusa"];
const COUNT = 8; // see colours.css
const names = [...KNOWN];
const backgrounds = new Map();

export function colourOf(name) {
  if (!names.includes(name)) names.push(name);
  return `var(--by-${names.indexOf(name) % COUNT})`;
}

/** The background of what `drafters` proposed: a tint, and a stripe below. */
export function paint(element, drafters) {
  if (!drafters.length) return;
  const key = drafters.join("+");
  if (!backgrounds.has(key)) {
    const colours = drafters.map(colourOf);
    const tints = colours.map((colour) => `color-mix(in srgb, ${colour} var(--tint), transparent)`);
    backgrounds.set(key, `${stripes(colours)}, ${stripes(tints)}`);
  }
  element.style.backgroundImage = backgrounds.get(key);
}

/** Colours side by side, as a background. */
export function stripes(colours) {
  const share = 100 / colours.length;
  const stops = colours.map((colour, place) => `${colour} ${place * share}% ${(place + 1) * share}%`);
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}
