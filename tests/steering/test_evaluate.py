"""Evaluation: steering against an edit of the bias and a linear model, cost, batching, and what is left unsteered."""

import pytest
import torch
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.instrument.edits import add, edited
from interp.instrument.tokens import from_ids, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.steering.evaluate import (
    Batch,
    Neutral,
    Readout,
    batches,
    propensities,
    readout,
    slope,
    steerable,
    steered_logits,
)

TEXTS = ("the film was", "my day was", "a long meal was", "our trip was")
SITE = "resid_post.1"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def reading(model: LoadedModel) -> Readout:
    return readout(model, ["good", "amazing"], ["bad", "terrible"])


def vectors(model: LoadedModel, n: int = 3) -> Tensor:
    return torch.randn(n, model.dims.d_model or 0, generator=torch_generator(0, "test")) * 5


def everywhere(model: LoadedModel, texts: tuple[str, ...] = TEXTS[:1]) -> Batch:
    record = tokenize(model, list(texts))
    return Batch(model, record, record.mask, tuple(range(len(texts))))


def test_adding_at_every_position_is_a_bias_on_the_block() -> None:
    model = tiny_model("gpt2")
    batch, vector = everywhere(model), vectors(model, 1)
    steered = steered_logits(batch, SITE, vector, last_only=False)[0]
    bias: nn.Parameter = model.layers[1].mlp.c_proj.bias  # pyright: ignore
    with torch.no_grad():
        bias.add_(vector[0])
    torch.testing.assert_close(steered, model(batch.record), rtol=1e-4, atol=1e-4)


def test_there_and_back_restores_the_logits(model: LoadedModel) -> None:
    batch, vector = everywhere(model), vectors(model, 1)[0]
    base = model(batch.record)
    with edited(model, [add(SITE, vector), add(SITE, -vector)]):
        again = model(batch.record)
    torch.testing.assert_close(base, again, rtol=1e-4, atol=1e-4)
    zero = steered_logits(batch, SITE, torch.zeros_like(vector)[None], last_only=False)[0]
    torch.testing.assert_close(zero, base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("last_only", [True, False])
def test_running_on_from_the_site_is_the_whole_forward_with_an_edit(family: str, layer: int, last_only: bool) -> None:
    model = tiny_model(family)
    (batch,) = batches(model, ["the film was", "the meal was"])
    assert batch.runner is not None
    found = steered_logits(batch, f"resid_post.{layer}", vectors(model), last_only=last_only)
    for vector, logits in zip(vectors(model), found, strict=True):
        with edited(model, add(f"resid_post.{layer}", vector, at=batch.where)):
            expected = model(batch.record)
        torch.testing.assert_close(logits, expected[:, -1:] if last_only else expected, rtol=1e-4, atol=1e-4)


class Linear(nn.Module):
    """A model whose logits are linear in its stream: embedding, one linear block, one readout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(259, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 259, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.block(self.embed(ids)))


def test_in_a_linear_model_the_effect_is_the_projection_on_the_readout() -> None:
    module = Linear()
    model = LoadedModel(module, tiny_model().tokenizer)
    reading = Readout(ids_for=(7,), ids_against=(9,))
    change = torch.randn(3, 8, generator=torch_generator(1, "linear"))
    prompts = [everywhere(model, ("abc", "xyz"))]
    base = propensities(prompts, reading, "block", torch.zeros(1, 8))
    moved = propensities(prompts, reading, "block", change) - base
    expected = change @ (module.out.weight[7] - module.out.weight[9]).detach()
    torch.testing.assert_close(moved, expected[:, None].double().expand(-1, 2), rtol=1e-4, atol=1e-5)


def test_vectors_and_prompts_in_one_batch_give_what_each_gives_alone(model: LoadedModel, reading: Readout) -> None:
    chosen = vectors(model)
    together = propensities(batches(model, TEXTS), reading, SITE, chosen)
    for column, text in enumerate(TEXTS):
        for row, vector in enumerate(chosen):
            alone = propensities(batches(model, [text]), reading, SITE, vector[None])
            torch.testing.assert_close(together[row, column], alone[0, 0], rtol=1e-4, atol=1e-4)


def test_propensity_against_probabilities(model: LoadedModel, reading: Readout) -> None:
    logits = model(tokenize(model, TEXTS[0]))[0, -1]
    p = logits.softmax(-1)
    expected = (p[ord("g")] + p[ord("a")]).log() - (p[ord("b")] + p[ord("t")]).log()
    torch.testing.assert_close(reading.propensity(logits).float(), expected, rtol=1e-4, atol=1e-5)


def test_cost_is_zero_for_nothing_and_is_the_divergence_otherwise(model: LoadedModel) -> None:
    record = from_ids(model, torch.randint(256, (2, 9), generator=torch_generator(0, "neutral")))
    where = record.mask.clone()
    where[:, 0] = False
    neutral = Neutral(Batch(model, record, where, (0, 1)))
    vector = vectors(model, 1)
    cost = neutral.cost(SITE, torch.cat([torch.zeros_like(vector), vector]))
    torch.testing.assert_close(cost[0], torch.tensor([0.0, 1.0]).double(), rtol=0, atol=1e-5)
    steered = steered_logits(neutral.batch, SITE, vector, last_only=False)[0]
    kl = nn.functional.kl_div(
        steered.log_softmax(-1), model(record.ids).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(cost[1, 0].float(), kl[:, 1:].mean(), rtol=1e-4, atol=1e-5)
    assert cost[1, 0] > 0
    losses = [nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), record.ids[:, 1:].flatten()) for x in
              (steered, model(record.ids))]  # fmt: skip
    torch.testing.assert_close(cost[1, 1].float(), (losses[0] - losses[1]).exp(), rtol=1e-4, atol=1e-5)


def test_the_first_token_and_sinks_stay_as_they_are(model: LoadedModel) -> None:
    record = tokenize(model, ["abcdef", "xyz"], pad="left")
    assert steerable(model, record).tolist() == [[False] + [True] * 5, [False] * 4 + [True] * 2]
    assert torch.equal(steerable(model, record, sinks=True), record.mask)
    with edited(model, add("resid_post.0", 1e4, at=[4])):
        assert not steerable(model, record)[:, 4].any()


def test_slope_of_a_line() -> None:
    strengths = torch.tensor([-1.0, 0.5, 2.0])
    values = torch.stack([3 * strengths + 1, -strengths], dim=1).double()
    torch.testing.assert_close(slope(strengths, values), torch.tensor([3.0, -1.0], dtype=torch.float64))


def test_words_that_cannot_be_told_apart_are_refused(model: LoadedModel) -> None:
    with pytest.raises(InterpError, match="different tokens"):
        readout(model, ["good"], ["gone"])
    with pytest.raises(InterpError, match="different tokens"):
        readout(model, [], ["bad"])
    assert "several tokens" in readout(model, ["good"], ["bad"]).notes[0]
