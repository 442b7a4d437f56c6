"""Sites: the vocabulary is complete and unambiguous, patterns expand as written, mistakes are named."""

from __future__ import annotations

import pytest

from interp.core.errors import InterpError, SiteError, nearest, unknown
from interp.core.sites import MAX_RANGE, PARTS, Part, Site, expand, is_glob, matches


def test_every_part_has_a_row_and_every_row_a_meaning() -> None:
    assert set(PARTS) == set(Part)
    for part, info in PARTS.items():
        assert info.meaning, part
        assert info.side in ("pre", "post", "linear"), part
        assert info.axes, part
        assert info.lens is None or ("{layer}" in info.lens) == info.per_layer, part


def test_gate_words_stand_on_their_side_of_the_nonlinearity() -> None:
    sides = {part: PARTS[part].side for part in (Part.GATE_PRE, Part.GATE, Part.UP, Part.NEURONS, Part.NEURONS_PRE)}
    assert sides == {"gate_pre": "pre", "gate": "post", "up": "linear", "neurons": "post", "neurons_pre": "pre"}
    assert PARTS[Part.PATTERN].side == "post"
    assert PARTS[Part.ATTN_SCORES].side == "pre"


def test_an_alias_means_one_part_within_a_gated_and_within_an_ungated_block() -> None:
    for absent in (Part.NEURONS_PRE, Part.GATE_PRE):
        sites = [Site(p, 0 if i.per_layer else None) for p, i in PARTS.items() if p not in (absent, Part.MODULE)]
        names = [name for site in sites for name in (str(site), *site.aliases)]
        assert len(set(names)) == len(names)


def test_text_of_a_site() -> None:
    assert str(Site(Part.RESID_POST, 12)) == "resid_post.12"
    assert str(Site(Part.LOGITS)) == "logits"
    assert str(Site(Part.MODULE, path="features.3@input")) == "features.3@input"
    assert Site(Part.GATE_PRE, 3).aliases == ("blocks.3.mlp.hook_pre", "mlp_pre.3")
    assert Site(Part.Z, 1) == Site(Part.Z, 1)
    assert len({Site(Part.Z, 1), Site(Part.Z, 1), Site(Part.Z, 2)}) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"part": Part.Z}, "z needs layer"),
        ({"part": Part.LOGITS, "layer": 2}, "logits takes no layer"),
        ({"part": Part.MODULE}, "path"),
        ({"part": Part.MODULE, "layer": 1, "path": "x"}, "path"),
    ],
)
def test_impossible_sites(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(SiteError, match=says):
        Site(**arguments)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("z.5", ["z.5"]),
        ("logits", ["logits"]),
        ("z.{3,5}", ["z.3", "z.5"]),
        ("z.{3, 5}", ["z.3", "z.5"]),
        ("{q,k}.{0,1}", ["q.0", "q.1", "k.0", "k.1"]),
        ("resid_post.10-12", ["resid_post.10", "resid_post.11", "resid_post.12"]),
        ("resid_post.7-7", ["resid_post.7"]),
        ("z.{0,4-6}", ["z.0", "z.4", "z.5", "z.6"]),
        ("neurons.*", ["neurons.*"]),
        ("{gate,up}.*", ["gate.*", "up.*"]),
        ("model.layers.3-4", ["model.layers.3", "model.layers.4"]),
        ("10-12", ["10-12"]),
        ("", [""]),
    ],
)
def test_expand(pattern: str, names: list[str]) -> None:
    assert expand(pattern) == names


def test_ranges_that_make_no_sense() -> None:
    with pytest.raises(SiteError, match="5 is after 3"):
        expand("z.5-3")
    with pytest.raises(SiteError, match=f"at most {MAX_RANGE}"):
        expand("z.0-999999999999")


def test_globs() -> None:
    assert is_glob("neurons.*")
    assert is_glob("z.[12]")
    assert is_glob("z.?")
    assert not is_glob("z.{1,2}")
    assert matches("neurons.12", "neurons.*")
    assert not matches("neurons_pre.12", "neurons.*")
    assert not matches("Neurons.12", "neurons.*")


def test_errors_name_the_nearest() -> None:
    assert nearest("resid_pots", [part.value for part in Part])[0] == "resid_post"
    assert nearest("zzzz", ["alpha", "beta"]) == ["alpha", "beta"]
    assert nearest("x", []) == []
    error = unknown("site", "gates.3", ["gate.3", "up.3"], error=SiteError)
    assert isinstance(error, SiteError)
    assert isinstance(error, InterpError)
    assert "'gates.3'" in str(error)
    assert "gate.3" in str(error)
    assert "none to choose from" in str(unknown("model", "x", []))
