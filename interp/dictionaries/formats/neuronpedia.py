"""Feature pages as Neuronpedia's batch files, the JSON that SAEDashboard writes and Neuronpedia's converter reads.

    with NeuronpediaExport(folder, overview, sae_set="res-2k") as export:
        for page in pages: export.add(page)

batch-<n>.json is {model_id, layer, sae_set, sae_id_suffix, features: [...]}; a feature has the keys below. Top examples
have bin_min -1, bin_max the largest activation and bin_contains -1; those of an interval its ends and its share of the
firings. Histogram values are the middles of bins. What is not measured here (correlated neurons, weights per head) is
an empty list. Layout: https://github.com/jbloomAus/SAEDashboard, sae_dashboard/neuronpedia.
Trap: `correlated_features_l1` is, in that layout too, the cosine of activations, not an L1 norm.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from interp.core.errors import ArtefactError
from interp.dictionaries.pages.values import Example, FeaturePage, Histogram, Overview

PER_BATCH = 128
DIGITS = 6
ROWS = 3
"""Rows of each table of neighbours, as SAEDashboard has them."""


class NeuronpediaExport:
    """Writes batches as pages come; the folder appears when all are written."""

    def __init__(
        self,
        folder: Path,
        overview: Overview,
        *,
        sae_set: str = "",
        sae_id_suffix: str | None = None,
        model_id: str | None = None,
        per_batch: int = PER_BATCH,
    ) -> None:
        """sae_set and model_id are Neuronpedia's names; the site and the model's own name, if not given."""
        self.folder, self.overview, self.per_batch = Path(folder), overview, per_batch
        check_target(self.folder)
        self._head = {
            "model_id": model_id or overview.model,
            "layer": 0 if overview.layer is None else overview.layer,
            "sae_set": sae_set or overview.site.partition(".")[0],
            "sae_id_suffix": sae_id_suffix,
        }
        self._draft = self.folder.parent / f".{self.folder.name}.{uuid.uuid4().hex[:8]}"
        self._features: list[dict[str, Any]] = []
        self._n_batches = 0

    def __enter__(self) -> NeuronpediaExport:
        self._draft.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._flush()
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self._draft.rename(self.folder)
        except OSError as failed:
            raise ArtefactError(f"could not write {self.folder}: {failed.strerror or failed}; free space") from failed
        finally:
            shutil.rmtree(self._draft, ignore_errors=True)

    def add(self, page: FeaturePage) -> None:
        """One more latent; goes to disk with its batch."""
        self._features.append(feature(page, self.overview))
        if len(self._features) >= self.per_batch:
            self._flush()

    def _flush(self) -> None:
        if not self._features and self._n_batches:
            return
        text = json.dumps(self._head | {"features": self._features}, allow_nan=False)
        (self._draft / f"batch-{self._n_batches}.json").write_text(text, encoding="utf-8")
        self._features, self._n_batches = [], self._n_batches + 1


def check_target(folder: Path) -> None:
    """Refuse a folder that holds anything but batches."""
    if folder.exists() and (not folder.is_dir() or any(not _is_batch(path) for path in folder.iterdir())):
        raise ArtefactError(f"{folder} is not a folder of Neuronpedia batches; choose another place")


def _is_batch(path: Path) -> bool:
    return path.is_file() and path.name.startswith("batch-") and path.suffix == ".json"


def feature(page: FeaturePage, overview: Overview) -> dict[str, Any]:
    """One latent as Neuronpedia has it."""
    near, lens = page.neighbours, page.lens
    together = near.correlated[:ROWS]
    return {
        "feature_index": page.latent,
        "neuron_alignment_indices": [index for index, _, _ in near.coordinates],
        "neuron_alignment_values": [_short(value) for _, value, _ in near.coordinates],
        "neuron_alignment_l1": [_short(share) for _, _, share in near.coordinates],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [item.latent for item in together],
        "correlated_features_l1": [_short(item.together or 0.0) for item in together],
        "correlated_features_pearson": [_short(item.value) for item in together],
        "neg_str": [token.text for token in lens.bottom] if lens else [],
        "neg_values": [_short(token.value) for token in lens.bottom] if lens else [],
        "pos_str": [token.text for token in lens.top] if lens else [],
        "pos_values": [_short(token.value) for token in lens.top] if lens else [],
        "frac_nonzero": page.header.density,
        "freq_hist_data_bar_values": _middles(page.histogram),
        "freq_hist_data_bar_heights": list(page.histogram.counts) if page.histogram else [],
        "logits_hist_data_bar_heights": list(lens.histogram.counts) if lens else [],
        "logits_hist_data_bar_values": _middles(lens.histogram if lens else None),
        "n_prompts_total": overview.n_rows,
        "n_tokens_in_prompt": math.ceil(overview.n_tokens / overview.n_rows),
        "dataset": overview.corpus,
        "decoder_weights_dist": [],
        "vector": [] if page.vector is None else [_short(value) for value in page.vector],
        "activations": [_activation(example, page, overview) for example in page.examples],
    }


def _activation(example: Example, page: FeaturePage, overview: Overview) -> dict[str, Any]:
    low, high, contains = -1.0, page.header.max_activation, -1.0
    if example.group >= 0 and page.histogram is not None:
        n, counts = overview.n_intervals, page.histogram.counts
        inside = counts[example.group * len(counts) // n : (example.group + 1) * len(counts) // n]
        low, high = (page.header.max_activation * i / n for i in (example.group, example.group + 1))
        contains = sum(inside) / max(1, page.header.n_firings)
    return {
        "bin_min": _short(low),
        "bin_max": _short(high),
        "bin_contains": _short(contains),
        "tokens": list(example.tokens),
        "values": [_short(value) for value in example.values],
        "qualifying_token_index": example.at,
    }


def _middles(histogram: Histogram | None) -> list[float]:
    edges = histogram.edges if histogram else ()
    return [_short((low + high) / 2) for low, high in itertools.pairwise(edges)]


def _short(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.{DIGITS}g}")
