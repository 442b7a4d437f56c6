"""Codes in a model whose hidden states are known: it works through learned codes, and not through others."""

from __future__ import annotations

import pytest
import torch

from interp.dictionaries.codebook import Codebook
from interp.dictionaries.codebook_config import CodebookConfig
from interp.dictionaries.codebook_quantise import Quantiser
from interp.dictionaries.codebook_train import train_in_model
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, edited
from interp.models.model import LoadedModel
from interp.tasks.tokfsm import TokFSM, legal_share, small_model, train_on

pytestmark = [pytest.mark.needs_package("vector_quantize_pytorch"), pytest.mark.slow]
SITES = ("attn_out.0", "attn_out.1")


def through(task: TokFSM, model: LoadedModel, books: dict[str, Codebook]) -> float:
    """Legal share with every token at the sites replaced by its codes."""
    edits = [
        Edit(site, lambda x, _, book=book: book.decode(book.encode(x.flatten(2))).reshape(x.shape))
        for site, book in books.items()
    ]
    with edited(model, edits):
        return legal_share(task, model, n=512)


def test_attention_through_one_code_per_token_keeps_the_states():
    task = TokFSM.random(30, 3, seed=0)
    model = train_on(task, small_model(task), n_steps=500, n_states=12)
    assert legal_share(task, model, n=512) > 0.95
    train = task.record(model, 1500, 12, seed=5)
    keep = (torch.arange(train.ids.shape[1]) > 0).expand(train.ids.shape)
    cfg = CodebookConfig(
        n_codes=200, k=1, similarity="euclidean", task="ce", n_steps=400, rows_per_step=32, model_lr=1e-3
    )
    with capture(model, SITES) as acts:
        model(train.rows(range(200)))
    samples = {site: acts[site][:, 1:].flatten(0, 1) for site in SITES}
    learned = train_in_model(model, {s: Quantiser(x, cfg) for s, x in samples.items()}, train, keep, cfg, finetune=True)
    assert learned.model is not None
    assert through(task, learned.model, learned.codebooks) > 0.95
    noise = torch.Generator().manual_seed(0)
    strangers = {
        s: Quantiser(x.std(0) * torch.randn(x.shape, generator=noise) + x.mean(0), cfg).frozen()
        for s, x in samples.items()
    }
    assert through(task, model, strangers) < 0.7
