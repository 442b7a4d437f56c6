"""Made-up results that exercise every kind of panel, and every place where hostile text could get in."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from interp.core.manifest import Manifest, ModelRecord
from interp.core.result import Control, Panel, Result
from interp.core.run import Run

EVIL = "<script>alert(1)</script>"
CLOSING = "</script><img src=x onerror=alert(2)>"


def manifest(method: str, **config: object) -> Manifest:
    model = ModelRecord(
        source="smollm2-135m", family="llama", weight_hash="0f" * 32, dtype="float32", device="cpu", attention="sdpa"
    )
    data = {"name": "docs:assignment", "n_sequences": 6, "length": 128, "hash": "ab" * 32}
    return Manifest(method=method, model=model, config=config, data=data, seeds=(0,), seconds=12.5, git="abc")


def massive(*, evil: str = "") -> Result:
    rng = np.random.default_rng(0)
    layers = list(range(30))
    norm = pd.DataFrame(
        {
            "layer": layers * 2,
            "largest": np.concatenate([10 ** (1 + 3.3 / (1 + np.exp(6 - np.arange(30)))), 10 + rng.random(30) * 40]),
            "where": ["position 0, dim 507"] * 30 + ["control: ordinary dims"] * 30,
        }
    )
    norm["low"], norm["high"] = norm.largest * 0.8, norm.largest * 1.25
    loss = pd.DataFrame(
        {
            "intervention": ["none", "zero dim 507", "mean of dim 507", "zero dim 100 (control)"],
            "loss": [3.143, 14.46, 3.145, 3.146],
            "low": [3.0, 13.9, 3.0, 3.0],
            "high": [3.3, 15.0, 3.3, 3.3],
        }
    )
    tokens = pd.DataFrame(
        {"token": ["The", EVIL, CLOSING, "\n", "$x^2$", "&amp;"], "value": [1.0, 2, 3, 4, 5, math.nan]}
    )
    return Result(
        headline={"site": "resid_post.11", "pos": 0, "dim": 507, "value": 23312.4, "ratio": 8211.0, "loss_base": 3.143,
                  "loss_zeroed": 14.46, "loss_mean": 3.145, "loss_control": 3.146},
        tables={"norm": norm, "loss": loss, "tokens": tokens},
        panels=(
            Panel(title=f"The largest coordinate by layer {evil}", kind="line", table="norm", x="layer", y="largest",
                  group="where", low="low", high="high", log_y=True, x_label="layer", y_label="largest |value|",
                  reading=f"One coordinate of one token leaves the rest behind after layer 4. {evil}"),
            Panel(title="Loss under intervention", kind="bar", table="loss", x="intervention", y="loss", low="low",
                  high="high", y_label="loss (nats per token)",
                  reading="Only removing the outlier breaks the model; its mean is enough, so it acts as a constant."),
            Panel(title="Tokens", kind="bar", table="tokens", x="token", y="value", x_label=f"token {evil}"),
        ),
        controls=(
            Control(name="zero an ordinary dim", statistic="loss (nats)", observed=14.46, control=3.146, passed=True),
            Control(name=f"other texts {evil}", statistic="share with the same dim", observed=0.7, control=0.9,
                    passed=False, p_value=0.31),
        ),
        manifest=manifest("massive", ratio=1000.0, n_sequences=6, evil=evil),
        notes=(f"The first position dominates in most models. {evil}",),
    )  # fmt: skip


def patching(*, evil: str = "") -> Result:
    rng = np.random.default_rng(1)
    words = [
        "When",
        " Mary",
        " and",
        " John",
        " went",
        " to",
        " the",
        " store",
        ",",
        " John",
        " gave",
        " a",
        " drink",
        " to",
    ]
    rows = [
        (part, layer, f"{i} {word}", float(rng.normal(0, 0.3) + (part == "resid_post") * (i == 9) * layer / 5))
        for part in ("resid_post", "attn_out", "mlp_out")
        for layer in range(30)
        for i, word in enumerate(words)
    ]
    grid = pd.DataFrame(rows, columns=["site", "layer", "token", "recovered"])
    exact = rng.normal(size=420)
    points = pd.DataFrame({"exact": exact, "attribution": exact * 0.8 + rng.normal(0, 0.4, size=420)})
    points["part"] = np.where(np.arange(420) % 2, "resid_post", "attn_out")
    return Result(
        headline={"logit_diff_clean": 3.21, "logit_diff_corrupt": -2.98, "top_sites": ["resid_post.17", "z.18", evil],
                  "attribution_correlation": 0.87, "seconds": 41.2},
        tables={"grid": grid, "points": points},
        panels=(
            Panel(title="Denoising: how much of the logit difference each site restores", kind="heatmap", table="grid",
                  x="token", y="layer", value="recovered", facet="site", value_label="share restored",
                  reading="The second subject carries the answer until layer 17; then the last position does."),
            Panel(title="Attribution against exact patching", kind="scatter", table="points", x="exact",
                  y="attribution", group="part", x_label="exact effect (logits)", y_label="attribution (logits)"),
        ),
        controls=(Control(name="20 random sites", statistic="|effect|, 95th percentile", observed=2.1, control=0.3,
                          passed=True, p_value=0.0005),),
        manifest=manifest("patching"),
    )  # fmt: skip


def steering() -> Result:
    rng = np.random.default_rng(2)
    rows = [
        (f"resid_post.{layer}", strength, name, value, value - 0.3, value + 0.3)
        for layer in (8, 12, 16, 20)
        for strength in (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0)
        for name, value in (
            ("steering vector", 3 * math.tanh(strength / 4) * layer / 20),
            ("random directions", float(rng.normal(0, 0.1))),
        )
    ]
    sweep = pd.DataFrame(rows, columns=["site", "strength", "direction", "effect", "low", "high"])
    return Result(
        headline={"site": "resid_post.16", "effect": 2.31, "control_p95": 0.41, "kl_neutral": 0.12},
        tables={"sweep": sweep},
        panels=(Panel(title="Effect by strength", kind="line", table="sweep", x="strength", y="effect",
                      group="direction", facet="site", low="low", high="high",
                      x_label="strength (activation norms)", y_label="change of logit difference"),),
        controls=(Control(name="20 random directions of equal norm", statistic="effect against 95th percentile",
                          observed=2.31, control=0.41, passed=True, p_value=0.048),),
        manifest=manifest("steering"),
    )  # fmt: skip


def run(*, evil: str = "") -> Run:
    facts = {"verify": {"max_abs_diff": 0.0, "passed": True, "n_checks": 61}, "seconds": 93.1}
    return Run(results=(massive(evil=evil), patching(evil=evil), steering()), facts=facts)
