// Asking: the answer as it is written, its sources, and the way to it.

import { stream } from "./api.js";
import { openDocument } from "./document.js";
import { bar, element, fill, find, number, passage, show } from "./dom.js";
import { tracePicture } from "./trace.js";

let running = null;
let lastTrace = null;

export function startAsking(model, fail) {
  find("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = find("question").value.trim();
    if (question && !running) ask(model, question, fail);
  });
  find("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      find("ask-form").requestSubmit();
    }
  });
  find("stop-button").addEventListener("click", () => running?.abort());
  new ResizeObserver(() => lastTrace && drawTrace(lastTrace)).observe(find("trace-part"));
}

async function ask(model, question, fail) {
  const answer = find("answer");
  const start = performance.now();
  running = new AbortController();
  lastTrace = null;
  fail(null);
  begin(question, answer);
  try {
    const body = { model, messages: [{ role: "user", content: question }], stream: true, trace: true };
    body.stream_options = { include_usage: true };
    let end = null;
    let usage = null;
    for await (const event of stream("/v1/chat/completions", body, running.signal)) {
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (choice?.delta.content) answer.append(choice.delta.content);
      if (choice?.finish_reason) end = { ...event, reason: choice.finish_reason };
    }
    finish(answer, end, usage, performance.now() - start);
  } catch (error) {
    if (error.name === "AbortError") fill(find("facts"), "Stopped.");
    else fail(error);
  } finally {
    running = null;
    answer.setAttribute("aria-busy", "false");
    show(find("stop-button"), false);
    find("ask-button").disabled = false;
  }
}

function begin(question, answer) {
  for (const id of ["sources-part", "trace-part", "notices"]) show(find(id), false);
  fill(find("asked"), question);
  fill(answer);
  fill(find("facts"));
  answer.setAttribute("aria-busy", "true");
  show(find("result"));
  show(find("stop-button"));
  find("ask-button").disabled = true;
}

function finish(answer, end, usage, milliseconds) {
  if (!answer.textContent) fill(answer, "(no answer)");
  const cut = end.reason === "length" ? " · cut off" : "";
  const tokens = `${number(usage.prompt_tokens)} tokens read, ${number(usage.completion_tokens)} written`;
  fill(find("facts"), `${number(milliseconds / 1000, 2)} s · ${tokens}${cut}`);
  fill(find("notices"), ...(end.notices ?? []).map((text) => element("li", {}, text)));
  show(find("notices"), Boolean(end.notices?.length));
  fill(find("sources"), ...end.sources.map(card));
  show(find("sources-part"), end.sources.length > 0);
  lastTrace = end.trace;
  show(find("trace-part"), end.trace.rounds.some((round) => round.combined.length));
  drawTrace(end.trace);
}

function card(source) {
  const words = source.score === null ? "not routed" : number(source.score, 3);
  const score = element("span", { class: "score" }, `round ${source.round + 1}`, bar(source.score ?? 0), words);
  const open = element("button", { type: "button", onclick: () => openDocument(source.key) }, source.key);
  return element("li", {}, element("div", { class: "head" }, open, score), passage(source.passage));
}

function drawTrace(trace) {
  const width = find("trace").clientWidth - 34;
  if (width > 0) fill(find("trace"), ...tracePicture(trace, width));
}
