/* Data arrives as scripts, since a page from disk may not fetch files: each calls `index` or `part` below. */
"use strict";
const interpPages = (() => {
  const parts = new Map(), waiting = new Map();
  const KEPT = 8; // parts held at once
  let list = null;

  function load(number) {
    if (parts.has(number)) return Promise.resolve(parts.get(number));
    if (waiting.has(number)) return waiting.get(number).promise;
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    waiting.set(number, entry);
    const script = document.createElement("script");
    const name = `data/p${String(number).padStart(5, "0")}.js`;
    script.src = name;
    script.addEventListener("load", () => script.remove());
    script.addEventListener("error", () => {
      script.remove();
      waiting.delete(number);
      entry.reject(new Error(`${name} cannot be read; is the folder complete?`));
    });
    document.head.append(script);
    return entry.promise;
  }

  return Object.freeze({
    index(value) { list = value; },
    get list() { return list; },
    part(number, value) {
      parts.set(number, value);
      while (parts.size > KEPT) parts.delete(parts.keys().next().value);
      const entry = waiting.get(number);
      waiting.delete(number);
      if (entry) entry.resolve(value);
    },
    load,
  });
})();
