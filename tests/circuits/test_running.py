"""A model run with a circuit: the two ends, any circuit against plain torch, ablations, batches, faithfulness."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.circuits.attribution import edge_scores
from interp.circuits.evaluate import Faithfulness, faithfulness, run_circuit
from interp.circuits.exact import exact_effects
from interp.circuits.graph import Circuit, Graph
from interp.circuits.running import Evaluator, Given
from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.tasks.base import PromptPairs
from interp.tasks.ioi import random_pairs
from interp.tasks.metrics import AnswerMetric, Divergence
from tests.circuits import by_hand

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "phi3", "olmo2")


def small(family: str = "llama", **more: Any) -> LoadedModel:
    return tiny_model(family, **{"n_layers": 2, "std": 0.15, "dtype": torch.float64} | more)


def some_pairs(model: LoadedModel, length: int = 8) -> PromptPairs:
    return random_pairs(model, n=3, length=length)


def logit_diff(pairs: PromptPairs) -> AnswerMetric:
    return AnswerMetric(name="logit_diff", answers=pairs.answers)


def random_circuit(graph: Graph, share: float, seed: int) -> Circuit:
    drawn = torch.rand(graph.possible.shape, generator=torch_generator(seed, "circuit"))
    return Circuit(graph, (drawn < share) & graph.possible)


def shares(circuit: Circuit) -> dict[tuple[str, str], float]:
    """As the oracle wants them."""
    where = circuit.graph.possible.nonzero().tolist()
    names = circuit.graph.source_names, circuit.graph.destination_names
    return {(names[0][u], names[1][v]): float(circuit.edges[u, v]) for u, v in where}


def by_definition(model: LoadedModel, pairs: PromptPairs, circuit: Circuit) -> Tensor:
    _, reference = by_hand.run(model, pairs.corrupt.ids)
    split = circuit.graph.split_mlp
    return by_hand.run(model, pairs.clean.ids, shares(circuit), reference, split=split)[0]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(family: str, split: bool) -> None:
    if family == "gpt2" and split:
        return
    model = small(family, std=0.35, dtype=torch.float32)
    pairs, graph = some_pairs(model, 12), Graph.of(model, split_mlp=split)
    logits = run_circuit(model, pairs, [graph.full(), graph.empty()])[:, :, 0]
    torch.testing.assert_close(logits[0], model(pairs.clean)[:, -1], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1], model(pairs.corrupt)[:, -1], atol=1e-4, rtol=0)


def test_the_oracle_is_the_model() -> None:
    for family in ("llama", "gpt2"):
        model = small(family)
        pairs = some_pairs(model)
        torch.testing.assert_close(by_hand.run(model, pairs.clean.ids)[0], model(pairs.clean)[:, -1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("family", "n_kv", "split"), [("llama", 2, False), ("llama", 4, True), ("gpt2", None, False)])
def test_any_circuit_is_what_plain_torch_says(family: str, n_kv: int | None, split: bool, share: float) -> None:
    model = small(family, n_kv_heads=n_kv)
    pairs, graph = some_pairs(model), Graph.of(model, split_mlp=split)
    circuits = [random_circuit(graph, share, seed) for seed in range(3)]
    logits = run_circuit(model, pairs, circuits)[:, :, 0]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3
    for circuit, found in zip(circuits, logits, strict=True):
        torch.testing.assert_close(found, by_definition(model, pairs, circuit), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_are_what_plain_torch_says(ablation: str) -> None:
    for family in ("llama", "gpt2"):
        model = small(family)
        pairs, graph = some_pairs(model), Graph.of(model)
        _, corrupt = by_hand.run(model, pairs.corrupt.ids)
        reference = {
            name: torch.zeros_like(value) if ablation == "zero" else value.mean(0, keepdim=True)
            for name, value in corrupt.items()
        }
        circuit = random_circuit(graph, 0.6, 0)
        found = run_circuit(model, pairs, [circuit, graph.full()], ablation=ablation)[:, :, 0]
        wanted = by_hand.run(model, pairs.clean.ids, shares(circuit), reference)[0]
        torch.testing.assert_close(found[0], wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(found[1], model(pairs.clean)[:, -1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_of_a_batch_do_not_mix(family: str) -> None:
    model = small(family)
    pairs, graph = some_pairs(model), Graph.of(model)
    circuits = [random_circuit(graph, share, 1) for share in (0.05, 0.3, 0.8)] + [graph.empty()]
    together = run_circuit(model, pairs, circuits, n_last=2)
    assert together.shape[:3] == (4, 3, 2)
    alone = torch.cat([run_circuit(model, pairs, circuit, n_last=2) for circuit in circuits])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    in_parts = run_circuit(model, pairs, circuits, n_last=2, budget=1)
    torch.testing.assert_close(together, in_parts, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_beginning_at_a_layer_changes_nothing(layer: int) -> None:
    model = small()
    pairs, graph = some_pairs(model), Graph.of(model)
    base = random_circuit(graph, 0.7, 3)
    below = torch.tensor([d.kind != "logits" and d.layer < layer for d in graph.destinations])
    others = [Circuit(graph, torch.where(below, base.edges, random_circuit(graph, 0.5, i).edges)) for i in range(3)]
    evaluator = Evaluator(model, pairs, graph)
    given = Given(layer, evaluator.upstream(base))
    torch.testing.assert_close(evaluator.logits(others, given=given), evaluator.logits(others), atol=1e-10, rtol=0)


def test_what_is_not_connected_changes_nothing() -> None:
    model = small()
    pairs, graph = some_pairs(model), Graph.of(model)
    circuit = random_circuit(graph, 0.25, 0)
    assert 0 < circuit.connected().size < circuit.size
    found = by_definition(model, pairs, circuit)
    torch.testing.assert_close(by_definition(model, pairs, circuit.connected()), found, atol=1e-12, rtol=0)


def test_faithfulness_of_the_ends_and_of_a_circuit() -> None:
    model = small()
    pairs, graph = some_pairs(model), Graph.of(model)
    metric, circuit = logit_diff(pairs), random_circuit(graph, 0.7, 0)
    found = faithfulness(model, pairs, [graph.full(), graph.empty(), circuit], metric)
    torch.testing.assert_close(found.mean[:2], torch.tensor([1.0, 0.0]).double(), atol=1e-9, rtol=0)
    m = [metric(x[:, None], torch.arange(3)) for x in (
        by_definition(model, pairs, circuit), model(pairs.clean)[:, -1], model(pairs.corrupt)[:, -1])]  # fmt: skip
    torch.testing.assert_close(found.per_pair[2], (m[0] - m[2]) / (m[1] - m[2]), atol=1e-4, rtol=1e-4)
    wanted = (m[0].mean() - m[2].mean()) / (m[1].mean() - m[2].mean())
    torch.testing.assert_close(found.mean[2], wanted, atol=1e-4, rtol=0)
    assert found.sizes == (graph.n_edges, 0, circuit.size)


def test_no_gap_is_an_error_and_not_an_infinity() -> None:
    ends = torch.tensor([1.0, 2.0])
    with pytest.raises(InterpError, match="no difference that a circuit could carry"):
        Faithfulness(values=ends[None], all=ends, none=ends.flip(0), ablation="corrupt", metric="prob", sizes=(1,))


def test_a_pair_without_gap_has_no_number() -> None:
    found = Faithfulness(
        values=torch.tensor([[1.0, 2.0]]), all=torch.tensor([2.0, 2.0]), none=torch.tensor([0.0, 2.0]),
        ablation="corrupt", metric="logit_diff", sizes=(1,),
    )  # fmt: skip
    assert found.per_pair[0, 0] == 0.5 and bool(found.per_pair[0, 1].isnan())
    assert found.mean.item() == 0.5


def test_a_metric_may_read_what_stands_before_the_first_difference() -> None:
    model = small()
    pairs, graph = some_pairs(model), Graph.of(model)
    assert pairs.n_pos - pairs.first_difference < 7
    metric = Divergence(reference=model(pairs.clean)[:, -7:].log_softmax(-1))
    found = faithfulness(model, pairs, graph.empty(), metric)
    torch.testing.assert_close(
        found.values[0], metric(model(pairs.corrupt)[:, -7:], torch.arange(3)), atol=1e-6, rtol=0
    )
    assert edge_scores(model, pairs, graph, metric, "eap-ig").values.any()
    assert exact_effects(model, pairs, graph, metric, ["embed->m0"]).values.any()
    with pytest.raises(InterpError, match="logits of 7 positions, 4 were run"):
        Evaluator(model, pairs, graph).logits([graph.full()], 7)


def test_prompts_that_cannot_be_taken_are_refused() -> None:
    model = small()
    pairs, graph = some_pairs(model), Graph.of(model)
    mask = pairs.clean.mask.clone()
    mask[0, 0] = False
    padded = replace(pairs, clean=replace(pairs.clean, mask=mask))
    with pytest.raises(InterpError, match="hold padding"):
        run_circuit(model, padded, graph.full())
    with pytest.raises(InterpError, match="n_last=9 positions of prompts that have 8"):
        run_circuit(model, pairs, graph.full(), n_last=9)


def test_bad_input_is_refused() -> None:
    model = small()
    pairs, graph = some_pairs(model), Graph.of(model)
    with pytest.raises(InterpError, match="unknown ablation 'noise'; nearest:"):
        run_circuit(model, pairs, graph.full(), ablation="noise")
    with pytest.raises(InterpError, match="no circuits"):
        run_circuit(model, pairs, [])
    with pytest.raises(InterpError, match="is not of tiny-llama"):
        run_circuit(model, pairs, Graph.make(3, 4, 2).full())
    with pytest.raises(InterpError, match="another graph"):
        run_circuit(model, pairs, [graph.full(), Graph.of(model, split_mlp=True).full()])
    with pytest.raises(InterpError, match="experts"):
        run_circuit(tiny_model("mixtral"), pairs, graph.full())


def test_a_model_that_is_no_sum_is_refused() -> None:
    model = small()

    def scaled(_module: Any, _args: Any, output: Any) -> Any:
        return 2 * output

    hook = model.layers[0].register_forward_hook(scaled)
    with pytest.raises(InterpError, match="not the sum of its heads and MLPs"):
        run_circuit(model, some_pairs(model), Graph.of(model).full())
    hook.remove()


def test_nothing_stays_hooked() -> None:
    model = small()
    pairs, graph = some_pairs(model), Graph.of(model)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())

    before = hooks()
    run_circuit(model, pairs, graph.full())
    assert hooks() == before


@pytest.mark.needs_package("transformer_lens")
def test_a_model_in_another_layout_is_refused() -> None:
    from tests.models.test_lens import hooked

    model = LoadedModel(module=hooked(gated=True))
    pairs = some_pairs(small())
    with pytest.raises(InterpError, match="for a bridge: load the model it wraps"):
        run_circuit(model, pairs, Graph.make(2, 4).full())
