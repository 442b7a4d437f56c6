"""The `transcoder` method: a planted sparse map, baselines against oracles, numbers measured by hand, bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from interp.analyses.transcoder import SPEC, TranscoderConfig, load, run, transcoder_of
from interp.analyses.transcoder_contest import LINEAR, RANDOM, SAE, SKIP, TRANSCODER, ZERO
from interp.core.errors import InterpError
from interp.core.result import Result
from interp.core.run import Run, load_run, save_run
from interp.dictionaries.base import Dictionary
from interp.dictionaries.baselines import IdentityDictionary
from interp.dictionaries.bridge import Bridge, bridge
from interp.dictionaries.codes import SparseCodes
from interp.dictionaries.metrics import evaluate, mean_max_cosine
from interp.dictionaries.train import train_transcoder
from interp.dictionaries.train_config import TrainConfig
from interp.dictionaries.transcoder_baselines import linear_map, random_features
from interp.instrument.capture import capture
from interp.instrument.edits import edited, set_to
from interp.instrument.tokens import from_ids
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

D = 32


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def result(model: LoadedModel) -> Result:
    return run(model, *SPEC.example(model))


def planted(skip: bool):
    """Endless (x, y): y is a sparse map of x, plus a linear one if `skip`; and the truth."""
    generator = torch.Generator().manual_seed(0)
    n, d_in, d_out, active = 40, 24, 20, 3
    read = F.normalize(torch.randn(n, d_in, generator=generator), dim=1)
    write = F.normalize(torch.randn(n, d_out, generator=generator), dim=1)
    straight = torch.randn(d_in, d_out, generator=generator) * (0.3 if skip else 0.0)

    def batches():
        while True:
            on = torch.rand(512, n, generator=generator).topk(active, dim=1).indices
            f = torch.zeros(512, n).scatter_(1, on, torch.rand(512, active, generator=generator) + 0.5)
            x = f @ read
            yield x, 5 * (f @ write) + x @ straight

    return write, batches()


@pytest.mark.parametrize("skip", [False, True])
def test_a_planted_sparse_map_between_two_spaces_is_found(skip):
    write, batches = planted(skip)
    cfg = TrainConfig(d_dict=56, k=3, n_steps=400, batch_size=512, lr=1e-2, dead_after_tokens=20_000, skip=skip)
    trained = train_transcoder(batches, next(batches), cfg).sae
    held_out = list(itertools.islice(batches, 3))
    found = evaluate(trained, held_out)
    x, y = next(batches)
    linear = evaluate(linear_map(x, y), held_out)
    random = evaluate(random_features(x, y, 56, 3, seed=0), held_out)
    assert found.fvu < 0.2 < min(linear.fvu, random.fvu), (found.fvu, linear.fvu, random.fvu)
    assert found.l0 <= 3
    if not skip:  # with a linear path the decoder is free to leave a linear part to it
        assert mean_max_cosine(write, trained.features) > 0.93


def test_the_linear_map_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 7, generator=generator).double() + 3, torch.randn(300, 5, generator=generator).double() - 2
    found = linear_map(x, y, ridge=1e-12)
    design = torch.cat([x, torch.ones(300, 1)], dim=1).double()
    expected = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(torch.cat([found.W, found.b[None]]), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.decode(found.encode(x)), design @ expected)
    assert isinstance(found, Dictionary) and found.encode(x).k == 0
    with pytest.raises(InterpError, match="hold no offset"):
        found.decode(SparseCodes(torch.zeros(1, 0), torch.zeros(1, 0).long(), 0))


def test_random_features_have_the_best_readout_that_there_is():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5000, 6, generator=generator).double(), torch.randn(5000, 4, generator=generator).double()
    found = random_features(x, y, 20, 3, seed=0, ridge=1e-12)
    design = torch.cat([found.encode(x).dense(), torch.ones(5000, 1)], dim=1).double()
    expected = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(found(x), design @ expected, rtol=1e-5, atol=1e-7)
    assert float(found.encode(x).l0().double().mean()) > 2.5


def test_the_headline_is_measured_again_by_hand(result, model):
    """FVU from captured activations; KL with the transcoder's output written into the model as a constant."""
    data, cfg = SPEC.example(model)
    with capture(model, ["mlp_in.1", "mlp_out.1"]) as acts:
        model(data.test)
    x, y = acts["mlp_in.1"], acts["mlp_out.1"]
    keep = torch.ones(x.shape[:2], dtype=torch.bool)
    keep[:, 0] = False
    p = model(data.test)[:, :-1].log_softmax(-1)
    for skip, label in ((False, "transcoder"), (True, "skip")):
        transcoder = transcoder_of(result, skip=skip)
        found = evaluate(transcoder, [(x[keep], y[keep])])
        assert result.headline[f"fvu_{label}"] == pytest.approx(found.fvu, rel=1e-5)
        with edited(model, set_to("mlp_out.1", transcoder(x), at=keep)):
            q = model(data.test)[:, :-1].log_softmax(-1)
        assert result.headline[f"kl_{label}"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert result.headline["l0"] == pytest.approx(evaluate(transcoder_of(result), [(x[keep], y[keep])]).l0)
    with edited(model, set_to("mlp_out.1", 0.0, at=keep)):
        q = model(data.test)[:, :-1].log_softmax(-1)
    assert result.headline["kl_zero"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_the_table_has_every_contestant_and_intervals_hold_their_estimates(result):
    table = result.tables["evaluation"].set_index("dictionary")
    assert {TRANSCODER, SKIP, SAE, LINEAR, RANDOM, ZERO} < set(table.index)
    assert table.loc[ZERO, "loss_recovered"] == 0 and table.loc[ZERO, "kl_recovered"] == 0
    for metric in ("fvu", "kl", "kl_recovered"):
        assert (table[f"{metric}_low"] <= table[metric]).all() and (table[metric] <= table[f"{metric}_high"]).all()
    recovered = 1 - table["kl"] / table.loc[ZERO, "kl"]
    assert table["kl_recovered"].to_numpy() == pytest.approx(recovered.to_numpy())
    assert table.loc[[LINEAR, ZERO], "l0"].tolist() == [0, 0] and table.loc[RANDOM, "l0"] <= 4
    assert set(result.tables["training"]["series"]) == {TRANSCODER, SKIP, SAE}


def test_controls_say_what_the_numbers_say(result):
    assert len(result.controls) == 7
    for control in result.controls:
        assert control.passed == (control.p_value < 0.05)
        assert control.observed < control.control or not control.passed
    by_name = {(control.name, control.statistic.split(" (")[0]): control for control in result.controls}
    against = by_name[f"{TRANSCODER} against {RANDOM}", "FVU on held-out text"]
    assert against.observed == pytest.approx(result.headline["fvu_transcoder"])
    assert against.control == pytest.approx(result.headline["fvu_random"])
    against = by_name[f"{SKIP} against {SAE}", "KL of the model's predictions, nats"]
    assert against.observed == pytest.approx(result.headline["kl_skip"])
    assert against.control == pytest.approx(result.headline["kl_sae"])


def test_an_untrained_transcoder_does_not_pass_against_random_features(model):
    """With enough tokens for their readout; on a few hundred the fitted readout learns them by heart."""
    data, cfg = SPEC.example(model)
    more = torch.randint(0, 256, (150, 24), generator=torch.Generator().manual_seed(5))
    untrained = run(model, replace(data, train=from_ids(model, more)), replace(cfg, n_steps=1, lr=1e-9))
    assert not any(control.passed for control in untrained.controls if RANDOM in control.name)


def test_it_survives_the_disk(result, model, tmp_path):
    loaded = load_run(save_run(tmp_path / "run", Run(results=(result,), facts={}))).results[0]
    x = torch.randn(7, D)
    for skip in (False, True):
        assert torch.equal(transcoder_of(loaded, skip=skip)(x), transcoder_of(result, skip=skip)(x))
    assert not torch.allclose(transcoder_of(result)(x), transcoder_of(result, skip=True)(x), atol=1e-3)
    with pytest.raises(InterpError, match="holds no transcoder"):
        transcoder_of(replace(result, manifest=replace(result.manifest, method="sae")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 64}, "k=64 must lie in 1..d_dict=48; lower k or widen the dictionary"),
        ({"layer": 9}, "mlp_in"),
        ({"drop_norm": 1e-9}, "raise n_sequences or drop_norm"),
        ({"n_steps": 0}, "at least 1"),
    ],
)
def test_bad_configs_are_named(model, changes, message):
    data, cfg = SPEC.example(model)
    with pytest.raises(InterpError, match=message):
        run(model, data, replace(cfg, **changes))


def test_bad_text_is_named(model):
    data, cfg = SPEC.example(model)
    with pytest.raises(InterpError, match="the held-out text is the training text"):
        run(model, replace(data, test=data.train), cfg)
    with pytest.raises(InterpError, match="give no interval"):
        run(model, replace(data, test=data.test.rows([0])), cfg)
    few = run(model, replace(data, test=data.test.rows(range(7))), cfg)
    assert any("7 held-out sequences are too few" in note for note in few.notes)
    assert not any(control.passed for control in few.controls)


def test_load_gives_disjoint_text(model):
    cfg = TranscoderConfig(corpus="docs:assignment", n_sequences=5, n_eval=3, length=16)
    data = load(model, cfg)
    assert torch.equal(torch.cat([data.train.ids, data.test.ids]), load(model, replace(cfg, n_sequences=8)).train.ids)


def test_a_bridge_reads_what_is_there_and_writes_only_what_is_kept(model):
    """The identity from the output to itself changes no bit; a constant appears exactly at the kept tokens."""
    ids = torch.arange(24).reshape(2, 12) + 40
    keep = torch.zeros(2, 12, dtype=torch.bool)
    keep[0, 3:5] = keep[1, 7] = True
    read, write = model.table.one("mlp_in.1"), model.table.one("mlp_out.1")
    with edited(model, bridge(write, write, IdentityDictionary(D)).edits(keep)):
        assert torch.equal(model(ids), model(ids))
    seen = []

    def function(number, xs):
        seen.append((number, xs[-1].clone()))
        return torch.full_like(xs[-1], 7.0)

    with capture(model, [read, write]) as own:
        model(ids)
    placed = Bridge(reads=(read,), writes=(write,), write=function)
    with edited(model, placed.edits(keep)), capture(model, [read, write]) as acts:
        model(ids)
    assert seen[0][0] == 0 and torch.equal(seen[0][1], own[read])
    assert torch.equal(acts[write], torch.where(keep[..., None], torch.tensor(7.0), own[write]))


def test_a_bridge_that_cannot_stand_is_named(model):
    keep = torch.ones(1, 4, dtype=torch.bool)
    ids = torch.arange(4)[None] + 40
    early, late = model.table.one("mlp_in.0"), model.table.one("mlp_out.2")
    write = model.table.one("mlp_out.0")
    backwards = Bridge(reads=(model.table.one("mlp_in.2"),), writes=(write,), write=lambda _, xs: xs[-1])
    with pytest.raises(InterpError, match="not computed right after"), edited(model, backwards.edits(keep)):
        model(ids)
    crossed = Bridge(reads=(late, early), writes=(late, write), write=lambda _, xs: xs[-1])
    with pytest.raises(InterpError, match="in the order of the forward"), edited(model, crossed.edits(keep)):
        model(ids)
    with pytest.raises(InterpError, match="give as many of each"):
        Bridge(reads=(), writes=(), write=lambda _, xs: xs[-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.needs_model("smollm2-135m")
def test_on_a_real_model_a_transcoder_recovers_at_least_as_much_as_an_autoencoder(tmp_path):
    """With a linear path; the plain one beats random features and, with the card, the linear map's FVU of about .29."""
    from interp.models.load import load as load_model

    model = load_model("smollm2-135m")
    cfg = TranscoderConfig(n_sequences=320, n_eval=16, n_steps=400)
    found = run(model, replace(load(model, cfg), store=tmp_path), cfg).headline
    assert found["loss_recovered_skip"] >= found["loss_recovered_sae"] - 0.02
    assert found["kl_skip"] < 1.05 * found["kl_sae"]
    assert found["kl_transcoder"] < 0.8 * found["kl_random"] and found["kl_skip"] < found["kl_linear"]
    assert found["fvu_transcoder"] < found["fvu_linear"] < 0.35
