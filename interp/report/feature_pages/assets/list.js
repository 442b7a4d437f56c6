/* The list of latents: what to read first, the scores beside their nulls, and a table to sort and search. */
"use strict";
const listView = (() => {
  const PAGE = 100;
  const COLUMNS = [
    { label: "latent", kind: "latent" },
    { label: "most often on", kind: "text" },
    { label: "share", kind: "percent", hint: "Share of its firings on that token" },
    { label: "density", kind: "percent", hint: "Share of tokens at which it fires" },
    { label: "max", kind: "number", hint: "Largest activation" },
    { label: "promotes", kind: "text", hint: "Token with the largest logit, by the logit lens" },
    { label: "lens hits", kind: "percent", hint: "Firings whose next token is among its promoted ones" },
    { label: "zeroed", kind: "nats", hint: "Rise of the next-token loss at its top examples, in nats" },
    { label: "its null", kind: "nats", hint: "The same with an equally frequent latent's direction" },
  ];
  const SCORES = {
    token_share: ["Share of firings on one token", percent],
    lens_hit: ["Firings before a promoted token", percent],
    ablation: ["Rise of the next-token loss when zeroed (nats)", nats],
  };
  const state = { sort: 0, down: false, text: "", page: 0, order: null, top: 0, last: null };
  let places = null;

  function rows() { return interpPages.list.rows; }

  function has(latent) {
    if (!places) places = new Map(rows().map((row, i) => [row[0], i]));
    return places.has(latent);
  }

  function place(latent) { return has(latent) ? places.get(latent) : null; }

  function order() {
    if (state.order) return state.order;
    const text = state.text.trim().toLowerCase(), column = state.sort;
    const matches = (row) => !text || String(row[0]).startsWith(text)
      || row[1].toLowerCase().includes(text) || row[5].toLowerCase().includes(text);
    const kept = rows().map((_, i) => i).filter((i) => matches(rows()[i]));
    const value = (i) => rows()[i][column];
    const missing = (v) => v === null || v === "";
    kept.sort((a, b) => {
      const x = value(a), y = value(b);
      if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
      const compared = typeof x === "string" ? (x < y ? -1 : x > y ? 1 : 0) : x - y;
      return (state.down ? -compared : compared) || a - b;
    });
    state.order = kept;
    return kept;
  }

  function neighbour(latent, by) {
    const found = order(), at = found.indexOf(place(latent));
    const other = at < 0 ? undefined : found[at + by];
    return other === undefined ? null : rows()[other][0];
  }

  function cell(column, value) {
    if (column.kind === "latent") return el("a", { href: `#/latent/${value}` }, value);
    if (column.kind === "text") return value === "" ? "–" : tokenChip(value);
    return { percent, nats, number }[column.kind](value);
  }

  function sortBy(column) {
    const numeric = COLUMNS[column].kind !== "text" && column > 0;
    state.down = state.sort === column ? !state.down : numeric;
    Object.assign(state, { sort: column, page: 0, order: null });
    draw();
  }

  function heads() {
    return COLUMNS.map((column, i) => el("th", {
      scope: "col", class: `c${i} k-${column.kind}`,
      "aria-sort": state.sort === i ? (state.down ? "descending" : "ascending") : null,
    }, el("button", { type: "button", class: "sort", title: column.hint, onclick: () => sortBy(i) }, column.label)));
  }

  function body() {
    return order().slice(state.page * PAGE, (state.page + 1) * PAGE).map((i) => el("tr", {},
      rows()[i].map((value, c) => el("td", { class: `c${c} k-${COLUMNS[c].kind}`, "data-label": COLUMNS[c].label }, cell(COLUMNS[c], value)))));
  }

  function draw() {
    const table = document.getElementById("latents");
    if (!table) return;
    const focused = document.activeElement && document.activeElement.closest("th");
    const at = focused ? [...focused.parentNode.children].indexOf(focused) : -1;
    table.tHead.rows[0].replaceChildren(...heads());
    table.tBodies[0].replaceChildren(...body());
    if (at >= 0) table.tHead.rows[0].children[at].querySelector("button").focus();
    const n = order().length, last = Math.max(0, Math.ceil(n / PAGE) - 1), first = state.page * PAGE;
    const select = document.getElementById("sort");
    select.value = String(state.sort);
    document.getElementById("direction").textContent = state.down ? "largest first" : "smallest first";
    document.getElementById("found").textContent = n
      ? `${whole(first + 1)} to ${whole(Math.min(n, first + PAGE))} of ${whole(n)}` : "No latent matches.";
    document.getElementById("back").disabled = state.page === 0;
    document.getElementById("on").disabled = state.page >= last;
    for (const id of ["back", "on"]) document.getElementById(id).hidden = last === 0;
  }

  function turn(by) {
    state.page += by;
    draw();
    document.getElementById("latents").scrollIntoView({ block: "nearest" });
  }

  function tools() {
    const search = el("input", { type: "search", id: "search", placeholder: "number or token", autocomplete: "off", value: state.text });
    search.addEventListener("input", () => {
      Object.assign(state, { text: search.value, page: 0, order: null });
      draw();
    });
    const select = el("select", { id: "sort" }, COLUMNS.map((column, i) => el("option", { value: i }, column.label)));
    select.addEventListener("change", () => {
      state.sort = -1;
      sortBy(Number(select.value));
    });
    return el("div", { class: "tools" },
      el("label", {}, "Search ", search),
      el("label", { class: "narrow" }, "Sort by ", select),
      el("button", { type: "button", id: "direction", class: "plain narrow", onclick: () => sortBy(state.sort) }),
      el("span", { id: "found", class: "soft", role: "status" }),
      el("span", { class: "pager" },
        el("button", { type: "button", id: "back", class: "plain", onclick: () => turn(-1) }, "← back"),
        el("button", { type: "button", id: "on", class: "plain", onclick: () => turn(1) }, "on →")));
  }

  function first(overview) {
    const share = (n) => `${whole(n)} (${percent(n / overview.d_dict)})`;
    const how = {
      random: `drawn at random among the ${whole(overview.n_live)} live ones (seed ${overview.seed}), not chosen`,
      all: "all live ones", named: "named by hand, which says nothing about the others",
    }[overview.chosen];
    const lines = [
      `Shown: ${whole(overview.n_shown)} of ${whole(overview.d_dict)} latents, ${how}.`,
      `Left out: ${share(overview.n_dead)} dead and ${share(overview.n_rare)} too rare, firing at fewer than `
        + `${overview.min_firings} of ${whole(overview.n_counted)} tokens.`,
      overview.lens_warning, ...overview.notes,
    ].filter(Boolean);
    return el("section", { class: "first card" }, el("h2", {}, "Read this first"), el("ul", {}, lines.map((line) => el("li", {}, line))));
  }

  function scores(list) {
    const found = list.scores.filter((score) => score.n);
    if (!found.length) return null;
    const cells = found.map((score) => {
      const [label, show] = SCORES[score.name];
      const range = score.low === null ? "–" : `${show(score.difference)} [${show(score.low)}, ${show(score.high)}]`;
      return el("tr", {}, [label, show(score.mean), show(score.null), range, whole(score.n)].map((text, i) => el("td", {
        class: i ? "num" : null, "data-label": ["", "mean", "null", "difference", "latents"][i],
      }, text)));
    });
    return el("section", {}, el("h3", {}, "Scores beside their nulls"),
      el("div", { class: "card scroll" }, el("table", { class: "stack" },
        el("thead", {}, el("tr", {}, ["Score", "Mean", "Null", "Difference [95 %]", "Latents"].map((head, i) => el("th", { scope: "col", class: i ? "num" : null }, head)))),
        el("tbody", {}, cells))),
      el("p", { class: "soft" }, "A null asks the same of an equally frequent other latent in each one's place. Intervals: bootstrap over the latents shown. The one token is picked on the same firings, so rare latents score a little high there."));
  }

  function density(overview) {
    const { low, high } = overview.density;
    return el("figure", { class: "card" }, el("h4", {}, "Density of all latents that fire"),
      histogram(overview.density, {
        label: "Histogram of log10 density", unit: "latents",
        ends: [`${percent(10 ** low)} of tokens`, percent(10 ** high)],
      }),
      el("figcaption", {}, "Share of tokens at which a latent fires, on a logarithmic scale."));
  }

  function show(main) {
    const list = interpPages.list;
    main.replaceChildren(first(list.overview),
      el("div", { class: "split" }, ...[scores(list)].filter(Boolean), density(list.overview)),
      el("h3", { id: "list" }, "Latents"), tools(),
      el("div", { class: "card scroll" }, el("table", { id: "latents", class: "latents" },
        el("thead", {}, el("tr", {})), el("tbody", {}))));
    draw();
    window.scrollTo({ top: state.top, behavior: "instant" });
    const link = state.last === null ? null : main.querySelector(`a[href="#/latent/${state.last}"]`);
    if (link) link.focus({ preventScroll: true });
  }

  function leave(latent) {
    if (document.getElementById("latents")) state.top = window.scrollY;
    state.last = latent;
  }

  return Object.freeze({ show, has, place, neighbour, leave });
})();
