/* Which view is shown: `#/` the list, `#/latent/12` a latent; and the keys. */
"use strict";
(() => {
  const main = document.getElementById("main");
  let shown = null, turn = 0;

  function facts(overview) {
    const items = [["model", overview.model], ["site", overview.site], ["dictionary", `${overview.dictionary}, ${whole(overview.d_dict)} latents`],
      ["text", `${overview.corpus || "unnamed"}, ${whole(overview.n_tokens)} tokens`]];
    document.getElementById("facts").replaceChildren(...items.map(([name, value]) => el("li", {}, `${name} `, el("b", {}, value))));
  }

  function say(message) {
    main.replaceChildren(el("p", { class: "warning", role: "alert" }, message), el("p", {}, el("a", { href: "#/" }, "All latents")));
  }

  async function route() {
    const mine = ++turn, list = interpPages.list;
    exampleView.reset();
    if (!list) return say("data/index.js cannot be read; is the folder complete?");
    const found = /^#\/latent\/(\d{1,9})$/.exec(location.hash);
    if (!found) {
      listView.show(main);
      shown = null;
      document.title = document.title.replace(/^Latent \d+ · /, "");
      document.documentElement.dataset.shown = "list";
      return undefined;
    }
    const latent = Number(found[1]), place = listView.place(latent);
    listView.leave(latent);
    if (place === null) return say(`Latent ${latent} has no page here.`);
    try {
      const part = await interpPages.load(Math.floor(place / list.perPart));
      if (mine !== turn) return undefined; // another page was asked for meanwhile
      latentView.show(main, part.pages[place % list.perPart], part.texts);
      shown = latent;
      document.title = `Latent ${latent} · ${document.title.replace(/^Latent \d+ · /, "")}`;
      document.documentElement.dataset.shown = String(latent);
    } catch (error) {
      say(error.message);
    }
    return undefined;
  }

  function go(by) {
    const other = shown === null ? null : listView.neighbour(shown, by);
    if (other !== null) location.hash = `#/latent/${other}`;
  }

  window.addEventListener("hashchange", route);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest && event.target.closest("input[type=search], select");
    if (event.key === "Escape" && shown !== null) location.hash = "#/";
    if (typing) return;
    if (event.key === "n") go(1);
    if (event.key === "p") go(-1);
    const search = document.getElementById("search");
    if (event.key === "/" && search) {
      event.preventDefault();
      search.focus();
    }
  });
  window.addEventListener("DOMContentLoaded", () => {
    if (interpPages.list) facts(interpPages.list.overview);
    route();
  });
})();
