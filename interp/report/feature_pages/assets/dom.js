/* Elements and numbers. Text enters the page as text only: nothing here parses markup. */
"use strict";
function el(tag, attributes, ...children) {
  const made = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-3 ? value.toExponential(digits - 1)
    : size >= 1000 ? Math.round(value).toLocaleString("en")
    : value.toPrecision(digits);
  return text.replace(/-/g, "−");
}

function percent(value) {
  if (value === null || value === undefined) return "–";
  return `${number(value * 100)} %`;
}

function signed(value) {
  if (value === null || value === undefined) return "–";
  return value > 0 ? `+${number(value)}` : number(value);
}

/* Losses in nats: as many decimals as mean something. */
function nats(value) {
  if (value === null || value === undefined) return "–";
  return `${value > 0 ? "+" : ""}${value.toFixed(3)}`.replace(/-/g, "−");
}

function whole(value) {
  return value.toLocaleString("en");
}

/* A token as it is written; a blank one shows that it is there. */
function tokenChip(text) {
  return el("code", { class: "token" }, text === "" ? "∅" : text);
}
