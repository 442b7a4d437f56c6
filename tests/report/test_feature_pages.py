"""The feature browser: a folder that opens from disk, holds hostile tokens as text, and works by mouse and by keys."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from interp.core.errors import ArtefactError
from interp.dictionaries.formats.neuronpedia import NeuronpediaExport
from interp.dictionaries.pages.values import (
    Example,
    FeaturePage,
    Header,
    Histogram,
    LogitLens,
    Neighbour,
    Neighbours,
    Overview,
    Scores,
    TokenScore,
)
from interp.report.feature_pages import write_pages
from interp.report.feature_pages.data import rounded
from interp.report.feature_pages.writer import SCRIPTS

HOSTILE = (
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "\u2028", "\u2029", "'\"`${alert(3)}", "\n",
    "\u202eevil", "&amp;", "\ud800", "\x00", "]]>", "<!--", "a",
)  # fmt: skip
N_BINS, N_INTERVALS = 20, 4


def example(latent: int, group: int, rank: int, *, ablated: bool) -> Example:
    tokens = tuple(HOSTILE[(latent + rank + i) % len(HOSTILE)] for i in range(9))
    values = tuple(0.0 if i % 3 else 1.0 / (1 + i + rank) for i in range(9))
    return Example(
        group=group, row=rank, pos=16, start=10, ids=tuple(range(9)), tokens=tokens, values=values, first=rank == 1,
        loss=(0.2, -0.1, 0.0, 0.0, 0.0, 0.05, 0.31, 0.0, None) if ablated else None,
        loss_null=0.01 if ablated else None,
    )  # fmt: skip


def feature(latent: int) -> FeaturePage:
    top = [example(latent, -1, rank, ablated=rank < 2) for rank in range(3)]
    inside = [example(latent, group, rank, ablated=False) for group in (3, 1, 0) for rank in range(2)]
    lens = LogitLens(
        top=tuple(TokenScore(id=i, text=text, value=3.0 - i) for i, text in enumerate(HOSTILE[:4])),
        bottom=(TokenScore(id=9, text="down", value=-2.0),),
        histogram=Histogram(edges=(-2.0, 0.0, 3.0), counts=(5, 6)),
        skew=0.1, kurtosis=0.2, hit=0.5, hit_null=0.25,
    )  # fmt: skip
    return FeaturePage(
        latent=latent,
        header=Header(
            density=0.01 * (1 + latent % 7), n_firings=40, max_activation=1.0, dead=False, decoder_norm=1.0,
            encoder_norm=0.5, cosine=0.9, bias=-0.125,
        ),
        histogram=Histogram(edges=tuple(i / N_BINS for i in range(N_BINS + 1)), counts=(2,) * N_BINS),
        lens=lens,
        neighbours=Neighbours(
            similar=(Neighbour(name=str(latent + 1), value=0.5, null=0.1, latent=latent + 1),),
            correlated=(Neighbour(name="99999", value=0.4, latent=99999, together=0.3),),
            neurons=(Neighbour(name="L0 N3", value=-0.3, null=0.0),),
            coordinates=((7, 0.5, 0.25),),
        ),
        examples=(*top, *inside),
        scores=Scores(token_share=0.4, token_share_null=0.1, ablation=0.25, ablation_null=0.01, n_ablated=2),
        common=TokenScore(id=1, text=HOSTILE[latent % len(HOSTILE)], value=0.4),
        null_latent=latent + 1,
    )  # fmt: skip


def overview(n: int) -> Overview:
    return Overview(
        model="<b>tiny</b>", site="resid_post.1", dictionary="</title><script>alert(4)</script>", corpus="docs&<i>",
        d_dict=2 * n, n_rows=10, n_tokens=4100, n_counted=4000, n_dead=n // 2, n_rare=n - n // 2, n_live=n, n_shown=n,
        min_firings=10, n_intervals=N_INTERVALS, seed=0, chosen="random", layer=1,
        lens_warning="The logit lens is <em>unreliable</em> here.",
        density=Histogram(edges=(-3.0, -1.5, 0.0), counts=(3, 4)), chance_similar=0.2, chance_neurons=0.3,
        notes=("<script>alert(5)</script>",),
    )  # fmt: skip


def write(folder: Path, n: int = 250, **more: Any) -> Path:
    return write_pages(folder, overview(n), (feature(3 * i) for i in range(n)), **more)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pages") / "pages")


def payload(path: Path) -> Any:
    """The JSON inside a data script."""
    text = path.read_text(encoding="ascii")
    found = re.fullmatch(r"interpPages\.(?:index|part)\((?:\d+, )?(.*)\);\n", text, flags=re.DOTALL)
    assert found, text[:80]
    return json.loads(found[1])


# The folder


def test_data_scripts_are_plain_ascii_json(index: Path) -> None:
    data = sorted((index.parent / "data").iterdir())
    assert [path.name for path in data] == ["index.js", *(f"p{i:05d}.js" for i in range(13))]
    for path in data:
        raw = path.read_bytes()
        assert not set(raw) & set(b"<>&"), path.name
        payload(path)
    part = payload(data[1])
    assert [page["latent"] for page in part["pages"]] == [3 * i for i in range(20)]
    shown = {part["texts"][i] for page in part["pages"] for e in page["examples"] for i in e["tokens"]}
    assert HOSTILE[0] in shown, "hostile text is there, as text"
    assert {"⏎", "\\x2028", "\\x202eevil", "\\x00", "\\xd800"} <= shown, "what cannot be seen is made visible"


def test_the_list_names_every_latent_with_its_part(index: Path) -> None:
    found = payload(index.parent / "data" / "index.js")
    assert len(found["rows"]) == 250
    place = [row[0] for row in found["rows"]].index(3 * 47)
    part = payload(index.parent / "data" / f"p{place // found['perPart']:05d}.js")
    assert part["pages"][place % found["perPart"]]["latent"] == 3 * 47


def test_scores_stand_beside_their_nulls(index: Path) -> None:
    scores = {score["name"]: score for score in payload(index.parent / "data" / "index.js")["scores"]}
    assert scores["token_share"] == {
        "name": "token_share", "n": 250, "mean": 0.4, "null": 0.1, "difference": 0.3, "low": 0.3, "high": 0.3,
    }  # fmt: skip
    assert (scores["lens_hit"]["mean"], scores["lens_hit"]["null"]) == (0.5, 0.25)
    assert scores["ablation"]["difference"] == 0.24
    facts = json.loads((index.parent / "pages.json").read_text(encoding="utf-8"))
    assert (facts["n_dead"], facts["n_rare"], facts["scores"]) == (125, 125, list(scores.values()))


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_has_no_inline_script_and_loads_only_its_own_files(index: Path) -> None:
    text = index.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert not [name for _, attrs in tags.found for name in attrs if name.startswith("on") or name == "style"]
    scripts = [attrs["src"] for tag, attrs in tags.found if tag == "script"]
    assert scripts == [*(f"assets/{name}" for name in SCRIPTS), "data/index.js"]
    assert "alert(4)" not in text or "<script>alert(4)" not in text
    assert re.findall(r"<script[^>]*>([^<]*)</script>", text) == [""] * len(scripts)
    policy = next(attrs["content"] for _, attrs in tags.found if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in (index.parent / "assets").iterdir():
        code = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|https?://(?!www\.w3)", code
        )


def test_numbers_are_short_and_finite() -> None:
    values = [0.123456, 12345.678, 1e-9, -0.0, float("nan"), float("inf"), None, 2.0]
    assert [rounded(value) for value in values] == [0.1235, 12350, 1e-9, 0, None, None, None, 2]


def test_an_older_folder_of_pages_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "pages", 45)
    write(tmp_path / "pages", 3)
    assert [path.name for path in (tmp_path / "pages" / "data").iterdir() if path.name != "index.js"] == ["p00000.js"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="holds no feature pages"):
        write(other, 3)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtefactError, match="is not a folder"):
        write(tmp_path / "file", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "pages"]
    assert (other / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_half_written(tmp_path: Path, stop: type[BaseException]) -> None:
    def breaking() -> Iterator[FeaturePage]:
        yield from (feature(i) for i in range(30))
        raise stop

    for n_before in (0, 1):
        if n_before:
            write(tmp_path / "pages", 3)
        with pytest.raises(stop):
            write_pages(tmp_path / "pages", overview(60), breaking())
        assert [path.name for path in tmp_path.iterdir()] == ["pages"] * n_before
    assert len(payload(tmp_path / "pages" / "data" / "index.js")["rows"]) == 3, "the older pages are still there"


def test_pages_are_written_as_they_come(tmp_path: Path) -> None:
    """Memory holds one part: when page 45 is made, the first two parts are on disk."""
    seen: list[int] = []

    def watched() -> Iterator[FeaturePage]:
        for i in range(50):
            if i == 45:
                (draft,) = tmp_path.iterdir()
                seen.append(len(list((draft / "data").iterdir())))
            yield feature(i)

    write_pages(tmp_path / "pages", overview(50), watched())
    assert seen == [2]


# Neuronpedia

FEATURE_KEYS = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values",
    "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset",
    "decoder_weights_dist", "vector", "activations",
}  # fmt: skip
"""What Neuronpedia's converter asks of a feature."""


def test_neuronpedia_batches(tmp_path: Path) -> None:
    pages = [dataclasses.replace(feature(i), vector=(0.5, -1.0)) for i in range(5)]
    with NeuronpediaExport(tmp_path / "np", overview(5), sae_set="res-2k", per_batch=2) as export:
        for page in pages:
            export.add(page)
    files = sorted((tmp_path / "np").iterdir())
    assert [path.name for path in files] == ["batch-0.json", "batch-1.json", "batch-2.json"]
    batches = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    assert [f["feature_index"] for batch in batches for f in batch["features"]] == [0, 1, 2, 3, 4]
    first = batches[0]
    assert {name: first[name] for name in first if name != "features"} == {
        "model_id": "<b>tiny</b>", "layer": 1, "sae_set": "res-2k", "sae_id_suffix": None,
    }  # fmt: skip
    found = first["features"][0]
    assert set(found) == FEATURE_KEYS
    assert found["vector"] == [0.5, -1.0]
    assert found["pos_str"] == list(HOSTILE[:4]), "tokens as the tokenizer has them"
    assert (found["n_prompts_total"], found["n_tokens_in_prompt"], found["frac_nonzero"]) == (10, 410, 0.01)
    assert found["freq_hist_data_bar_values"][0] == 0.025, "the middle of a bin"
    assert sum(found["freq_hist_data_bar_heights"]) == 40
    assert found["logits_hist_data_bar_values"] == [-1.0, 1.5]
    assert (found["correlated_features_indices"], found["correlated_features_l1"]) == ([99999], [0.3])
    assert (found["neuron_alignment_indices"], found["neuron_alignment_l1"]) == ([7], [0.25])
    top, inside = found["activations"][0], found["activations"][3]
    assert (top["bin_min"], top["bin_max"], top["bin_contains"]) == (-1.0, 1.0, -1.0)
    assert (inside["bin_min"], inside["bin_max"], inside["bin_contains"]) == (0.75, 1.0, 0.25)
    assert top["qualifying_token_index"] == 6
    assert len(top["tokens"]) == len(top["values"]) == 9


def test_a_broken_export_leaves_the_older_one(tmp_path: Path) -> None:
    with NeuronpediaExport(tmp_path / "np", overview(1)) as export:
        export.add(feature(7))

    def broken() -> None:
        with NeuronpediaExport(tmp_path / "np", overview(2), per_batch=1) as export:
            export.add(feature(8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert [path.name for path in tmp_path.iterdir()] == ["np"]
    found = json.loads((tmp_path / "np" / "batch-0.json").read_text(encoding="utf-8"))
    assert found["features"][0]["feature_index"] == 7
    (tmp_path / "np" / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="not a folder of Neuronpedia batches"):
        NeuronpediaExport(tmp_path / "np", overview(1))


# In a browser


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    from tests.conftest import find_browser

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser: Any, index: Path, width: int = 1500, scheme: str = "light", at: str = "") -> tuple[Any, list[str]]:
    """The page, and everything that must not happen, as it happens."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(15_000)
    seen: list[str] = []
    page.on("console", lambda m: seen.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: seen.append(f"exception: {e}"))
    page.on("dialog", lambda d: (seen.append(f"dialog: {d.message}"), d.dismiss()))
    page.on(
        "request", lambda r: None if r.url.startswith(("file:", "data:")) else seen.append(f"request: {r.url[:90]}")
    )
    page.goto(index.as_uri() + at)
    page.wait_for_selector("html[data-shown], [role=alert]")
    return page, seen


def shows(page: Any, what: str) -> None:
    page.wait_for_selector(f'html[data-shown="{what}"]')


def sideways(page: Any) -> int:
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (390, "light"), (900, "dark"), (1500, "light")])
def test_both_views_at_any_width(browser: Any, index: Path, width: int, scheme: str) -> None:
    page, seen = opened(browser, index, width, scheme)
    assert page.locator("#latents tbody tr").count() == 100
    assert sideways(page) == 0
    page.locator("#latents tbody a").first.click()
    shows(page, "0")
    assert sideways(page) == 0
    assert page.locator(".example").count() == 9
    assert page.evaluate("window.scrollY") == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 22, 26)") is (scheme == "dark")
    table = page.locator("#latents")
    page.go_back()
    shows(page, "list")
    if width <= 390:
        box = table.bounding_box()
        assert box["x"] + box["width"] <= width, "the columns that are left fit a narrow window"
    assert seen == []
    page.close()


@pytest.mark.browser
def test_hostile_tokens_are_text(browser: Any, index: Path) -> None:
    page, seen = opened(browser, index, at="#/latent/0")
    shows(page, "0")
    assert HOSTILE[0] in page.locator(".tokens").first.text_content()
    assert page.locator("main script, main img").count() == 0
    assert "<script>alert(5)</script>" not in page.content().replace("&lt;", "[")
    page.evaluate("location.hash = '#/latent/<img src=x onerror=alert(6)>'")
    shows(page, "list")
    assert "<script>alert(5)</script>" in page.locator(".first").text_content()
    page.wait_for_timeout(100)
    assert seen == []
    page.close()


@pytest.mark.browser
def test_sort_search_and_turn_the_page(browser: Any, index: Path) -> None:
    page, seen = opened(browser, index)
    first = page.locator("#latents tbody tr:first-child td").first
    page.get_by_role("button", name="density").click()
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    densities = page.locator("#latents tbody td.c3").all_text_contents()
    values = [float(text.split()[0]) for text in densities]
    assert values == sorted(values, reverse=True)
    page.get_by_role("button", name="density").click()
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="latent", exact=True).click()
    assert first.text_content() == "0"
    page.get_by_role("button", name="on →").click()
    assert page.locator("#found").text_content() == "101 to 200 of 250"
    assert first.text_content() == "300"
    page.get_by_role("button", name="on →").click()
    assert page.locator("#latents tbody tr").count() == 50
    assert page.locator("#on").is_disabled()
    page.locator("#search").fill("onerror")
    assert page.locator("#found").text_content() == "1 to 19 of 19"
    page.locator("#search").fill("747")
    assert page.locator("#latents tbody tr").count() == 1
    page.locator("#search").fill("no such token")
    assert page.locator("#found").text_content() == "No latent matches."
    assert seen == []
    page.close()


@pytest.mark.browser
def test_by_keys_alone(browser: Any, index: Path) -> None:
    page, seen = opened(browser, index)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("12")
    page.keyboard.press("Tab")
    for _ in range(20):
        if page.evaluate("document.activeElement.matches('#latents td a')"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    shows(page, "12")
    assert page.evaluate("document.activeElement.tagName") == "H2"
    page.keyboard.press("n")
    shows(page, "120")  # the next one that the search has found
    page.keyboard.press("p")
    shows(page, "12")
    page.locator(".tokens").first.focus()
    assert "activation" in page.locator("#readout").text_content()
    page.keyboard.press("ArrowRight")
    assert page.locator(".here").text_content() == page.locator(".tokens").first.locator("span").nth(7).text_content()
    page.keyboard.press("ArrowLeft")
    assert "zeroed: next-token loss +0.310 nats" in page.locator("#readout").text_content()
    page.keyboard.press("Escape")
    shows(page, "list")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#/latent/12", "back where one was"
    assert page.locator("#search").input_value() == "12"
    assert seen == []
    page.close()


@pytest.mark.browser
def test_colours_show_activation_or_loss(browser: Any, index: Path) -> None:
    page, seen = opened(browser, index, at="#/latent/3")
    shows(page, "3")
    token = page.locator(".tokens").first.locator("span").first
    assert "heat" in token.get_attribute("class")
    assert float(token.evaluate("e => e.style.getPropertyValue('--share')")) == 1.0
    page.get_by_label("rise of the next-token loss when zeroed").check()
    kinds = [span.get_attribute("class").split()[1:2] for span in page.locator(".tokens").first.locator("span").all()]
    assert kinds[:2] == [["rise"], ["fall"]]
    assert float(page.locator(".at").first.evaluate("e => e.style.getPropertyValue('--share')")) == 1.0
    page.locator(".tokens").nth(1).locator("span").nth(2).hover()
    assert page.locator("#readout").is_visible()
    assert seen == []
    page.close()


@pytest.mark.browser
def test_neighbours_link_to_pages_that_exist(browser: Any, index: Path) -> None:
    page, seen = opened(browser, index, at="#/latent/6")
    shows(page, "6")
    text = page.locator("main").text_content()
    assert "99999" in text
    assert page.locator('a[href="#/latent/99999"]').count() == 0
    for note in ("The logit lens is <em>unreliable</em> here.", "latent 7", "null +0.010", "about 0.20"):
        assert note in text, note
    page.evaluate("location.hash = '#/latent/99999'")
    page.wait_for_selector("[role=alert]")
    assert "Latent 99999 has no page here." in page.locator("main").text_content()
    assert seen == []
    page.close()


@pytest.mark.browser
def test_many_parts_are_read_and_forgotten(browser: Any, index: Path) -> None:
    page, seen = opened(browser, index)
    for i in [*range(0, 250, 20), 0]:
        page.evaluate(f"location.hash = '#/latent/{3 * i}'")
        shows(page, str(3 * i))
        assert page.locator("h2").text_content().startswith(f"Latent {3 * i} ")
    assert page.locator("head script").count() == len(SCRIPTS) + 1, "data scripts do not pile up"
    assert seen == []
    page.close()


@pytest.mark.browser
def test_a_missing_file_is_said(browser: Any, tmp_path: Path) -> None:
    made = write(tmp_path / "pages", 30)
    (made.parent / "data" / "p00001.js").unlink()
    page, _ = opened(browser, made, at="#/latent/87")
    page.wait_for_selector("[role=alert]")
    assert "data/p00001.js cannot be read" in page.locator("main").text_content()
    page.evaluate("location.hash = '#/latent/0'")
    shows(page, "0")
    page.close()
    (made.parent / "data" / "index.js").unlink()
    page, _ = opened(browser, made)
    assert "data/index.js cannot be read" in page.locator("main").text_content()
    page.close()
