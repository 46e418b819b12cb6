// The page: which section is shown, and what fails.

import { call } from "./api.js";
import { startAsking } from "./ask.js";
import { showBank } from "./bank.js";
import { startDocument } from "./document.js";
import { refresh, startDocuments } from "./documents.js";
import { fill, find, show } from "./dom.js";

const SECTIONS = ["ask", "documents", "bank"];

function fail(error) {
  fill(find("problem"), error ? error.message : "");
  show(find("problem"), Boolean(error));
}

async function open() {
  const wanted = location.hash.slice(1);
  const section = SECTIONS.includes(wanted) ? wanted : SECTIONS[0];
  for (const name of SECTIONS) {
    show(find(name), name === section);
    if (name === section) find(`to-${name}`).setAttribute("aria-current", "page");
    else find(`to-${name}`).removeAttribute("aria-current");
  }
  fail(null);
  try {
    if (section === "documents") await refresh();
    if (section === "bank") await showBank();
  } catch (error) {
    fail(error);
  }
  if (section === "ask") find("question").focus();
}

async function start() {
  try {
    const bank = await call("/v1/bank");
    fill(find("model"), bank.model);
    document.title = `${bank.model} · msa-hf`;
    startAsking(bank.model, fail);
    startDocument({ changed: refresh, readOnly: bank.read_only });
    startDocuments({ fail, readOnly: bank.read_only });
  } catch (error) {
    fail(error);
    return;
  }
  addEventListener("hashchange", open);
  await open();
  document.documentElement.dataset.ready = "true";
}

start();
