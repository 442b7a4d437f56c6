"""Cross-layer transcoders: the formula, one layer as a plain transcoder, planted features, in place in a model."""

from __future__ import annotations

import itertools

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.base import Dictionary
from interp.dictionaries.codes import SparseCodes
from interp.dictionaries.cross_layer import CrossLayerTranscoder, bridge_layers
from interp.dictionaries.cross_layer_train import CrossLayerStepper, initial_layers, observe_layers, train_layers
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.metrics import evaluate, mean_max_cosine
from interp.dictionaries.train import Diverged, Stepper
from interp.dictionaries.train_config import TrainConfig
from interp.instrument.capture import capture
from interp.instrument.edits import edited
from interp.models.tiny import tiny_model

L, D_IN, D_OUT, M = 3, 6, 5, 16


def filled(seed: int = 0, *, n_layers: int = L, k: int = 4, dtype: torch.dtype = torch.float64) -> CrossLayerTranscoder:
    """Random weights and scales everywhere, so that nothing is right by accident."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number in range(n_layers):
        d_out = (n_layers - number) * D_OUT
        part = SparseDictionary(D_IN, M, TopK(k), d_out=d_out, subtract_b_dec=False, dtype=dtype)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
        part.scale_in = torch.rand((), generator=generator, dtype=dtype) + 0.5
        part.scale_out = torch.rand(d_out, generator=generator, dtype=dtype) + 0.5
        parts.append(part)
    return CrossLayerTranscoder(parts)


def data(n: int = 20, *, n_layers: int = L, seed: int = 1, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_layers * D_IN, generator=generator, dtype=dtype)
    return x, torch.randn(n, n_layers * D_OUT, generator=generator, dtype=dtype)


def dense(clt: CrossLayerTranscoder, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and training-unit outputs of each layer by the formula, dense and looped."""
    codes, outputs = [], [torch.zeros(len(x), D_OUT, dtype=x.dtype) for _ in range(clt.n_layers)]
    for source, part in enumerate(clt.parts):
        z = x[:, source * D_IN : (source + 1) * D_IN] * part.scale_in @ part.W_enc + part.b_enc
        top = z.topk(part.activation.k, dim=-1)
        f = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
        codes.append(f)
        for target in range(source, clt.n_layers):
            block = slice((target - source) * D_OUT, (target - source + 1) * D_OUT)
            outputs[target] = outputs[target] + f @ part.W_dec[:, block] + part.b_dec[block]
    return codes, outputs


def test_it_is_the_formula():
    clt, (x, _) = filled(), data()
    codes, _ = dense(clt, x)
    torch.testing.assert_close(clt.encode(x).dense(), torch.cat(codes, dim=1))
    expected = torch.zeros(len(x), L * D_OUT, dtype=torch.float64)
    for source, part in enumerate(clt.parts):
        expected[:, source * D_OUT :] += (codes[source] @ part.W_dec + part.b_dec) / part.scale_out
    torch.testing.assert_close(clt(x), expected)
    torch.testing.assert_close(clt.folded()(x), expected)
    assert isinstance(clt, Dictionary)
    assert (clt.d_in, clt.d_out, clt.d_dict) == (L * D_IN, L * D_OUT, L * M)


def test_features_are_what_a_latent_adds_and_nothing_before_its_layer():
    clt = filled()
    for latent in (0, M, 2 * M + 3):
        codes = SparseCodes(torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[latent]]), L * M)
        none = SparseCodes(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[latent]]), L * M)
        moved = (clt.decode(codes) - clt.decode(none))[0]
        torch.testing.assert_close(moved, 2 * clt.features[latent])
        assert not clt.features[latent, : latent // M * D_OUT].any()
    norms = clt.decoder_norms()
    assert norms.shape == (L, M, L) and not norms[2, :, :2].any() and bool((norms[1, :, 1:] > 0).all())
    torch.testing.assert_close(norms[0].square().sum(1), clt.features[:M].square().sum(1))


def test_codes_in_any_order_decode_alike():
    clt, (x, _) = filled(), data()
    codes = clt.encode(x)
    order = torch.argsort(torch.rand(codes.values.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    mixed = SparseCodes(codes.values.gather(1, order), codes.indices.gather(1, order), codes.d_dict)
    torch.testing.assert_close(clt.decode(mixed), clt.decode(codes))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0)])
def test_any_leading_axes(shape):
    clt = filled()
    x = torch.randn(*shape, L * D_IN, dtype=torch.float64)
    codes = clt.encode(x)
    assert codes.values.shape == (*shape, L * 4) and clt(x).shape == (*shape, L * D_OUT)


def test_the_loss_and_its_gradient_are_the_formula_with_concatenated_norms():
    """JumpReLU with the tanh penalty, against plain dense autograd."""
    cfg = TrainConfig(
        kind="jump_relu", penalty="tanh", d_dict=M, k=2, sparsity_weight=0.3, threshold=0.05, decoder_norm="free",
        sparsity_warmup_fraction=0.0,
    )  # fmt: skip
    x, y = data(40, dtype=torch.float32)
    clt = initial_layers(x, y, L, cfg)
    twin = [part.like() for part in clt.parts]
    steps = CrossLayerStepper(clt, cfg)
    loss = steps.loss(observe_layers(clt, x, y), 0)["loss"]
    loss.backward()
    outputs, penalty = torch.zeros(40, L * D_OUT), torch.zeros(())
    for source, part in enumerate(twin):
        z = x[:, source * D_IN : (source + 1) * D_IN] * part.scale_in @ part.W_enc + part.b_enc
        f = z * (z > part.activation.threshold)
        outputs = outputs + torch.nn.functional.pad(f @ part.W_dec + part.b_dec, (source * D_OUT, 0))
        penalty = penalty + (4 * f * part.W_dec.square().sum(1).sqrt()).tanh().sum() / 40
    expected = (y * twin[0].scale_out - outputs).square().sum() / 40 + 0.3 * penalty
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for part, own in zip(clt.parts, twin, strict=True):
        for name in ("W_enc", "b_enc", "W_dec"):
            torch.testing.assert_close(getattr(part, name).grad, getattr(own, name).grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clt.parts[0].b_dec.grad, twin[0].b_dec.grad)
    assert all(part.b_dec.grad is None for part in clt.parts[1:])


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "jump_relu"])
def test_one_layer_is_a_transcoder_step_for_step(kind):
    cfg = TrainConfig(kind=kind, d_dict=M, k=3, n_steps=12, batch_size=32, lr=1e-2, dead_after_tokens=64)
    x, y = data(32 * 12, n_layers=1, dtype=torch.float32)
    layers = CrossLayerStepper(initial_layers(x, y, 1, cfg), cfg)
    alone = Stepper(layers.clt.parts[0].like(), cfg)
    for number, (a, b) in enumerate(zip(x.split(32), y.split(32), strict=True)):
        assert layers.step(number, a, b) == alone.step(number, a, b)
    for name, value in alone.sae.state_dict().items():
        assert torch.equal(value, layers.clt.parts[0].state_dict()[name]), name
    assert torch.equal(layers.clt(x), alone.sae(x))


def test_every_layer_starts_at_the_same_size_and_no_layer_twice():
    x, y = data(200, dtype=torch.float32)
    y[:, :D_OUT] *= 100
    clt = initial_layers(x, y, L, TrainConfig(d_dict=M, k=3))
    scaled = (y * clt.parts[0].scale_out).unflatten(1, (L, D_OUT)).norm(dim=-1).mean(0)
    torch.testing.assert_close(scaled, torch.full((L,), D_OUT**0.5))
    assert not torch.equal(clt.parts[0].W_enc, clt.parts[1].W_enc)
    assert bool(clt.parts[0].b_dec.any()) and not any(bool(part.b_dec.any()) for part in clt.parts[1:])
    error = observe_layers(clt, x, y)[0]
    assert error.error.square().sum() < (error.target - clt.parts[0].b_dec).square().sum()  # better than no latent


def test_planted_features_are_found_and_layers_below_explain_layers_above():
    """Features of layer 1 write to both layers and cannot be seen in the input of layer 2."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    n, d, active = 20, 16, 2
    read, write = [unit(n, d), unit(n, d)], [unit(n, 2 * d), unit(n, d)]

    def batches():
        while True:
            xs, y = [], torch.zeros(256, 2 * d)
            for layer in range(2):
                on = torch.rand(256, n, generator=generator).topk(active, dim=1).indices
                f = torch.zeros(256, n).scatter_(1, on, torch.rand(256, active, generator=generator) + 0.5)
                xs.append(f @ read[layer])
                y[:, layer * d :] += f @ write[layer]
            yield torch.cat(xs, dim=1), y

    stream = batches()
    cfg = TrainConfig(d_dict=32, k=active, n_steps=400, batch_size=256, lr=1e-2, dead_after_tokens=5_000)
    trained = train_layers(stream, next(stream), 2, cfg).clt
    x, y = next(stream)
    found = evaluate(trained, [(x, y)])
    cosines = [mean_max_cosine(truth, part.features) for truth, part in zip(write, trained.parts, strict=True)]
    assert min(cosines) > 0.93, cosines
    assert found.fvu < 0.1 and found.l0 <= 2 * active
    with torch.no_grad():  # without the first layer's features the second layer is badly explained
        second = trained.parts[1](x[:, d:])
        spread = (y[:, d:] - y[:, d:].mean(0)).square().sum()
        assert (y[:, d:] - second).square().sum() / spread > 0.3


def test_in_place_every_layer_reads_the_stream_that_the_earlier_ones_have_changed():
    model = tiny_model("llama")
    reads, writes = model.resolve("mlp_in.*"), model.resolve("mlp_out.*")
    x, y = torch.randn(300, 3 * 32), torch.randn(300, 3 * 32)
    clt = initial_layers(x, y, 3, TrainConfig(d_dict=24, k=4)).requires_grad_(False)
    ids = torch.arange(24).reshape(2, 12) + 40
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[:, 0] = False
    with capture(model, reads) as untouched:
        model(ids)
    with edited(model, bridge_layers(clt, reads, writes).edits(keep)), capture(model, [*reads, *writes]) as acts:
        model(ids)
    stacked = clt(torch.cat([acts[site] for site in reads], dim=-1))
    for number, site in enumerate(writes):
        expected = stacked[..., number * 32 : (number + 1) * 32]
        torch.testing.assert_close(acts[site][:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(acts[reads[0]], untouched[reads[0]])
    assert not torch.allclose(acts[reads[1]][:, 1:], untouched[reads[1]][:, 1:], atol=1e-2)


def test_two_forwards_in_one_block_do_not_add_up():
    model = tiny_model("llama")
    reads, writes = model.resolve("mlp_in.*"), model.resolve("mlp_out.*")
    clt = initial_layers(torch.randn(300, 96), torch.randn(300, 96), 3, TrainConfig(d_dict=24, k=4))
    ids = torch.arange(12)[None] + 40
    keep = torch.ones(1, 12, dtype=torch.bool)
    with edited(model, bridge_layers(clt.requires_grad_(False), reads, writes).edits(keep)):
        assert torch.equal(model(ids), model(ids))


def test_bad_input_is_named():
    x, y = data(dtype=torch.float32)
    with pytest.raises(InterpError, match="do not split into 4 layers"):
        initial_layers(x, y, 4, TrainConfig(d_dict=M, k=3))
    with pytest.raises(InterpError, match="unknown kind of cross-layer transcoder 'gated'"):
        initial_layers(x, y, L, TrainConfig(kind="gated", d_dict=M, k=3))
    with pytest.raises(InterpError, match="no skip path"):
        initial_layers(x, y, L, TrainConfig(d_dict=M, k=3, skip=True))
    with pytest.raises(InterpError, match="layer 0 of 2 has d_in"):
        CrossLayerTranscoder(filled().parts[:2])
    with pytest.raises(InterpError, match="at least one layer"):
        CrossLayerTranscoder([])
    with pytest.raises(InterpError, match="width 5 do not fit"):
        filled().encode(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(InterpError, match="d_dict=48"):
        filled().decode(SparseCodes(torch.zeros(1, 1), torch.zeros(1, 1).long(), 7))
    with pytest.raises(InterpError, match="1 sites for a cross-layer transcoder of 3 layers"):
        bridge_layers(filled(), tiny_model("llama").resolve("mlp_in.0"), tiny_model("llama").resolve("mlp_out.0"))
    steps = CrossLayerStepper(initial_layers(x, y, L, TrainConfig(d_dict=M, k=3)), TrainConfig(d_dict=M, k=3))
    before = [part.W_dec.clone() for part in steps.clt.parts]
    with pytest.raises(Diverged, match="at step 0"):
        steps.step(0, x * float("nan"), y)
    assert all(torch.equal(a, part.W_dec) for a, part in zip(before, steps.clt.parts, strict=True))


def test_steps_repeat_bit_for_bit():
    def run() -> torch.Tensor:
        x, y = data(64, dtype=torch.float32)
        cfg = TrainConfig(d_dict=M, k=3, n_steps=5, lr=1e-2)
        return train_layers(itertools.repeat((x, y)), (x, y), L, cfg).clt(x)

    assert torch.equal(run(), run())
