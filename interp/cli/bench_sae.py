"""`interp bench sae`: a training step and inference of a top-k dictionary, beside other libraries.

B 2048, k 32, real activations of the middle of the model, scaled to norm sqrt(d_in); four batches in turn. Training:
each library's own step (SAELens' forward pass and Adam as its trainer calls them, dictionary_learning's
`TopKTrainer.update`, sparsify's coder with the calls of its trainer), the auxiliary loss idle. The first row is the
encoder's matrix product alone, in float32: no exact top-k step that computes all pre-activations can be faster.
Inference: encode and decode without gradients.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from interp.cli.bench_capture import Group, Notes, Systems

BATCH, K = 2048, 32
WIDTHS = (8192, 32768)


def sae_groups(model: Any, notes: Notes, *, with_peers: bool) -> Iterator[Group]:
    """Training steps at both widths, then inference at both."""
    import torch

    x = _activations(model)
    batches = x.split(BATCH)
    for d_dict in WIDTHS:
        yield Group(case=f"training step, d_dict {d_dict}", systems=_training(batches, d_dict, notes, with_peers))
    with torch.no_grad():
        for d_dict in WIDTHS:
            yield Group(
                case=f"encode and decode, d_dict {d_dict}", systems=_inference(batches, d_dict, notes, with_peers)
            )


def _activations(model: Any) -> Any:
    """4 * 2048 tokens of the middle layer, without position 0, at norm sqrt(d)."""
    import torch

    from interp.instrument.capture import capture
    from interp.tasks.corpora import load_corpus

    n_sequences = 4 * BATCH // 127 + 1
    record = load_corpus(model, "docs", n_sequences, 128)
    site = f"resid_post.{model.n_layers // 3}"
    kept: list[Any] = []
    for ids in record.ids.split(8):
        with capture(model, [site]) as acts:
            model(ids)
        kept.append(acts[site][:, 1:].reshape(-1, acts[site].shape[-1]).clone())
    x = torch.cat(kept)[: 4 * BATCH].float()
    return x * (x.shape[1] ** 0.5 / x.norm(dim=1).mean())


def _cycled(step: Callable[[Any], object], batches: Any) -> Callable[[], object]:
    endless = itertools.cycle(batches)
    return lambda: step(next(endless))


def _training(batches: Any, d_dict: int, notes: Notes, with_peers: bool) -> Systems:
    systems: Systems = {"encode GEMM alone": _cycled(_product(batches, d_dict), batches)}
    for name, kind in (("interp", "topk"), ("interp, batch top-k", "batch_topk")):
        systems[name] = _cycled(_ours(batches, d_dict, kind), batches)
    if with_peers:
        makers = {"SAELens": _sae_lens, "sparsify": _sparsify, "dictionary_learning": _dictionary_learning}
        systems |= {n: _cycled(s, batches) for n, s in _made(makers, batches, d_dict, notes).items()}
    return systems


def _inference(batches: Any, d_dict: int, notes: Notes, with_peers: bool) -> Systems:
    from interp.dictionaries.activations.topk import TopK
    from interp.dictionaries.dictionary import SparseDictionary

    ours = SparseDictionary.random(batches[0].shape[1], d_dict, TopK(K), seed=0).requires_grad_(False)
    systems: Systems = {
        "encode GEMM alone": _cycled(_product(batches, d_dict), batches),
        "interp": _cycled(ours, batches),
    }
    if with_peers:
        makers = {"SAELens": _sae_lens_inference, "sparsify": _sparsify_inference}
        systems |= {n: _cycled(s, batches) for n, s in _made(makers, batches, d_dict, notes).items()}
    return systems


def _made(makers: dict[str, Any], batches: Any, d_dict: int, notes: Notes) -> dict[str, Callable[[Any], object]]:
    packages = {"SAELens": "sae_lens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
    found: dict[str, Callable[[Any], object]] = {}
    for name, make in makers.items():
        if find_spec(packages[name]) is None:
            notes.left_out[name] = f"{packages[name]} is not installed"
            continue
        try:
            step = make(batches[0].shape[1], d_dict)
            step(batches[0])
            found[name] = step
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            notes.left_out[name] = f"{type(error).__name__}: {error}"
    return found


def _product(batches: Any, d_dict: int) -> Callable[[Any], object]:
    import torch

    from interp.core.seed import torch_generator

    d_in = batches[0].shape[1]
    weight = torch.randn(d_dict, d_in, generator=torch_generator(0, "bench"))
    out = torch.empty(BATCH, d_dict)
    return lambda x: torch.mm(x, weight.T, out=out)


def _ours(batches: Any, d_dict: int, kind: Any) -> Callable[[Any], object]:
    from interp.dictionaries.start import initial
    from interp.dictionaries.train import Stepper, TrainConfig

    cfg = TrainConfig(
        kind=kind, d_dict=d_dict, k=K, n_steps=1000, batch_size=BATCH, lr=3e-4, warmup_fraction=0, decay_fraction=0
    )
    stepper = Stepper(initial(batches[0], cfg), cfg)
    return lambda x: stepper.step(500, x)


def _sae_lens(d_in: int, d_dict: int) -> Callable[[Any], object]:
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_dict, k=K))
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-4)

    def step(x: Any) -> object:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
        )
        output = sae.training_forward_pass(step_input=given)
        optimiser.zero_grad()
        output.loss.backward()
        return optimiser.step()

    return step


def _sae_lens_inference(d_in: int, d_dict: int) -> Callable[[Any], object]:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    return TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_dict, k=K))


def _coder(d_in: int, d_dict: int) -> Any:
    import torch

    package: Any = importlib.import_module("sparsify")
    if not torch.cuda.is_available():  # it picks its Triton decoder wherever Triton can be imported
        coder: Any = importlib.import_module("sparsify.sparse_coder")
        coder.decoder_impl = importlib.import_module("sparsify.utils").eager_decode
    return package.SparseCoder(d_in, package.SparseCoderConfig(num_latents=d_dict, k=K))


def _sparsify(d_in: int, d_dict: int) -> Callable[[Any], object]:
    import torch

    coder = _coder(d_in, d_dict)
    optimiser = torch.optim.Adam(coder.parameters(), lr=3e-4)

    def step(x: Any) -> object:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        return optimiser.zero_grad()

    return step


def _sparsify_inference(d_in: int, d_dict: int) -> Callable[[Any], object]:
    coder = _coder(d_in, d_dict)

    def run(x: Any) -> object:
        found = coder.encode(x)
        return coder.decode(found[0], found[1])

    return run


def _dictionary_learning(d_in: int, d_dict: int) -> Callable[[Any], object]:
    trainers: Any = importlib.import_module("dictionary_learning.trainers.top_k")
    trainer = trainers.TopKTrainer(
        steps=10_000, activation_dim=d_in, dict_size=d_dict, k=K, layer=0, lm_name="bench", lr=3e-4, device="cpu"
    )
    return lambda x: trainer.update(0, x)
