"""What the flags of a capture mean: the model, its sites, and the corpus as numbered batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from interp.cli import options
from interp.core.errors import InterpError


class CaptureJob:
    """One capture; nothing is opened before `open`."""

    def __init__(
        self, source: str, sites: str, corpus: str, length: int, packed: bool | None, separator: int | None,
        tokens: int | None, store_dtype: str, rows: int, shard_bytes: int,
    ) -> None:  # fmt: skip
        from interp.instrument.store import StoreConfig

        self.source, self.asked, self.corpus, self.length = source, sites, corpus, length
        self.packed, self.separator, self.tokens = packed, separator, tokens
        self.config = StoreConfig(dtype=store_dtype, rows_per_forward=rows, shard_bytes=shard_bytes)
        self.padding = 0.0
        self.of_items = False
        """Whether `tokens` counts images or arrays."""

    def open(self, steps: Any, device: str, dtype: str) -> None:
        """Load the model, find the sites, read the input."""
        with steps.step(f"opening {self.source}"):
            self.model = options.open_model(self.source, device, dtype)
        self.sites = self.model.resolve(split_sites(self.asked))
        with steps.step(f"reading {self.corpus}"):
            self.batches = self._batches()

    def _batches(self) -> Any:
        from interp.instrument.packing import bucketed, pack, pad
        from interp.instrument.stream import RecordBatches
        from interp.tasks.corpora import corpus_documents, token_ids
        from interp.tasks.corpora_inputs import is_input, load_inputs

        rows = self.config.rows_per_forward
        self._check_kind(is_input(self.corpus))
        if is_input(self.corpus):
            return load_inputs(self.corpus, rows_per_forward=rows, limit=self.tokens)
        if self.corpus.partition("?")[0] == "sampled":
            return RecordBatches(self._sampled(), rows)
        if self.packed is None:
            raise InterpError("documents have unequal lengths: say --pack to join them, or --pad for a sequence each")
        if self.separator is not None and not self.packed:
            raise InterpError("--separator stands between packed documents; drop it, or say --pack")
        enough = None if self.tokens is None else self.tokens + self.length
        longest = None if self.packed else self.length
        documents = token_ids(self.model, corpus_documents(self.corpus), enough=enough, longest=longest)
        if self.packed:
            record = pack(self.model, documents, self.length, separator=self.separator)
            return RecordBatches(_first(record, self.tokens), rows)
        batches = bucketed(_first(pad(self.model, documents, self.length), self.tokens), rows)
        self.padding = batches.padding
        return batches

    def _check_kind(self, items: bool) -> None:
        """Texts go to a model that reads them, images and arrays to one that does not."""
        self.of_items, sampled = items, self.corpus.partition("?")[0] == "sampled"
        if not items and self.model.tokenizer is None and not (sampled and not self.model.takes_pixels):
            taken = "images" if self.model.takes_pixels else "arrays"
            works = "sampled" if self.model.is_transformers and not self.model.takes_pixels else "array:PATH.npy"
            raise InterpError(
                f"--corpus {self.corpus} is text, and {self.source} has no tokenizer: it takes {taken}; say --corpus "
                + (f"images:FOLDER or --corpus {works}" if taken == "images" else works)
            )

    def _sampled(self) -> Any:
        from interp.tasks.corpora_files import read_options
        from interp.tasks.corpora_sampled import sampled_corpus

        given = read_options(self.corpus, ("seed", "temperature"))
        if self.tokens is None:
            raise InterpError("a sampled corpus has no end of its own; say how much with --tokens")
        n_rows = -(-self.tokens // self.length)
        try:
            seed, temperature = int(given.get("seed", 0)), float(given.get("temperature", 0.8))
        except ValueError as error:
            raise InterpError(f"{self.corpus!r}: seed is a whole number, temperature a number") from error
        return sampled_corpus(self.model, n_rows, self.length, seed=seed, temperature=temperature)

    def plan(self, out: str) -> Any:
        from interp.instrument.plan import plan_capture

        folder, n = None if "://" in out else Path(out), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return plan_capture(self.model, self.batches, self.sites, self.config, folder, n_processes=n)


def split_sites(text: str) -> list[str]:
    """Names at the commas that are not inside braces."""
    names, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            names.append("")
        else:
            names[-1] += letter
    return [name.strip() for name in names if name.strip()]


def _first(record: Any, tokens: int | None) -> Any:
    """Rows until `tokens` are reached."""
    if tokens is None or tokens >= record.n_tokens:
        return record
    n_rows = int((record.lengths.cumsum(0) < tokens).sum()) + 1
    return record.rows(slice(0, n_rows))
