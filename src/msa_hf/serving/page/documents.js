// The documents of the bank: pages of them, or those that fit a search.

import { call } from "./api.js";
import { openDocument, openNew } from "./document.js";
import { bar, element, fill, find, number, passage, show } from "./dom.js";

const LIMIT = 20;
let before = []; // where the pages before began
let after = -1;
let next = null;
let report = () => {};

export function startDocuments(options) {
  report = options.fail;
  show(find("add-button"), !options.readOnly);
  find("add-button").addEventListener("click", openNew);
  find("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    refresh();
  });
  find("query").addEventListener("search", () => find("query").value || refresh());
  find("next").addEventListener("click", () => {
    before.push(after);
    turn(next);
  });
  find("previous").addEventListener("click", () => turn(before.pop()));
}

export async function refresh() {
  const query = find("query").value.trim();
  report(null);
  try {
    await (query ? showHits(query) : showPage());
  } catch (error) {
    report(error);
  }
}

function turn(place) {
  after = place;
  refresh();
}

async function showPage() {
  const page = await call(`/v1/documents?limit=${LIMIT}&after=${after}`);
  if (!page.data.length && before.length) {
    turn(before.pop());
    return;
  }
  next = page.next;
  const first = before.length * LIMIT + 1;
  const place = page.data.length ? `${number(first)} to ${number(first + page.data.length - 1)} of ` : "";
  fill(find("list-state"), page.total ? `${place}${number(page.total)}` : "The bank is empty. Add a document.");
  fill(find("list"), ...page.data.map((item) => row(item.key, `${number(item.tokens)} tokens`, excerpt(item.excerpt))));
  show(find("pages"), before.length > 0 || page.has_more);
  find("previous").disabled = !before.length;
  find("next").disabled = !page.has_more;
}

async function showHits(query) {
  const found = await call("/v1/search", { method: "POST", body: { query, k: LIMIT } });
  const best = Math.max(...found.data.map((hit) => hit.score), Number.MIN_VALUE);
  const rows = found.data.map((hit) => {
    const score = element("span", { class: "score" }, bar(hit.score / best), number(hit.score, 3));
    return row(hit.key, score, passage(hit.passage));
  });
  fill(find("list-state"), `${rows.length} found, by ${found.mode === "hybrid" ? "all ways" : found.mode}`);
  fill(find("list"), ...rows);
  show(find("pages"), false);
}

function excerpt(text) {
  return element("p", {}, text ?? "(stored without its text)");
}

function row(key, facts, text) {
  const open = element("button", { type: "button", onclick: () => openDocument(key) }, key);
  return element("li", {}, element("div", { class: "head" }, open, element("span", { class: "score" }, facts)), text);
}
