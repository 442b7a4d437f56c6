"""Feature pages of a dictionary: what each latent fires on, promotes, resembles, and is worth to the model.

    with Pages(model, dictionary, data, "resid_post.10", PagesConfig(latents=100)) as pages:
        pages.overview                    # the share that was left out as dead or rare, and what to doubt
        for page in pages: ...            # one FeaturePage per latent, made chunk by chunk

One pass of the model writes the sparse codes to a temporary folder and totals to memory; every chunk of latents then
reads the codes again, so memory holds one chunk, not the dictionary. After the layout of SAEDashboard
(https://github.com/jbloomAus/SAEDashboard).
Trap: pages show what a latent fires on in this text. Rare latents, and text of one kind, make latents look purer than
they are; a latent with readable examples need not do what they suggest. Every score stands beside its null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Int

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.core.sites import Site
from interp.dictionaries.base import Dictionary
from interp.dictionaries.pages.ablation import Ablation, Effects
from interp.dictionaries.pages.assemble import Chunk, examples_of, headers, jobs_of, numbers
from interp.dictionaries.pages.choose import choose_latents, stand_ins
from interp.dictionaries.pages.config import PagesConfig
from interp.dictionaries.pages.lens import Lens
from interp.dictionaries.pages.neighbours import aligned_neurons, chance, n_neurons, neighbours_of
from interp.dictionaries.pages.record import Totals, record_codes
from interp.dictionaries.pages.tally import Tally
from interp.dictionaries.pages.values import Example, FeaturePage, Histogram, Overview
from interp.instrument.stream import Batches, RecordBatches
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.model import LoadedModel

TABLE = 1 << 26
"""Bytes of the largest table of a chunk, about."""
DENSITY_BINS = 30


class Pages:
    """The pages of one dictionary, made when iterated over; a context, for its temporary folder."""

    def __init__(
        self,
        model: LoadedModel,
        dictionary: Dictionary,
        data: TokenRecord | Batches,
        site: str | Site,
        cfg: PagesConfig | None = None,
        *,
        write_site: str | Site | None = None,
        corpus: str = "",
        name: str = "",
        vectors: bool = False,
        scratch: Path | None = None,
    ) -> None:
        """write_site: what the decoder predicts, for a transcoder; scratch: where the temporary folder goes."""
        self.model, self.dictionary, self.cfg = model, dictionary, cfg or PagesConfig()
        self.site = model.table.one(site)
        self.write_site = self.site if write_site is None else model.table.one(write_site)
        self.data = RecordBatches(data) if isinstance(data, TokenRecord) else data
        self.corpus, self.name, self.vectors, self._scratch = corpus, name, vectors, scratch
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Pages:
        try:
            return self._open()
        except BaseException:
            self._closing.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.close()

    def _open(self) -> Pages:
        cfg = self.cfg
        made = tempfile.TemporaryDirectory(prefix="interp-pages-", dir=self._scratch, ignore_cleanup_errors=True)
        folder = Path(self._closing.enter_context(made))
        self.codes, self.totals = record_codes(
            self.model, self.dictionary, self.data, self.site, folder, drop_norm=cfg.drop_norm
        )
        fired = self.totals.firings
        self.latents = choose_latents(fired, cfg.latents, min_firings=cfg.min_firings, seed=cfg.seed)
        self.nulls = stand_ins(fired, self.latents, min_firings=cfg.min_firings, seed=cfg.seed)
        self.features = self.dictionary.features.detach()
        self.lens, self.lens_warning = Lens.of(self.model, self.write_site, self.features.shape[1])
        return self

    @property
    def overview(self) -> Overview:
        """What all pages share."""
        cfg, fired = self.cfg, self.totals.firings
        n_dead, n_live = int((fired == 0).sum()), int((fired >= cfg.min_firings).sum())
        width = self.features.shape[1]
        n_near = n_neurons(self.model, self.write_site, width)
        site = str(self.site) if self.site == self.write_site else f"{self.site} to {self.write_site}"
        return Overview(
            model=self.model.source,
            site=site,
            dictionary=self.name or type(self.dictionary).__name__,
            corpus=self.corpus,
            d_dict=len(fired),
            n_rows=len(self.codes),
            n_tokens=self.totals.n_tokens,
            n_counted=self.totals.n_counted,
            n_dead=n_dead,
            n_rare=len(fired) - n_dead - n_live,
            n_live=n_live,
            n_shown=len(self.latents),
            min_firings=cfg.min_firings,
            n_intervals=cfg.n_intervals,
            seed=cfg.seed,
            chosen=self._chosen(n_live),
            layer=self.site.layer,
            lens_warning=self.lens_warning,
            density=_density(self.totals),
            chance_similar=chance(len(fired) - 1, width, signed=True),
            chance_neurons=chance(n_near, width, signed=False) if n_near else None,
            notes=self._notes(),
        )

    def _chosen(self, n_live: int) -> str:
        if isinstance(self.cfg.latents, tuple):
            return "named"
        return "all" if self.cfg.latents == "all" or len(self.latents) == n_live else "random"

    def _notes(self) -> tuple[str, ...]:
        notes: list[str] = []
        if isinstance(self.cfg.latents, tuple):
            notes.append("The latents were named by hand: they say nothing about the dictionary as a whole.")
        if isinstance(self.cfg.latents, int) and len(self.latents) < self.cfg.latents:
            notes.append(f"{self.cfg.latents} latents were asked for; only {len(self.latents)} fire often enough.")
        if self.totals.n_counted < 50_000:
            notes.append(
                f"Only {self.totals.n_counted:,} tokens count: examples are weak, and latents called dead may fire "
                "in more text. 50,000 are few, a million is better."
            )
        left_out = self.totals.n_tokens - self.totals.n_counted
        if left_out:
            notes.append(
                f"{left_out:,} of {self.totals.n_tokens:,} tokens are left out: the first of each row, and those whose "
                f"norm is above {self.cfg.drop_norm:g} times the median (massive activations)."
            )
        return tuple(notes)

    def __iter__(self) -> Iterator[FeaturePage]:
        parts = [slice(i, i + self.chunk) for i in range(0, len(self.latents), self.chunk)]
        for part in track(parts, "looking at latents"):
            yield from self._pages(self.latents[part], self.nulls[part])

    @property
    def chunk(self) -> int:
        """Latents handled at once."""
        widest = max(16 * len(self.totals.firings), 8 * self._d_vocab)
        return self.cfg.chunk or max(1, min(256, TABLE // widest))

    @property
    def _d_vocab(self) -> int:
        return self.model.dims.d_vocab or 1 + max(self.totals.strings, default=0)

    def _pages(self, latents: Int[np.ndarray, " n"], nulls: Int[np.ndarray, " n"]) -> list[FeaturePage]:
        cfg = self.cfg
        logits = self.lens.logits(self._rows(latents)) if self.lens else None
        promoted = promoted_null = None
        if self.lens is not None and logits is not None:
            promoted = logits.ends(cfg.n_tokens_listed)[0]
            promoted_null = self.lens.logits(self._rows(np.maximum(nulls, 0))).ends(cfg.n_tokens_listed)[0]
        tally = Tally(
            latents, nulls, self.totals, cfg, d_vocab=self._d_vocab, promoted=promoted, promoted_null=promoted_null
        )
        tally.read(self.codes)
        chunk = Chunk(latents=latents, nulls=nulls, tally=tally, logits=logits, cfg=cfg)
        examples = examples_of(chunk, self.codes, self.totals)
        effects = self._ablated(chunk, examples) if cfg.n_ablated and self.model.dims.d_vocab else {}
        others = np.maximum(nulls, 0)
        neurons = aligned_neurons(
            self.model, self.write_site, self._rows(latents), self._rows(others), cfg.n_neighbours
        )
        near = neighbours_of(latents, nulls, self.features, tally, neurons, cfg.n_neighbours)
        tops = headers(self.dictionary, self.features, latents, self.totals)
        pages = numbers(chunk, tops, near, examples, effects, self._strings(chunk), self.codes.rows)
        if not self.vectors:
            return pages
        vectors = [tuple(row) for row in self._rows(latents).float().tolist()]
        return [dataclasses.replace(page, vector=vector) for page, vector in zip(pages, vectors, strict=True)]

    def _rows(self, latents: Int[np.ndarray, " n"]) -> torch.Tensor:
        return self.features[torch.from_numpy(latents).to(self.features.device)]

    def _ablated(self, chunk: Chunk, examples: list[list[Example]]) -> Effects:
        jobs = jobs_of(chunk, examples)
        rows = {job.row: self.codes.block(job.row, job.row + 1) for job in jobs}
        ids = {row: torch.from_numpy(block.id.astype(np.int64)) for row, block in rows.items()}
        counted = {row: torch.from_numpy(block.kept) for row, block in rows.items()}
        return Ablation(self.model, self.dictionary, self.site, self.write_site).run(jobs, ids, counted)

    def _strings(self, chunk: Chunk) -> dict[int, str]:
        """Texts of the ids that the lists of this chunk need."""
        known = self.totals.strings
        if chunk.logits is None:
            return known
        ends = np.concatenate(chunk.logits.ends(self.cfg.n_tokens_listed), axis=None)
        missing = [i for i in np.unique(ends).tolist() if i not in known]
        if not missing:
            return known
        record = from_ids(self.model, torch.tensor(missing)[:, None])
        return known | {i: texts[0] for i, texts in zip(missing, record.strings, strict=True)}


def _density(totals: Totals) -> Histogram:
    """log10 of the density of the latents that fire."""
    fired = totals.firings[totals.firings > 0]
    if not len(fired):
        raise InterpError("no latent fires at any token; is this the site that the dictionary was trained on?")
    logs = np.log10(fired / totals.n_counted)
    low = math.floor(float(logs.min()) * 2) / 2
    counts, edges = np.histogram(logs, bins=DENSITY_BINS, range=(low, 0.0))
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))
