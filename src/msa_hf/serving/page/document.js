// One document in a dialog: read, added, changed and deleted. A change is made for the state that was shown.

import { call } from "./api.js";
import { fill, find, number, show } from "./dom.js";

let shown = null; // as it came; null for a new one
let sure = false;
let changed = () => {};
let readOnly = false;

export function startDocument(options) {
  changed = options.changed;
  readOnly = options.readOnly;
  find("document-form").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(save);
  });
  find("document-delete").addEventListener("click", () => {
    if (sure) attempt(remove);
    else askAgain(true);
  });
  find("document-delete").addEventListener("blur", () => askAgain(false));
  find("document-close").addEventListener("click", () => find("document").close());
}

export async function openDocument(key) {
  prepare(null, "Document");
  show(find("document-save"), false); // until it is there
  find("document").showModal();
  await attempt(async () => prepare(await call(`/v1/documents?key=${encodeURIComponent(key)}`), "Document"));
}

export function openNew() {
  prepare(null, "A new document");
  find("document").showModal();
  find("document-key").focus();
}

function prepare(found, title) {
  shown = found;
  askAgain(false);
  fill(find("document-title"), title);
  find("document-key").value = found?.key ?? "";
  find("document-key").disabled = found !== null;
  find("document-text").value = found?.text ?? "";
  find("document-text").readOnly = readOnly;
  show(find("document-save"), !readOnly);
  show(find("document-delete"), !readOnly && found !== null);
  show(find("document-problem"), false);
  const facts = found && [
    found.version === null ? "no version" : `version ${found.version}`,
    `${number(found.tokens)} tokens`,
    `id ${found.id}`,
    ...(found.metadata ? [JSON.stringify(found.metadata)] : []),
  ];
  fill(find("document-facts"), facts ? facts.join(" · ") : "");
}

function askAgain(again) {
  sure = again;
  fill(find("document-delete"), again ? "Really delete?" : "Delete");
}

async function attempt(action) {
  try {
    await action();
  } catch (error) {
    fill(find("document-problem"), error.message);
    show(find("document-problem"));
  }
}

async function save() {
  const body = { key: find("document-key").value, text: find("document-text").value };
  if (shown === null) {
    await call("/v1/documents", { method: "POST", body: { ...body, expected_version: 0 } });
  } else {
    if (shown.metadata) body.metadata = shown.metadata;
    await call("/v1/documents", { method: "POST", body, headers: { "If-Match": shown.tag } });
  }
  find("document").close();
  changed();
}

async function remove() {
  const path = `/v1/documents?key=${encodeURIComponent(shown.key)}`;
  await call(path, { method: "DELETE", headers: { "If-Match": shown.tag } });
  find("document").close();
  changed();
}
