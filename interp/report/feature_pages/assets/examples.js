/* Examples: tokens in their context, coloured by activation or by what zeroing the latent costs. */
"use strict";
const exampleView = (() => {
  let mode = "activation";
  const readout = () => document.getElementById("readout");

  function describe(page, example, texts, i) {
    const value = example.values[i], loss = example.loss ? example.loss[i] : undefined;
    const parts = [
      tokenChip(texts[example.tokens[i]]), ` row ${example.row}, position ${example.pos - example.at + i}`,
      ` · activation ${number(value)}`,
    ];
    if (loss !== undefined) parts.push(loss === null ? " · nothing follows" : ` · zeroed: next-token loss ${nats(loss)} nats`);
    return parts;
  }

  function point(box, page, example, texts, i) {
    box.querySelectorAll(".here").forEach((token) => token.classList.remove("here"));
    const bar = readout();
    if (i === null) {
      bar.hidden = true;
      return;
    }
    box.children[i].classList.add("here");
    bar.replaceChildren(...describe(page, example, texts, i));
    bar.hidden = false;
  }

  /* The full colour: the largest change of this latent's examples, but not less than a tenth of a nat. */
  function largestLoss(page) {
    const all = page.examples.flatMap((example) => example.loss || []).map((loss) => Math.abs(loss || 0));
    return Math.max(0.1, ...all);
  }

  function heat(page, example, i) {
    if (mode === "loss") {
      const loss = example.loss ? example.loss[i] : null;
      return [Math.min(1, Math.abs(loss || 0) / largestLoss(page)), (loss || 0) >= 0 ? "rise" : "fall"];
    }
    return [page.max ? example.values[i] / page.max : 0, "heat"];
  }

  function paint(box, page, example) {
    [...box.children].forEach((token, i) => {
      const [share, kind] = heat(page, example, i);
      token.style.setProperty("--share", share.toFixed(3));
      token.className = `t ${share > 0 ? kind : ""} ${i === example.at ? "at" : ""}`;
    });
  }

  function one(page, example, texts) {
    let cursor = null;
    const box = el("p", {
      class: "tokens", tabindex: 0, role: "group",
      "aria-label": `Example: activation ${number(example.values[example.at])} at ${texts[example.tokens[example.at]]}`,
    }, example.tokens.map((t) => el("span", { class: "t" }, texts[t])));
    paint(box, page, example);
    const move = (i) => {
      cursor = i;
      point(box, page, example, texts, i);
    };
    box.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const from = cursor === null ? example.at - step : cursor;
      move(Math.max(0, Math.min(example.tokens.length - 1, from + step)));
    });
    box.addEventListener("focus", () => move(cursor === null ? example.at : cursor));
    box.addEventListener("blur", () => move(null));
    for (const kind of ["pointerover", "click"]) {
      box.addEventListener(kind, (event) => {
        const i = [...box.children].indexOf(event.target);
        if (i >= 0) move(i);
      });
    }
    box.addEventListener("pointerleave", () => {
      if (document.activeElement !== box) move(null);
    });
    box.addEventListener("repaint", () => paint(box, page, example));
    const loss = example.loss ? example.loss[example.at] : undefined;
    return el("li", { class: "example" },
      el("span", { class: "act num" }, number(example.values[example.at])),
      box,
      el("span", { class: "marks" },
        example.first ? el("span", { class: "badge", title: "Nothing that counts comes before it" }, "first in its row") : null,
        loss === undefined ? null : el("span", {},
          loss === null ? "nothing follows" : ["zeroed ", el("b", {}, nats(loss)), " nats"],
          example.lossNull === null || example.lossNull === undefined ? null
            : el("span", { class: "null" }, ` null ${nats(example.lossNull)}`))));
  }

  function group(page, texts, examples) {
    return el("ol", { class: "examples" }, examples.map((example) => one(page, example, texts)));
  }

  function chooser(root) {
    const pick = (name, label) => {
      const input = el("input", { type: "radio", name: "mode", value: name, checked: mode === name });
      input.addEventListener("change", () => {
        mode = name;
        root.querySelectorAll(".tokens").forEach((box) => box.dispatchEvent(new Event("repaint")));
      });
      return el("label", {}, input, ` ${label}`);
    };
    return el("fieldset", { class: "modes" }, el("legend", {}, "Colour"),
      pick("activation", "activation"), pick("loss", "rise of the next-token loss when zeroed"));
  }

  return Object.freeze({ group, chooser, reset() { readout().hidden = true; } });
})();
