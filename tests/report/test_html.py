"""The report as text: self-contained, escaped, complete, written whole or not at all."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from interp.core.errors import ArtefactError
from interp.core.run import save_run
from interp.report import html as report
from interp.report.tables import MAX_ROWS, frame_html, shown
from tests.report import synthetic


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text by element, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def page(evil_report: Path) -> Page:
    return Page(evil_report.read_text(encoding="utf-8"))


def test_hostile_text_is_text(page: Page, evil_report: Path) -> None:
    text = " ".join(page.text)
    assert text.count(synthetic.EVIL) >= 8, "title, reading, notes, control, headline, table, manifest, config"
    assert synthetic.EVIL not in evil_report.read_text(encoding="utf-8")
    assert all("onerror" not in attributes for _, attributes in page.tags)
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert images
    assert all(source.startswith("data:image/svg+xml;base64,") for source in images)


def test_only_the_two_scripts_of_the_page_may_run(page: Page) -> None:
    kinds = [attributes for tag, attributes in page.tags if tag == "script"]
    assert all("src" not in attributes for attributes in kinds)
    live = [s for s, a in zip(page.scripts, kinds, strict=True) if a.get("type") != "application/json"]
    assert len(live) == 2
    policy = next(a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    allowed = re.search(r"script-src ([^;]*);", policy)
    assert allowed
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in live]
    assert allowed[1].split() == hashes


def test_nothing_points_to_the_network(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base"), tag
        assert "srcset" not in attributes
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert tag == "a" or not value or value.startswith("data:"), (tag, value)
            assert not value.lower().startswith("javascript:")


def test_every_panel_has_figure_data_and_a_picture(page: Page) -> None:
    n_panels = sum(len(result.panels) for result in synthetic.run().results)
    data = [json.loads(s) for s in page.scripts if s.startswith("{")]
    assert len(data) == n_panels
    assert sum(tag == "img" for tag, _ in page.tags) == n_panels


def test_the_page_says_what_failed_first(page: Page) -> None:
    text = " ".join(" ".join(page.text).split())
    assert text.index("Read this first") < text.index("✗ failed") < text.index("What could have refuted it")
    assert "3 of 4" in text, "the header counts the controls"
    assert text.count("✓ held") == 3
    assert text.count("✗ failed") == 2, "once at the top, once in its table"


def test_tables_are_capped_and_say_so() -> None:
    table = pd.DataFrame({"n": range(MAX_ROWS + 50)})
    text = frame_html(table, "tables/a.b.parquet")
    assert f"the first {MAX_ROWS} of {MAX_ROWS + 50} rows" in text
    assert text.count("<tr>") == MAX_ROWS + 1
    assert "first" not in frame_html(table.iloc[:MAX_ROWS], "tables/a.b.parquet")
    wide = pd.DataFrame({f"c{i}": [i] for i in range(30)})
    assert "24 of 30 columns" in frame_html(wide, "x")


@pytest.mark.parametrize(
    ("value", "text"),
    [(23312.4, "23,312"), (0.0, "0"), (1.2e-7, "1.2e-07"), (None, "–"), (True, "yes"), (float("nan"), "–"),
     (["a", 1.5], "a, 1.5"), ({"b": 2}, "b 2"), (1234567, "1,234,567"), (507, "507"), (float("inf"), "not finite")],
)  # fmt: skip
def test_values_are_readable(value: object, text: str) -> None:
    assert shown(value) == text


def test_papers_are_linked_and_only_https() -> None:
    linked = report._linked('Sun et al. 2024, https://arxiv.org/abs/2402.17762; "javascript:alert(1)" <b>')  # pyright: ignore[reportPrivateUsage]
    assert linked.count("<a ") == 1
    assert 'href="https://arxiv.org/abs/2402.17762"' in linked
    assert "&lt;b&gt;" in linked


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_run(tmp_path / "r", synthetic.run())
    first = report.write_report(folder).read_bytes()

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(ArtefactError, match="No space left"):
            report.write_report(folder)
    assert (folder / "report.html").read_bytes() == first
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_script_that_would_end_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "x = '</SCRIPT>'")
    with pytest.raises(ArtefactError, match="known-good plotly"):
        report.render(synthetic.run())


def test_a_method_that_is_gone_is_still_reported() -> None:
    old = dataclasses.replace(synthetic.steering(), manifest=synthetic.manifest("a_method_of_last_year"))
    text = report.render(dataclasses.replace(synthetic.run(), results=(old,)))
    assert "a_method_of_last_year" in text
