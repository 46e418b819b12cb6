// The server's API: requests, the key that it may want, and streams.

import { find } from "./dom.js";

const KEY = "msa-hf-api-key";

export class Failure extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function send(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    if (options.body !== undefined) headers["Content-Type"] = "application/json";
    const body = options.body === undefined ? undefined : JSON.stringify(options.body);
    let response;
    try {
      response = await fetch(path, { ...options, headers, body });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(0, "The server does not answer. Is it running?", "unreachable");
    }
    if (response.ok) return response;
    const found = await response.json().catch(() => ({}));
    const error = found.error ?? { message: `The server answered with ${response.status}.` };
    if (response.status !== 401) throw new Failure(response.status, error.message, error.code);
    sessionStorage.setItem(KEY, await askForKey());
  }
}

function askForKey() {
  const dialog = find("key");
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => {
    const closed = () => {
      const given = find("key-input").value.trim();
      if (dialog.returnValue === "use" && given) resolve(given);
      else reject(new Failure(401, "This server wants an API key. Load the page again to give one.", "no_key"));
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

export async function call(path, options) {
  const response = await send(path, options);
  return { ...(await response.json()), tag: response.headers.get("ETag") };
}

// The objects of server-sent events, one after the other.
export async function* stream(path, body, signal) {
  const response = await send(path, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Failure(0, "The answer was cut off.", "cut_off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Failure(0, event.error.message, event.error.code);
      yield event;
    }
  }
}
