// Elements, made without markup: whatever a document says becomes text.

const SVG = "http://www.w3.org/2000/svg";

export function find(id) {
  return document.getElementById(id);
}

export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else made.setAttribute(key, value);
  }
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

export function fill(place, ...children) {
  place.replaceChildren(...children);
}

export function show(place, shown = true) {
  place.hidden = !shown;
}

// Pieces of a text, some of them marked.
export function passage(parts) {
  return element("p", {}, ...parts.map((part) => (part.marked ? element("mark", {}, part.text) : part.text)));
}

export function bar(share) {
  const full = element("span");
  full.style.width = `${Math.round(100 * Math.min(Math.max(share, 0), 1))}%`;
  return element("span", { class: "bar", "aria-hidden": "true" }, full);
}

export function number(value, digits = 0) {
  return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
}
