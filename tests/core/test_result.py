"""Results and manifests: a claim without a control, or a figure of a missing column, cannot be built."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pandas as pd
import pytest
import torch

from interp.core.errors import InterpError
from interp.core.manifest import Manifest, ModelRecord, versions
from interp.core.result import Control, LabelledTensor, Panel, Result


def manifest(method: str = "toy") -> Manifest:
    model = ModelRecord(
        source="tiny", family="llama", weight_hash="ab12", dtype="float32", device="cpu", attention="sdpa"
    )
    return Manifest(method=method, model=model, config={"k": 4}, data={"name": "docs", "hash": "cd34"}, seeds=(1, 2))


def result(method: str = "toy", **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "headline": {"effect": 1.5, "site": "z.3"},
        "tables": {"effects": pd.DataFrame({"layer": [0, 1], "effect": [0.5, 1.5], "kind": ["<b>", "é"]})},
        "panels": (Panel(title="Effect", kind="line", table="effects", x="layer", y="effect"),),
        "controls": (
            Control(name="random", statistic="95th percentile", observed=1.5, control=0.2, passed=True, p_value=0.01),
        ),
        "manifest": manifest(method),
        "tensors": {"effect": LabelledTensor(values=torch.randn(2, 3), axes=("layer", "head"), unit="nats")},
        "notes": ("one prompt dropped",),
    }
    return Result(**(fields | changes))


def test_a_result_needs_a_control() -> None:
    with pytest.raises(InterpError, match="'toy' carries no control"):
        result(controls=())


@pytest.mark.parametrize("field", ["x", "y", "value", "group", "low", "high", "facet"])
def test_a_panel_needs_its_columns(field: str) -> None:
    panel = Panel(**{"title": "t", "kind": "line", "table": "effects", "x": "layer", "y": "effect", field: "efect"})
    with pytest.raises(InterpError, match="column of table 'effects' 'efect'; nearest: effect"):
        result(panels=(panel,))


def test_a_panel_needs_its_table() -> None:
    with pytest.raises(InterpError, match="unknown table 'effect'; nearest: effects"):
        result(panels=(Panel(title="t", kind="bar", table="effect", x="layer", y="effect"),))


def test_a_tensor_needs_a_name_for_each_axis() -> None:
    with pytest.raises(InterpError, match="2 axes need as many names"):
        LabelledTensor(values=torch.zeros(2, 3), axes=("layer",))
    LabelledTensor(values=torch.tensor(1.0), axes=())


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result().headline = {}


def test_a_failed_control_is_said() -> None:
    shown = repr(
        result(
            controls=(Control(name="random", statistic="mean", observed=1.0, control=2.0, passed=False),),
        )
    )
    assert "FAILED: random: mean 1 against 2" in shown
    assert "note: one prompt dropped" in shown
    assert "control held" in repr(result())


def test_notebook_view_escapes() -> None:
    html = result(headline={"token": "<script>alert(1)</script>"})._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "random" in html


def test_tables_of_headline_and_controls() -> None:
    made = result()
    assert list(made.headline_table()["quantity"]) == ["effect", "site"]
    row = made.control_table().iloc[0]
    assert (row["observed"], row["under control"], row["p"], row["passed"]) == (1.5, 0.2, 0.01, True)


def test_manifest_round_trip_through_json() -> None:
    made = manifest()
    assert Manifest.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert made.versions["torch"] == torch.__version__
    assert set(versions()) >= {"python", "torch", "numpy"}
    assert made.created.endswith("+00:00")
