"""`interp sae pages`: from a saved dictionary to a folder of pages and Neuronpedia batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from interp.cli.sae_pages import pages, wanted
from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.saved import SavedDictionary, save


@pytest.fixture
def run() -> object:
    """The command as a script sees it: errors are raised, not printed."""
    app = typer.Typer()
    app.command()(pages)

    def call(*arguments: object) -> object:
        return app([str(argument) for argument in arguments], standalone_mode=False)

    return call


def saved(folder: Path, certificate: dict[str, float] | None = None, **about: str) -> Path:
    made = SparseDictionary.random(32, 64, TopK(4), seed=0).requires_grad_(False)
    return save(SavedDictionary(dictionary=made, about=about, certificate=certificate), folder)


def test_what_latents_are_wanted() -> None:
    assert (wanted("100"), wanted("all"), wanted("12,"), wanted("7,3")) == (100, "all", (12,), (7, 3))
    with pytest.raises(InterpError, match="give a number, all, or numbers"):
        wanted("some")


def test_a_saved_dictionary_becomes_pages(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "dict", model="tiny-llama", site="resid_post.1")
    run(
        path,
        "--tokens",
        600,
        "--length",
        64,
        "--latents",
        "5",
        "--ablated",
        1,
        "--neuronpedia",
        tmp_path / "np",
        "--json",
    )
    facts = json.loads(capsys.readouterr().out)
    assert any("PCA with 4 components" in doubt for doubt in facts["doubts"]), "it was never trained"
    assert facts["n_shown"] == 5
    index = tmp_path / "dict-pages" / "index.html"
    assert Path(facts["pages"]) == index
    assert facts["bytes"] == sum(file.stat().st_size for file in index.parent.rglob("*") if file.is_file())
    overview = json.loads((index.parent / "pages.json").read_text(encoding="utf-8"))
    assert (overview["model"], overview["site"], overview["corpus"]) == ("tiny-llama", "resid_post.1", "docs")
    assert overview["n_tokens"] == 640, "whole sequences"
    batch = json.loads((tmp_path / "np" / "batch-0.json").read_text(encoding="utf-8"))
    assert len(batch["features"]) == 5
    assert len(batch["features"][0]["vector"]) == 32


def test_what_the_file_does_not_say_is_asked_for(run, tmp_path: Path) -> None:
    path = saved(tmp_path / "dict")
    with pytest.raises(InterpError, match="pass --model"):
        run(path)
    with pytest.raises(InterpError, match="pass --site"):
        run(path, "--model", "tiny-llama")


def test_a_folder_of_something_else_is_refused_before_the_work(run, tmp_path: Path) -> None:
    path = saved(tmp_path / "dict", model="no-such-model", site="resid_post.1")
    with pytest.raises(ArtefactError, match="holds no feature pages"):
        run(path, "--out", path)


def test_a_dictionary_that_does_not_fit_is_refused_with_nothing_written(run, tmp_path: Path) -> None:
    path = saved(tmp_path / "dict", {"fvu": 0.1, "l0": 4.0}, model="tiny-llama", site="resid_post.1")
    with pytest.raises(InterpError, match=r"FVU is .* --unchecked goes on all the same"):
        run(path, "--tokens", 600)
    assert [item.name for item in tmp_path.iterdir()] == ["dict"]
