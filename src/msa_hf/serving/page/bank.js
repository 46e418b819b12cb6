// Numbers about the bank.

import { call } from "./api.js";
import { element, fill, find, number } from "./dom.js";

const FIGURES = [
  ["documents", "Documents"],
  ["tokens", "Tokens"],
  ["chunks", "Chunks"],
  ["generation", "Commits"],
  ["deleted", "Deleted, until compaction"],
  ["segments", "Segments"],
  ["damaged", "Damaged"],
];

export async function showBank() {
  const bank = await call("/v1/bank");
  const figures = FIGURES.filter(([name]) => bank[name] || name !== "damaged").map(([name, title]) =>
    entry(title, number(bank[name])),
  );
  figures.push(entry("On the disk", size(bank.bytes)));
  figures.push(entry("Memory layers", bank.memory_layers.join(", "), "words"));
  if (bank.routers_trained !== null) {
    figures.push(entry("Routers", bank.routers_trained ? "trained" : "untrained: they choose by chance", "words"));
  }
  figures.push(entry("Answers by", bank.answers_by === "interleave" ? "reading texts, in rounds" : "the memory alone", "words"));
  figures.push(entry("Changes", bank.read_only ? "none: read only" : "allowed", "words"));
  fill(find("figures"), ...figures);
  const indexes = Object.entries(bank.indexes).map(([name, facts]) => entry(name, facts.state ?? "there", "words"));
  fill(find("indexes"), ...(indexes.length ? indexes : [entry("Indexes", "none: the routers search", "words")]));
}

function entry(title, value, kind = "") {
  return element("div", {}, element("dt", {}, title), element("dd", { class: kind }, value));
}

function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let place = 0;
  while (bytes >= 1000 && place < units.length - 1) {
    bytes /= 1000;
    place += 1;
  }
  return `${number(bytes, place && bytes < 100 ? 1 : 0)} ${units[place]}`;
}
