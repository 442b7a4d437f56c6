"""Resampling: dead latents take directions of badly reconstructed tokens, and can fire again; the rest is untouched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.seed import torch_generator
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activity import observe
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.resample import resample
from interp.dictionaries.start import initial
from interp.dictionaries.train import Stepper
from interp.dictionaries.train_config import Kind, TrainConfig

D, WIDTH, DEAD = 6, 24, slice(0, 5)
CONFIG = TrainConfig(d_dict=WIDTH, k=4, n_steps=20, batch_size=128, dead_after_tokens=1000, resample_every=5)


def drawn(name: str, n: int = 512) -> Tensor:
    """Far from the origin, as activations of a model are."""
    return torch.randn(n, D, generator=torch_generator(0, name)) + torch.arange(1.0, D + 1)


def resampled(
    kind: Kind, y: Tensor | None, *, blocks: tuple[int, ...] = ()
) -> tuple[Stepper, SparseDictionary, Tensor]:
    """A dictionary after a few steps and the replacement of its first five latents, and what it was before."""
    cfg = replace(CONFIG, kind=kind)
    x = drawn("x")
    stepper = Stepper(initial(x, cfg, targets=y, blocks=blocks), cfg)
    for number in range(4):
        stepper.step(number, x[:128], None if y is None else y[:128])
    before = stepper.sae.like()
    stepper.silent[:] = 0
    stepper.silent[DEAD] = 5000
    at = observe(stepper.sae, x, y)
    assert resample(stepper.sae, stepper.optimiser, at, stepper.silent, cfg, 4) == 5
    return stepper, before, x


@pytest.mark.parametrize("kind", ["topk", "relu", "gated", "jump_relu"])
def test_replaced_latents_start_again_and_the_others_stay(kind: Kind):
    stepper, before, x = resampled(kind, None)
    sae = stepper.sae
    assert stepper.silent.tolist() == [0] * WIDTH
    for name, parameter in sae.named_parameters():
        rows, old = (t.t() if name == "W_enc" else t for t in (parameter, dict(before.named_parameters())[name]))
        if rows.shape[0] == WIDTH:
            assert torch.equal(rows[5:], old[5:]), name
            for key in ("exp_avg", "exp_avg_sq"):
                moment = stepper.optimiser.state[parameter][key]
                moment = moment.t() if name == "W_enc" else moment
                assert not moment[DEAD].any(), (name, key)
                assert name != "W_dec" or moment[5:].any()
    rows = sae.W_enc.t()
    assert torch.allclose(sae.W_dec[DEAD].norm(dim=1), torch.ones(5))
    assert torch.allclose(F.normalize(rows[DEAD], dim=1), sae.W_dec[DEAD], atol=1e-6)
    assert torch.allclose(rows[DEAD].norm(dim=1), 0.2 * before.W_enc.t()[5:].norm(dim=1).mean().expand(5), rtol=1e-5)
    u = F.normalize(sae.centred(x), dim=1)  # every direction is that of some centred token
    assert bool(((sae.W_dec[DEAD] @ u.t()).max(1).values > 1 - 1e-5).all())


def test_a_gated_latent_forgets_its_magnitude_and_a_jumping_one_its_threshold():
    """A magnitude bias or a threshold that kept the old latent silent would keep the new one silent."""
    for kind in ("gated", "jump_relu"):
        cfg = replace(CONFIG, kind=kind)
        x = drawn("x")
        stepper = Stepper(initial(x, cfg), cfg)
        stepper.step(0, x[:128])
        activation = stepper.sae.activation
        with torch.no_grad():
            if isinstance(activation, Gated):
                activation.b_mag[DEAD], activation.r_mag[DEAD] = -1e3, 3.0
            if isinstance(activation, JumpReLU):
                activation.log_threshold[DEAD] = 9.0
        stepper.silent[DEAD] = 5000
        at = observe(stepper.sae, x)
        assert at.f is not None and not at.f[:, DEAD].any()
        resample(stepper.sae, stepper.optimiser, at, stepper.silent, cfg, 1)
        after = observe(stepper.sae, x)
        assert after.f is not None
        assert bool((after.f[:, DEAD] > 0).any(0).all()), kind


def test_a_transcoder_of_equal_widths_does_not_write_directions_of_its_input():
    y = drawn("y") @ torch.linalg.qr(torch.randn(D, D, generator=torch_generator(0, "turn")))[0]
    stepper, before, x = resampled("topk", y)
    error = F.normalize(observe(before, x, y).error.detach(), dim=1)
    cosines = (stepper.sae.W_dec[DEAD] @ error.t()).max(1)
    assert bool((cosines.values > 1 - 1e-5).all())
    u = before.centred(x)  # of the same tokens
    wanted = F.normalize((u - u.mean(0))[cosines.indices], dim=1)
    assert torch.allclose(F.normalize(stepper.sae.W_enc.t()[DEAD], dim=1), wanted, atol=1e-5)


@pytest.mark.parametrize("blocks", [(), (4, 2)])
def test_where_inputs_are_not_centred_the_bias_keeps_new_latents_from_firing_at_every_token(blocks: tuple[int, ...]):
    stepper, _, x = resampled("topk", None if blocks else drawn("y"), blocks=blocks)
    sae = stepper.sae
    z = sae.centred(x) @ sae.W_enc + sae.b_enc
    share = (z[:, DEAD] > 0).double().mean(0)
    assert bool(((share > 0.2) & (share < 0.8)).all()), share
