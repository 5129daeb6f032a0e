/** The picture of a step's tree: depth from left to right, the accepted path in the top row. */

import { colourOf } from "./colours.js";
import { tokensOf } from "./answer.js";

const SVG = "http://www.w3.org/2000/svg";
const LETTER = 7.3, PADDING = 8, GAP = 22, BOX = 24, ROW = 32, EDGE = 8, BEND = 5, LONGEST = 14;
const SIGNS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };

/** How a token is shown: spaces can be seen, and it is short. */
export function label(text) {
  const seen = text.replace(/[ \n\t\r]/g, (sign) => SIGNS[sign]);
  const letters = [...seen];
  return letters.length > LONGEST ? `${letters.slice(0, LONGEST - 1).join("")}…` : seen || "∅";
}

/** Boxes with their places, parents before children. The last one is the token that the model added. */
export function layout({ nodes, bonus }) {
  const boxes = nodes.map((node) => boxOf(node, node.accepted ? "accepted" : "refused"));
  boxes[0].kind = "root";
  const last = boxes.findLastIndex((box) => box.accepted);
  boxes.push(boxOf({ ...bonus, parent: last, drafters: [] }, "own"));
  for (const box of boxes) if (box.parent >= 0) boxes[box.parent].children.push(box);
  const columns = [];
  let rows = 0;
  const place = (box, depth) => {
    box.depth = depth;
    columns[depth] = Math.max(columns[depth] ?? 0, width(box));
    box.y = rows * ROW + EDGE;
    box.children.sort((one, other) => weight(other) - weight(one));
    box.children.forEach((child, number) => {
      if (number) rows++;
      place(child, depth + 1);
    });
  };
  place(boxes[0], 0);
  const starts = [EDGE];
  for (const [depth, wide] of columns.entries()) starts.push(starts[depth] + wide + GAP);
  for (const box of boxes) Object.assign(box, { x: starts[box.depth], width: width(box) });
  return { boxes, width: starts.at(-1) - GAP + EDGE, height: rows * ROW + BOX + 2 * EDGE };
}

const boxOf = (node, kind) => ({ ...node, kind, label: label(node.text), children: [] });
const width = (box) => [...box.label].length * LETTER + 2 * PADDING;
const weight = (box) => (box.kind === "own" || box.kind === "accepted" ? Infinity : box.log_prob);

/** An SVG of a tree. */
export function draw(tree) {
  const { boxes, width: wide, height } = layout(tree);
  const svg = made("svg", { width: wide, height, role: "img", "aria-label": describe(tree) });
  const refused = boxes.filter((box) => box.kind === "refused");
  for (const box of [...refused, ...boxes.filter((one) => one.kind !== "refused")]) {
    if (box.parent >= 0) svg.append(edge(boxes[box.parent], box));
  }
  for (const box of boxes) svg.append(drawnBox(box));
  return svg;
}

function edge(parent, child) {
  const [x1, y1, y2] = [parent.x + parent.width, parent.y + BOX / 2, child.y + BOX / 2];
  const turn = child.x - GAP / 2;
  const bend = `H${turn - BEND}q${BEND} 0 ${BEND} ${BEND}V${y2 - BEND}q0 ${BEND} ${BEND} ${BEND}`; // goes down
  return made("path", { d: `M${x1} ${y1}${y1 === y2 ? "" : bend}H${child.x}`, class: `edge ${child.kind}` });
}

function drawnBox(box) {
  const group = made("g", { class: `node ${box.kind}`, transform: `translate(${box.x} ${box.y})` });
  const title = made("title");
  title.textContent = hint(box);
  const text = made("text", { x: box.width / 2, y: BOX / 2 - (box.drafters.length ? 1 : 0) });
  text.textContent = box.label;
  group.append(title, made("rect", { width: box.width, height: BOX, rx: 5 }), text);
  const share = (box.width - 8) / (box.drafters.length || 1);
  box.drafters.forEach((name, place) => {
    const stripe = made("rect", { class: "stripe", x: 4 + place * share, y: BOX - 4, width: share, height: 3 });
    stripe.style.fill = colourOf(name);
    group.append(stripe);
  });
  return group;
}

function hint(box) {
  if (box.kind === "root") return `${box.text}\nthe last token of the text before`;
  if (box.kind === "own") return `${box.text}\nadded by the model`;
  const by = `by ${box.drafters.join(", ")}, which gave it ${(100 * Math.exp(box.log_prob)).toFixed(0)} %`;
  return `${box.text}\n${by}\n${box.kind === "accepted" ? "accepted" : "not accepted"}`;
}

/** The step in words. */
export function describe(tree) {
  const drafted = tree.nodes.length - 1;
  const given = tokensOf(tree);
  const quoted = (text) => `“${text.replaceAll("\n", SIGNS["\n"])}”`;
  const accepted = given.slice(0, -1).map((token) => token.text).join("");
  const added = `the model added ${quoted(tree.bonus.text)}`;
  if (!drafted) return `No drafts; ${added}.`;
  const some = given.length > 1 ? `${given.length - 1} accepted: ${quoted(accepted)}` : "none accepted";
  return `${drafted} drafted, ${some}; ${added}.`;
}

function made(name, attributes = {}) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
