// The way to an answer as a picture: for each round a row for every document and a column for every memory layer.

import { drawn, element, number } from "./dom.js";

const ROWS = 8; // documents of a round that are shown
const ROW = 30; // pixels
const HEAD = 24;
const SMALLEST = 3; // radius
const LARGEST = 11;

export function tracePicture(trace, width) {
  return trace.rounds.map((round, place) => figure(round, place + 1, width)).filter((made) => made !== null);
}

function figure(round, place, width) {
  const layers = Object.keys(round.chosen);
  const read = new Set(round.read.map((item) => item.id));
  const rows = shownRows(round, read);
  if (!layers.length || !rows.length) return null;
  const names = round.read.map((item) => item.key).join(", ");
  const end = round.ended ? ` (the end: ${round.ended})` : "";
  const caption = `Round ${place}: ${names ? `read ${names}` : "nothing new was read"}${end}`;
  return element(
    "figure",
    {},
    element("figcaption", {}, caption),
    picture(round, layers, rows, read, caption, width),
    asTable(round, layers, rows),
  );
}

// The best documents, and those that were read, in the order of their scores.
function shownRows(round, read) {
  const best = round.combined.slice(0, ROWS);
  const others = round.combined.slice(ROWS).filter((item) => read.has(item.id));
  return [...best, ...others];
}

function scoreOf(round, layer, id) {
  return round.chosen[layer].find((item) => item.id === id)?.score ?? null;
}

function picture(round, layers, rows, read, caption, width) {
  const label = Math.min(Math.max(width * 0.3, 84), 210);
  const end = 58;
  const step = (width - label - end) / layers.length;
  const height = HEAD + rows.length * ROW;
  const scores = layers.flatMap((layer) => round.chosen[layer].map((item) => item.score ?? 0));
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const largest = Math.min(LARGEST, step / 2 - 1);
  const radius = (score) => SMALLEST + Math.max(largest - SMALLEST, 0) * Math.sqrt((score - low) / (high - low || 1));
  const middle = (column) => label + step * (column + 0.5);
  const every = Math.ceil(22 / step); // names of layers that do not touch

  const heads = layers.map((layer, column) =>
    column % every ? "" : drawn("text", { class: "quiet", x: middle(column), y: 14, "text-anchor": "middle" }, layer),
  );
  const lines = rows.map((item, row) => {
    const y = HEAD + ROW * (row + 0.5);
    const circles = layers.map((layer, column) => {
      const score = scoreOf(round, layer, item.id);
      if (score === null) return "";
      const words = `${item.key}, layer ${layer}: ${number(score, 3)}`;
      return drawn("circle", { cx: middle(column), cy: y, r: radius(score).toFixed(1) }, drawn("title", {}, words));
    });
    const name = shortened(item.key, Math.floor(label / 8));
    return drawn(
      "g",
      { class: read.has(item.id) ? "read" : "" },
      drawn("line", { x1: label, x2: width - end, y1: y, y2: y }),
      drawn("text", { class: read.has(item.id) ? "read" : "", x: 0, y: y + 4 }, name, drawn("title", {}, item.key)),
      ...circles,
      drawn("text", { class: "quiet", x: width, y: y + 4, "text-anchor": "end" }, number(item.score ?? 0, 3)),
    );
  });
  const layer = drawn("text", { class: "quiet", x: 0, y: 14 }, "layer");
  const mean = drawn("text", { class: "quiet", x: width, y: 14, "text-anchor": "end" }, "all");
  const box = { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption };
  return drawn("svg", box, layer, ...heads.filter(Boolean), mean, ...lines);
}

function shortened(text, most) {
  const letters = [...text];
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : text;
}

function asTable(round, layers, rows) {
  const head = element("tr", {}, element("th", { scope: "col" }, "Document"));
  head.append(...layers.map((layer) => element("th", { scope: "col" }, layer)), element("th", { scope: "col" }, "all"));
  const lines = rows.map((item) => {
    const cells = layers.map((layer) => scoreOf(round, layer, item.id)).concat(item.score);
    const shown = cells.map((score) => element("td", {}, score === null ? "–" : number(score, 3)));
    return element("tr", {}, element("th", { scope: "row" }, item.key), ...shown);
  });
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines));
  const scroll = { class: "scroll", tabindex: "0", role: "group", "aria-label": "Scores" };
  return element("details", {}, element("summary", {}, "Scores as a table"), element("div", scroll, table));
}
