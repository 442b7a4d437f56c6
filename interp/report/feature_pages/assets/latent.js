/* The page of one latent. */
"use strict";
const latentView = (() => {
  function card(name, value, note) {
    return el("div", { class: "card" }, el("span", { class: "value" }, value), el("span", { class: "name" }, name),
      note ? el("span", { class: "null" }, note) : null);
  }

  function header(page) {
    const counted = interpPages.list.overview.n_counted;
    const items = [
      card("density", percent(page.density), `${whole(page.firings)} of ${whole(counted)} tokens`),
      card("largest activation", number(page.max)),
      card("‖d‖ decoder", number(page.decoderNorm)),
    ];
    if (page.encoderNorm !== null) items.push(card("‖e‖ encoder", number(page.encoderNorm)));
    if (page.cosine !== null) items.push(card("cos(e, d)", number(page.cosine)));
    if (page.bias !== null) items.push(card("encoder bias", number(page.bias)));
    return el("div", { class: "cards" }, items);
  }

  function scores(page, texts) {
    const items = [];
    if (page.common) {
      items.push(card("of firings on one token", [percent(page.common[1]), " ", tokenChip(texts[page.common[0]])],
        `null ${percent(page.shareNull)}`));
    }
    if (page.lens && page.lens.hit !== null) {
      items.push(card("of firings before a promoted token", percent(page.lens.hit), `null ${percent(page.lens.hitNull)}`));
    }
    if (page.ablation !== null) {
      items.push(card(`nats of next-token loss when zeroed, mean of ${page.nAblated} top examples`,
        nats(page.ablation), `null ${nats(page.ablationNull)}`));
    }
    if (!items.length) return null;
    const other = page.standIn === null ? "" : ` Here it is latent ${page.standIn}.`;
    return el("section", {}, el("h3", {}, "Scores beside their nulls"), el("div", { class: "cards" }, items),
      el("p", { class: "soft" }, `A null asks the same of an equally frequent latent in this one's place.${other}`));
  }

  function histograms(page) {
    const figures = [];
    if (page.histogram) {
      figures.push(el("figure", { class: "card" }, el("h4", {}, `Activations (fires at ${percent(page.density)} of tokens)`),
        histogram(page.histogram, {
          label: `Histogram of ${whole(page.firings)} firing values up to ${number(page.max)}`, ends: ["0", number(page.max)],
          unit: "firings",
        }),
        el("figcaption", {}, "Firing values only.")));
    }
    if (page.lens) {
      figures.push(el("figure", { class: "card" }, el("h4", {}, "Logits of all tokens"),
        histogram(page.lens.histogram, {
          label: `Histogram of logits, skewness ${number(page.lens.skew)}`, unit: "tokens", zero: true,
        }),
        el("figcaption", {}, `Skewness ${number(page.lens.skew)}, excess kurtosis ${number(page.lens.kurtosis)}.`)));
    }
    return figures.length ? el("div", { class: "figures" }, figures) : null;
  }

  function table(heads, rows) {
    return el("table", {}, el("thead", {}, el("tr", {}, heads.map((head, i) => el("th", { scope: "col", class: i ? "num" : null }, head)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => el("td", { class: i ? "num" : null }, cell))))));
  }

  function lens(page, texts) {
    if (!page.lens) return null;
    const side = (title, rows) => el("div", { class: "card" },
      el("h4", {}, title), table(["token", "logit"], rows.map(([t, v]) => [tokenChip(texts[t]), signed(v)])));
    const warning = interpPages.list.overview.lens_warning;
    return el("section", {}, el("h3", {}, "What its direction promotes"),
      warning ? el("p", { class: "warning" }, warning) : null,
      el("div", { class: "columns two" }, side("Most promoted", page.lens.top), side("Most suppressed", page.lens.bottom)),
      el("p", { class: "soft" }, "Logit lens: the decoder row times the final norm's weight and the unembedding, the vocabulary's mean taken out; up to the norm's scale."));
  }

  function near(page) {
    const overview = interpPages.list.overview;
    const link = ([name, , , latent]) => latent === null ? name
      : listView.has(latent) ? el("a", { href: `#/latent/${latent}` }, name) : name;
    const side = (title, head, measure, rows, chance) => rows.length ? el("div", { class: "card" }, el("h4", {}, title),
      table([head, measure, "null"], rows.map((row) => [link(row), number(row[1]), number(row[2])])),
      chance ? el("p", { class: "soft" }, `By chance the largest would be about ${number(chance, 2)}.`) : null) : null;
    const tables = [
      side("Most similar rows", "latent", "cosine", page.similar, overview.chance_similar),
      side("Fires with it", "latent", "correlation", page.correlated, null),
      side("Most aligned neurons", "neuron", "cosine", page.neurons, overview.chance_neurons),
    ].filter(Boolean);
    return tables.length ? el("section", {}, el("h3", {}, "Neighbours"), el("div", { class: "columns three" }, tables)) : null;
  }

  function examples(page, texts) {
    if (!page.examples.length) return null;
    const groups = new Map();
    for (const example of page.examples) {
      if (!groups.has(example.group)) groups.set(example.group, []);
      groups.get(example.group).push(example);
    }
    const section = el("section", { class: "examples-of" });
    const top = groups.get(-1) || [];
    groups.delete(-1);
    const bins = page.histogram.counts, n = interpPages.list.overview.n_intervals;
    const share = (i) => bins.slice((i * bins.length) / n, ((i + 1) * bins.length) / n).reduce((a, b) => a + b, 0) / page.firings;
    section.append(el("div", { class: "bar-of" }, el("h3", {}, "Where it fires most"),
      top.some((example) => example.loss) ? exampleView.chooser(section) : ""),
      exampleView.group(page, texts, top),
      el("h3", {}, "Across its range"),
      el("p", { class: "soft" }, `Random examples of each of ${n} equal intervals of its activation, with the share of its firings.`),
      ...[...groups].sort((a, b) => b[0] - a[0]).map(([i, found]) => el("details", { open: true },
        el("summary", {}, `${number((page.max * i) / n)} to ${number((page.max * (i + 1)) / n)} `,
          el("span", { class: "soft" }, `${percent(share(i))} of firings`)),
        exampleView.group(page, texts, found))));
    return section;
  }

  function step(latent, by, label, sign) {
    const other = listView.neighbour(latent, by);
    return other === null ? el("span", { class: "step off" }, label)
      : el("a", { class: "step", href: `#/latent/${other}`, rel: by > 0 ? "next" : "prev" }, by < 0 ? `${sign} ` : "", label, by > 0 ? ` ${sign}` : "");
  }

  function show(main, page, texts) {
    main.replaceChildren(
      el("nav", { class: "crumbs", "aria-label": "Latents" }, el("a", { href: "#/" }, "All latents"),
        el("span", {}, step(page.latent, -1, "previous", "←"), " ", step(page.latent, 1, "next", "→"))),
      el("h2", { tabindex: -1 }, `Latent ${page.latent} `,
        page.dead ? el("span", { class: "mark failed" }, "dead") : "",
        page.common ? el("span", { class: "soft small" }, "most often on ", tokenChip(texts[page.common[0]])) : ""),
      page.dead ? el("p", { class: "warning" }, "It fires at none of the counted tokens.") : "",
      header(page), ...[scores(page, texts), examples(page, texts), histograms(page), lens(page, texts), near(page)].filter(Boolean));
    main.querySelector("h2").focus({ preventScroll: true });
    window.scrollTo({ top: 0, behavior: "instant" });
  }

  return Object.freeze({ show });
})();
