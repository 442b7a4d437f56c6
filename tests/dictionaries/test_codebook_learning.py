"""How codes learn: gradients in closed form, the library as oracle, collapse and remedies, training in the model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from interp.core.errors import InterpError
from interp.core.hash import hash_tensors
from interp.dictionaries.codebook_config import CodebookConfig, shape_at
from interp.dictionaries.codebook_quantise import Quantiser, pull
from interp.dictionaries.codebook_train import gradients, learning_edit, task_loss, train_in_model, train_on_activations
from interp.dictionaries.splice import splice
from interp.instrument.capture import capture
from interp.instrument.edits import edited
from interp.instrument.tokens import from_ids
from interp.models.tiny import tiny_model

pytestmark = pytest.mark.needs_package("vector_quantize_pytorch")
SMALL = CodebookConfig(n_codes=6, k=2, similarity="euclidean")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def quantiser(cfg: CodebookConfig = SMALL, *, groups: int = 2, d: int = 8, **changes) -> Quantiser:
    return Quantiser(normal(40, d), replace(cfg, **changes), groups=groups)


def test_straight_through_gives_the_input_the_output_gradient_and_each_code_its_share():
    q = quantiser()
    x, weight = normal(10, 8, seed=1).requires_grad_(), normal(10, 8, seed=2)
    found = q(x)
    torch.testing.assert_close(found.output, q.frozen()(x.detach()))
    (found.output * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)
    expected = torch.zeros_like(q.table())
    for row in range(10):
        for group in range(2):
            for code in found.indices[row, group].tolist():
                expected[group, code] += weight[row].reshape(2, 4)[group] / (2 * q.scale)
    torch.testing.assert_close(q.inner._codebook.embed.grad, expected)


def test_the_rotation_trick_keeps_the_angle_and_scales_by_the_ratio_of_norms():
    q = quantiser(rotation=True)
    x, weight = normal(10, 8, seed=1).requires_grad_(), normal(10, 8, seed=2)
    found = q(x)
    torch.testing.assert_close(found.output, q.frozen()(x.detach()), rtol=1e-12, atol=1e-12)
    (found.output * weight).sum().backward()
    a, g_in, g_out = q.normalised(x.detach()), x.grad.reshape(10, 2, 4), weight.reshape(10, 2, 4)
    code = ((found.output.detach() - q.mean) * q.scale).reshape(10, 2, 4)
    cos = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cos(g_in, a, dim=-1), cos(g_out, code, dim=-1))
    torch.testing.assert_close(g_in.norm(dim=-1), g_out.norm(dim=-1) * code.norm(dim=-1) / a.norm(dim=-1))
    assert not torch.allclose(g_in, g_out, rtol=0.1)


def test_autoencoder_loss_moves_codes_and_commitment_moves_inputs():
    q = quantiser()
    x = normal(10, 8, seed=1).requires_grad_()
    found = q(x)
    a_hat = q.normalised(q.frozen()(x.detach()))
    error = (q.normalised(x.detach()) - a_hat).square().mean()
    assert float(found.autoencoder) == pytest.approx(float(error) / 2)
    assert float(found.commitment) == pytest.approx(float(error))
    codes = q.inner._codebook.embed
    assert torch.autograd.grad(found.autoencoder, x, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(found.autoencoder, codes, retain_graph=True)[0].any()
    assert torch.autograd.grad(found.commitment, codes, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(found.commitment, x)[0].any()
    variance = (found.a - found.a.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(error * found.a.numel() / variance))


def test_moving_averages_are_those_of_the_library():
    """At k = 1 and as many tokens as codes, its counts have mean 1 as ours do."""
    q = quantiser(k=1, update="ema", n_codes=40, dead_share=0.0).train()
    theirs = copy.deepcopy(q.inner).train()
    x = normal(40, 8, seed=1)
    for _ in range(3):
        found = q(x)
        theirs.update_indices(found.a.flatten(1)[None], found.indices[None, :, :, 0])
        q.observe(found)
    torch.testing.assert_close(q.table(), theirs.codebook)
    torch.testing.assert_close(q.inner._codebook.cluster_size, theirs._codebook.cluster_size)


def test_moving_averages_converge_to_the_means_of_what_chose_each_code():
    q = quantiser(k=1, update="ema", decay=0.5, dead_share=0.0).train()
    x = normal(200, 8, seed=1)
    for _ in range(60):
        found = q(x)
        q.observe(found)
    found = q(x)
    for group in range(2):
        for code in found.indices[:, group, 0].unique().tolist():
            mean = found.a[found.indices[:, group, 0] == code, group].mean(0)
            torch.testing.assert_close(q.table()[group, code], mean, rtol=1e-3, atol=1e-3)


def test_simvq_is_that_of_the_library_and_one_step_moves_every_code():
    q = quantiser(k=1, update="simvq", similarity="euclidean", groups=1)
    x = normal(12, 8, seed=1)
    found = q(x)
    theirs, indices, _ = q.inner[0](q.normalised(x).transpose(0, 1))
    assert torch.equal(found.indices[:, 0, 0], indices[0])
    torch.testing.assert_close(((found.output - q.mean) * q.scale), theirs[0])
    before = q.table().detach().clone()
    found.autoencoder.backward()
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.sub_(parameter.grad if parameter.grad is not None else 0)
    unused = torch.ones(6, dtype=torch.bool)
    unused[found.indices.flatten()] = False
    assert bool(unused.any())
    assert bool((q.table()[0] != before[0]).any(1)[unused].all())


def test_affine_codes_are_those_of_the_library():
    cfg = replace(SMALL, k=1, affine=True, dead_share=0.0)
    q = Quantiser(normal(40, 8, dtype=torch.float32), cfg, groups=2).train()
    theirs = copy.deepcopy(q.inner).train()
    x = normal(30, 8, seed=1, dtype=torch.float32) * 3 + 2
    found = q(x)
    quantised, indices, _ = theirs(found.a.flatten(1)[None])
    assert torch.equal(found.indices[..., 0], indices[0])
    torch.testing.assert_close(found.output, quantised[0] / q.scale + q.mean)
    shift = q.inner._codebook.batch_mean.clone()
    q.eval()(x + 100)
    assert torch.equal(q.inner._codebook.batch_mean, shift), "evaluation moved the statistics"


def test_idle_codes_are_drawn_anew_from_the_inputs_and_others_are_not():
    far = torch.full((2, 6, 4), 50.0, dtype=torch.float64)
    far[:, 0] = 0
    q = Quantiser(normal(40, 8), replace(SMALL, k=1, decay=0.5, dead_share=0.3), groups=2, codes=far).train()
    x = normal(40, 8, seed=1)
    for _ in range(2):
        found = q(x)
        assert bool((found.indices == 0).all())
        q.observe(found)
    codes, a = q.table().detach(), found.a
    assert not bool(codes[:, 0].any())
    for group in range(2):
        assert bool((codes[group, 1:, None] == a[None, :, group]).all(-1).any(1).all())
        assert len(codes[group].unique(dim=0)) == 6


def test_online_clustering_moves_idle_codes_nearly_all_the_way():
    assert float(pull(torch.zeros(1), 512)[0]) == pytest.approx(0.9990005)
    assert float(pull(torch.tensor([1 / 512]), 512)[0]) < 1e-300
    far = torch.full((2, 6, 4), 50.0, dtype=torch.float64)
    far[:, 0] = 0
    q = Quantiser(normal(40, 8), replace(SMALL, k=1, update="cvq"), groups=2, codes=far).train()
    q.observe(q(normal(40, 8, seed=1)))
    codes = q.table().detach()
    assert bool((codes[:, 1:].abs().amax(-1) < 5).all())
    assert float(codes[:, 0].abs().max()) < 1e-3
    assert len(q(normal(40, 8, seed=1)).indices.unique()) > 3


def mixture(n: int, *, seed: int, d: int = 32) -> torch.Tensor:
    """512 well separated Gaussians."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(512, d, generator=torch.Generator().manual_seed(99))
    return centres[torch.randint(512, (n,), generator=g)] + 0.05 * torch.randn(n, d, generator=g)


def codes_in_use(n_steps: int = 400, **options) -> float:
    """Share of 512 codes used on fresh inputs, after a start with all codes in one corner."""
    cfg = CodebookConfig(n_codes=512, k=1, lr=0.01, n_steps=n_steps, similarity="euclidean", **options)
    corner = torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(1)) * 0.05 + 3
    q = Quantiser(mixture(4096, seed=1), cfg, codes=corner).train()
    learns = [parameter for parameter in q.parameters() if parameter.requires_grad]
    adam = torch.optim.Adam(learns, lr=cfg.lr) if learns else None
    for step in range(n_steps):
        found = q(mixture(1024, seed=10 + step))
        if adam is not None:
            adam.param_groups[0]["lr"] = cfg.lr * shape_at(step, cfg)
            adam.zero_grad()
            found.autoencoder.backward()
            adam.step()
        q.observe(found)
    return len(q.eval()(mixture(8192, seed=5)).indices.unique()) / 512


@pytest.mark.slow
def test_collapse_and_its_remedies():
    """The thresholds are ours. simvq has no network below to move, and spreads less."""
    assert codes_in_use(dead_share=0.0) < 0.02
    assert codes_in_use() > 0.9
    assert codes_in_use(update="ema") > 0.9
    assert codes_in_use(update="cvq") > 0.9
    assert codes_in_use(affine=True) > 0.9
    assert codes_in_use(affine=True, dead_share=0.0) > 0.3
    assert codes_in_use(update="simvq") > 0.3


def endless(x: torch.Tensor, n: int):
    g = torch.Generator().manual_seed(0)
    while True:
        yield x[torch.randint(len(x), (n,), generator=g)]


@pytest.mark.parametrize("update", ["ema", "gradient", "cvq"])
def test_clusters_are_found(update):
    centres = 4 * normal(16, 8, seed=3, dtype=torch.float32)
    x = centres.repeat(40, 1) + 0.05 * normal(640, 8, seed=4, dtype=torch.float32)
    cfg = CodebookConfig(n_codes=48, k=1, n_steps=150, update=update, similarity="euclidean", start="kmeans")
    trained = train_on_activations(endless(x, 256), x, cfg)
    book = trained.codebooks["codes"]
    assert float(torch.cdist(centres, book.features + book.mean).min(1).values.max()) < 0.1
    assert trained.curve["fvu"].iloc[-1] < 1e-3
    assert trained.curve["tokens"].iloc[-1] == 150 * 256


def test_several_codes_reconstruct_better_than_one_and_better_than_at_the_start():
    x = normal(2000, 12, seed=1, dtype=torch.float32) @ normal(12, 12, seed=2, dtype=torch.float32)

    def fvu(k: int, n_steps: int) -> float:
        cfg = CodebookConfig(n_codes=32, k=k, n_steps=n_steps)
        book = train_on_activations(endless(x, 256), x, cfg).codebooks["codes"]
        return float((x - book(x)).square().sum() / (x - x.mean(0)).square().sum())

    assert fvu(4, 200) < 0.7 * fvu(4, 1)
    assert fvu(4, 200) < fvu(1, 200)


@pytest.mark.parametrize("update", ["gradient", "ema", "simvq", "cvq"])
@pytest.mark.parametrize("start", ["sample", "kmeans"])
def test_equal_seeds_give_equal_codes_and_global_generators_stay(update, start):
    x = normal(100, 8, dtype=torch.float32)
    cfg = CodebookConfig(n_codes=12, k=2, n_steps=12, update=update, start=start, dead_share=0.3, decay=0.5)
    before = torch.get_rng_state()
    first, second = (train_on_activations(endless(x, 32), x, cfg, groups=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    third = train_on_activations(endless(x, 32), x, cfg, groups=2)
    other = train_on_activations(endless(x, 32), x, replace(cfg, seed=1), groups=2)
    assert torch.equal(first.codebooks["codes"].codes, second.codebooks["codes"].codes)
    assert torch.equal(first.codebooks["codes"].codes, third.codebooks["codes"].codes)
    assert not torch.equal(first.codebooks["codes"].codes, other.codebooks["codes"].codes)


@pytest.fixture
def case():
    model = tiny_model("llama")
    record = from_ids(model, torch.randint(0, 250, (8, 16), generator=torch.Generator().manual_seed(0)))
    keep = record.mask.clone()
    keep[:, 0] = False
    return model, record, keep


def sampled(model, record, keep, site):
    with capture(model, site) as acts:
        model(record)
    return acts[site].flatten(2)[keep]


def test_the_task_loss_is_kl_and_cross_entropy_in_nats(case):
    model, record, _ = case
    a, b = normal(8, 16, 259), normal(8, 16, 259, seed=1)
    p, q = b.softmax(-1), a.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    assert float(task_loss(a, b, record)) == pytest.approx(float(kl), rel=1e-5)
    ce = -a.log_softmax(-1)[:, :-1].gather(2, record.ids[:, 1:, None]).mean()
    assert float(task_loss(a, None, record)) == pytest.approx(float(ce), rel=1e-5)
    padded = replace(record, mask=record.mask & (torch.arange(16) < 10))
    short = torch.nn.functional.cross_entropy(a[:, :9].flatten(0, 1).float(), record.ids[:, 1:10].flatten())
    assert float(task_loss(a, None, padded)) == pytest.approx(float(short), rel=1e-5)


@pytest.mark.parametrize("site", ["resid_post.0", "z.1"])
def test_a_code_gets_its_share_of_the_gradient_at_every_token_that_chose_it(case, site):
    """Against the gradient that a capture reads at the site, where the finished codebook is spliced in."""
    model, record, keep = case
    groups = 4 if site == "z.1" else 1
    x = sampled(model, record, keep, site)
    q = Quantiser(x, replace(SMALL, similarity="cosine"), groups=groups)
    chosen = q(x).indices
    found: dict = {}
    with gradients(model), edited(model, learning_edit(model.table.one(site), q, keep, found)):
        loss = model(record).log_softmax(-1)[..., 7].sum()
    (gradient,) = torch.autograd.grad(loss, q.inner._codebook.embed)
    with edited(model, splice(model.table.one(site), q.frozen(), keep)), capture(model, site, grad=True) as acts:
        model(record).log_softmax(-1)[..., 7].sum().backward()
    at_site = acts.grad(site).flatten(2)[keep].reshape(len(x), groups, -1)
    expected = torch.zeros_like(gradient)
    for group in range(groups):
        for slot in range(2):
            expected[group].index_add_(0, chosen[:, group, slot], at_site[:, group] / (2 * q.scale))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)
    assert float(gradient.abs().max()) > 0.1


def kl_with(model, record, keep, codebooks) -> float:
    edits = [splice(model.table.one(site), book, keep) for site, book in codebooks.items()]
    with edited(model, edits):
        spliced = model(record)
    return float(task_loss(spliced, model(record), record))


@pytest.mark.parametrize("task", ["kl", "ce"])
def test_codes_learn_in_a_frozen_model_and_leave_it_as_it_was(case, task):
    model, record, keep = case
    before = hash_tensors(model.module.state_dict())
    flags = [parameter.requires_grad for parameter in model.module.parameters()]
    cfg = CodebookConfig(n_codes=16, k=2, n_steps=40, rows_per_step=8, task=task, autoencoder_weight=0.0, lr=0.05)
    sites = {"resid_post.1": 1, "z.2": 4}
    made = {site: Quantiser(sampled(model, record, keep, site), cfg, groups=groups) for site, groups in sites.items()}
    start = {site: each.frozen() for site, each in made.items()}
    trained = train_in_model(model, made, record, keep, cfg)
    assert trained.model is model
    assert hash_tensors(model.module.state_dict()) == before
    assert [parameter.requires_grad for parameter in model.module.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert set(trained.codebooks) == set(sites)
    if task == "kl":
        assert kl_with(model, record, keep, trained.codebooks) < 0.9 * kl_with(model, record, keep, start)
    assert trained.curve["task"].iloc[-1] < trained.curve["task"].iloc[0]


def test_finetuning_trains_a_copy_beside_a_baseline_without_codes(case):
    model, record, keep = case
    before = hash_tensors(model.module.state_dict())
    cfg = CodebookConfig(n_codes=16, k=2, n_steps=20, rows_per_step=8, task="ce", model_lr=3e-3)
    q = Quantiser(sampled(model, record, keep, "resid_post.1"), cfg)
    trained = train_in_model(model, {"resid_post.1": q}, record, keep, cfg, finetune=True)
    plain = train_in_model(model, {}, record, keep, cfg, finetune=True)
    assert hash_tensors(model.module.state_dict()) == before
    assert trained.model is not model and plain.codebooks == {}
    base = float(task_loss(model(record), None, record))
    with edited(
        trained.model, splice(trained.model.table.one("resid_post.1"), trained.codebooks["resid_post.1"], keep)
    ):
        spliced = float(task_loss(trained.model(record), None, record))
    tuned = float(task_loss(plain.model(record), None, record))
    assert spliced < base and tuned < base
    assert not any(parameter.requires_grad for parameter in plain.model.module.parameters())
    below, above = "model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"
    old, new = model.module.state_dict(), trained.model.module.state_dict()
    assert not torch.equal(old[below], new[below]), "no gradient passed the codes"
    assert not torch.equal(old[above], new[above])


def test_tokens_that_are_left_out_keep_their_activation_in_training(case):
    model, record, keep = case
    keep = keep & (torch.arange(16) % 2 == 0)
    cfg = CodebookConfig(n_codes=4, k=1, n_steps=1, rows_per_step=8, task="kl")
    seen = []
    q = Quantiser(sampled(model, record, keep, "resid_post.1"), cfg)
    q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trained = train_in_model(model, {"resid_post.1": q}, record, keep, cfg)
    assert len(seen[0]) == int(keep.sum())
    with capture(model, "resid_post.1") as acts:
        model(record)
    assert {tuple(row.tolist()) for row in seen[0]} == {tuple(row.tolist()) for row in acts["resid_post.1"][keep]}
    assert trained.curve["tokens"].iloc[-1] == record.n_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"k=0 must lie in 1\.\.n_codes=1024"),
        ({"k": 2000}, "k=2000"),
        ({"n_steps": 0}, "at least 1"),
        ({"decay": 1.0}, "decay=1"),
        ({"affine": True, "update": "ema"}, "affine"),
        ({"lr": -1.0}, "negative"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(InterpError, match=message):
        CodebookConfig(**changes)


def test_bad_input_is_named(case):
    model, record, keep = case
    x = normal(40, 8, dtype=torch.float32)
    with pytest.raises(InterpError, match="do not vary"):
        Quantiser(torch.ones(4, 8), SMALL)
    with pytest.raises(InterpError, match="3 groups"):
        Quantiser(x, SMALL, groups=3)
    with pytest.raises(InterpError, match="do not fit a table"):
        Quantiser(x, SMALL, codes=torch.zeros(1, 3, 8))
    with pytest.raises(InterpError, match="ended at step 1 of 400"):
        train_on_activations([x], x, SMALL)
    with pytest.raises(InterpError, match="train_in_model"):
        train_on_activations([x], x, replace(SMALL, task="kl"))
    with pytest.raises(InterpError, match="the loss is nan at step 0"):
        train_on_activations([x * float("nan")], x, SMALL)
    with pytest.raises(InterpError, match="task='kl' or 'ce'"):
        train_in_model(model, {}, record, keep, SMALL)
    with pytest.raises(InterpError, match="must mark tokens in every row"):
        train_in_model(model, {}, record, keep & False, replace(SMALL, task="ce"), finetune=True)
