"""Graph files: circuit-tracer writes the same and reads ours; round trip; damaged and hostile files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from circuit_tracer.attribution.targets import LogitTarget
from circuit_tracer.frontend.graph_models import Model, _cantor_pairing
from circuit_tracer.frontend.utils import add_graph_metadata
from circuit_tracer.graph import Graph, prune_graph
from circuit_tracer.utils.create_graph_files import build_model, create_nodes, create_used_nodes_and_edges
from circuit_tracer.utils.tl_nnsight_mapping import UnifiedConfig

from interp.circuits.attribution_graph_scores import prune
from interp.circuits.attribution_graph_value import AttributionGraph
from interp.circuits.graph_json import (
    FileNode,
    GraphFile,
    cantor_pair,
    cantor_unpair,
    graph_file,
    read_graph,
    write_graph,
)
from interp.core.errors import ArtefactError, InterpError
from interp.core.seed import torch_generator

N_LAYERS, N_POS, D_VOCAB = 3, 5, 100
STRINGS = ("<b>", "</script>", "\n", "é\u2028", '"q\\')
HOSTILE = "</script><script>alert(1)</script>"


def random_graph(seed: int = 0, n: int = 24) -> AttributionGraph:
    """Edges between random features that only run upwards."""
    generator = torch_generator(seed, "graph")
    layer = torch.randint(0, N_LAYERS, (n,), generator=generator).sort().values
    pos = torch.randint(0, N_POS, (n,), generator=generator)
    number = torch.arange(n) + 10
    source = torch.cat([layer, torch.arange(N_LAYERS).repeat_interleave(N_POS), torch.full((N_POS,), -1)])
    target = torch.cat([layer, torch.full((2,), N_LAYERS)])
    edges = torch.randn(n + 2, len(source), generator=generator) * (source[None] < target[:, None])
    zeros = torch.zeros(n + 2)
    return AttributionGraph(
        tokens=torch.arange(N_POS) + 3, strings=STRINGS, n_layers=N_LAYERS,
        features=torch.stack([layer, pos, number], dim=1), values=torch.rand(n, generator=generator),
        logit_tokens=torch.tensor([7, 9]), logit_strings=("yes", HOSTILE),
        logit_probabilities=torch.tensor([0.75, 0.125]), edges=edges, pre=zeros, bias=zeros, rest=zeros,
        rest_abs=zeros, n_active=n,
    )  # fmt: skip


def theirs(graph: AttributionGraph) -> Graph:
    config = UnifiedConfig(
        n_layers=N_LAYERS, d_model=8, d_head=4, n_heads=2, d_mlp=16, d_vocab=D_VOCAB, tokenizer_name="t",
        model_name="m", original_architecture="x",
    )  # fmt: skip
    return Graph(
        input_string="".join(STRINGS), input_tokens=graph.tokens, active_features=graph.features,
        adjacency_matrix=graph.adjacency(), cfg=config, selected_features=torch.arange(graph.n_features),
        activation_values=graph.values,
        logit_targets=[LogitTarget(s, int(i)) for s, i in zip(graph.logit_strings, graph.logit_tokens, strict=True)],
        logit_probabilities=graph.logit_probabilities, scan="ours",
    )  # fmt: skip


def file_of(graph: AttributionGraph, **thresholds: float) -> GraphFile:
    return graph_file(graph, prune(graph, **thresholds), slug="one", scan="ours", prompt="".join(STRINGS))


@pytest.mark.parametrize("seed", range(3))
def test_circuit_tracer_writes_the_same_file(seed: int, tmp_path: Path) -> None:
    graph = random_graph(seed)
    nodes, edges, scores = prune_graph(theirs(graph), 0.8, 0.98)
    made = create_nodes(theirs(graph), nodes, None, scores)
    used, links = create_used_nodes_and_edges(theirs(graph), made, edges)
    tokenizer = SimpleNamespace(decode=lambda t: STRINGS[int(t) - 3])
    wanted = json.loads(build_model(theirs(graph), used, links, "one", "ours", 0.8, tokenizer).model_dump_json())
    found = json.loads(write_graph(file_of(graph), tmp_path).read_text())
    assert found["metadata"] == wanted["metadata"]
    assert found["qParams"] == wanted["qParams"]
    key = "node_id"
    assert [n[key] for n in found["nodes"]] == [n[key] for n in wanted["nodes"]]
    for ours, other in zip(found["nodes"], wanted["nodes"], strict=True):
        for name, value in other.items():
            close = pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
            assert ours[name] == close, (ours["node_id"], name)
    mine = {(link["source"], link["target"]): link["weight"] for link in found["links"]}
    assert mine == pytest.approx({(e["source"], e["target"]): e["weight"] for e in wanted["links"] if e["weight"]})
    assert len(mine) == len(found["links"]) > 10


def test_circuit_tracer_reads_ours(tmp_path: Path) -> None:
    path = write_graph(file_of(random_graph()), tmp_path)
    model = Model.model_validate_json(path.read_text())
    assert model.metadata.prompt_tokens == list(STRINGS)
    assert {node.node_id for node in model.nodes} >= {link["source"] for link in model.links}
    index = json.loads((tmp_path / "graph-metadata.json").read_text())
    assert [own["slug"] for own in index["graphs"]] == ["one"]


def test_round_trip(tmp_path: Path) -> None:
    file = file_of(random_graph(), edge_threshold=1.0)
    path = write_graph(file, tmp_path)
    again = read_graph(path)
    assert again == file
    first = path.read_bytes()
    assert write_graph(again, tmp_path).read_bytes() == first
    write_graph(replace(file, metadata={**file.metadata, "slug": "two"}), tmp_path)
    index = json.loads((tmp_path / "graph-metadata.json").read_text())
    assert [own["slug"] for own in index["graphs"]] == ["one", "two"]
    add_graph_metadata({"slug": "three"}, str(tmp_path))  # theirs extends our index
    write_graph(file, tmp_path)
    index = json.loads((tmp_path / "graph-metadata.json").read_text())
    assert [own["slug"] for own in index["graphs"]] == ["two", "three", "one"]


def test_the_matrix_of_a_file_is_the_pruned_graph(tmp_path: Path) -> None:
    graph = random_graph()
    pruned = prune(graph)
    file = read_graph(write_graph(graph_file(graph, pruned, slug="a", scan="s", prompt="p"), tmp_path))
    place = [[n.node_id for n in file.nodes].index(name) for name in expected_ids(graph, pruned.nodes.tolist())]
    torch.testing.assert_close(file.matrix()[place][:, place].float(), pruned.edges)


def expected_ids(graph: AttributionGraph, nodes: list[int]) -> list[str]:
    found: list[str] = []
    for index in nodes:
        n = graph.node(index)
        found.append({
            "feature": f"{n.layer}_{n.number}_{n.pos}", "error": f"0_{n.layer}_{n.pos}",
            "token": f"E_{n.number}_{n.pos}", "logit": f"{N_LAYERS + 1}_{n.number}_{N_POS - 1}",
        }[n.kind])  # fmt: skip
    return found


def test_entries_of_other_writers_survive(tmp_path: Path) -> None:
    raw = json.loads(write_graph(file_of(random_graph()), tmp_path).read_text())
    raw["nodes"][0]["vis_link"] = {"a": [1]}
    raw["metadata"]["info"] = {"creator": "x"}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(raw))
    again = read_graph(path)
    assert again.nodes[0].more == {"vis_link": {"a": [1]}}
    assert again.metadata["info"] == {"creator": "x"}
    assert json.loads(write_graph(again, tmp_path / "b").read_text()) == raw


def test_text_cannot_leave_a_script_element(tmp_path: Path) -> None:
    text = write_graph(file_of(random_graph()), tmp_path).read_text()
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert HOSTILE in {n["clerp"].split('"')[1] for n in json.loads(text)["nodes"] if n["feature_type"] == "logit"}


def test_an_error_with_a_features_id_gets_its_own(tmp_path: Path) -> None:
    graph = random_graph()
    features = graph.features.clone()
    features[0] = torch.tensor([0, 2, 1])  # id 0_1_2, as the error of layer 1 at position 2
    graph = replace(graph, features=features)
    file = file_of(graph, node_threshold=1.0, edge_threshold=1.0)
    assert file.ambiguous == ()
    names = {n.node_id: n.feature_type for n in file.nodes}
    assert names["0_1_2"] == "cross layer transcoder"
    assert names["error_1_2"] == "mlp reconstruction error"
    twice = GraphFile(metadata=file.metadata, q_params={}, links=(),
                      nodes=tuple(replace(n, node_id="0_1_2") for n in file.nodes[:2]))  # fmt: skip
    with pytest.raises(ArtefactError, match="told apart"):
        twice.matrix()
    with pytest.raises(InterpError, match="id of its own"):
        write_graph(twice, tmp_path)


def test_pairs_of_numbers() -> None:
    for a in (0, 1, 7, 61):
        for b in (0, 1, 65535, 10**6):
            pair = cantor_pair(a, b)
            assert pair == _cantor_pairing(a, b)
            assert cantor_unpair(pair) == (a, b)
    kind = "cross layer transcoder"
    node = FileNode(node_id="x", feature=cantor_pair(4, 99), layer="4", ctx_idx=0, feature_type=kind, jsNodeId="x")
    assert node.number == 99


NODE = {"node_id": "a", "feature": 1, "layer": "0", "ctx_idx": 0, "feature_type": "embedding"}
DAMAGED: dict[str, Any] = {
    "not json": "{",
    "a list": [],
    "no nodes": {"metadata": {}, "links": []},
    "nodes no list": {"metadata": {}, "nodes": 3, "links": []},
    "node no object": {"metadata": {}, "nodes": [3], "links": []},
    "node without id": {"metadata": {}, "nodes": [{"feature": 1}], "links": []},
    "position as text": {"metadata": {}, "nodes": [{**NODE, "ctx_idx": "0"}], "links": []},
    "feature true": {"metadata": {}, "nodes": [{**NODE, "feature": True}], "links": []},
    "link to nowhere": {"metadata": {}, "nodes": [NODE], "links": [{"source": "a", "target": "b", "weight": 1}]},
    "link without weight": {"metadata": {}, "nodes": [NODE], "links": [{"source": "a", "target": "a"}]},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(DAMAGED[case] if isinstance(DAMAGED[case], str) else json.dumps(DAMAGED[case]))
    with pytest.raises(ArtefactError, match=r"bad\.json"):
        read_graph(path)


def test_names_that_are_no_files_are_refused(tmp_path: Path) -> None:
    file = file_of(random_graph())
    for slug in ("../up", "", ".hidden", "a/b", "graph-metadata"):
        with pytest.raises(InterpError, match="slug"):
            write_graph(replace(file, metadata={**file.metadata, "slug": slug}), tmp_path)
    with pytest.raises(ArtefactError, match="does not exist"):
        read_graph(tmp_path / "none.json")
    nan = replace(file, links=(replace(file.links[0], weight=math.nan),))
    with pytest.raises(ArtefactError, match="could not write"):
        write_graph(nan, tmp_path)
