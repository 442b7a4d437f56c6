"""Which heads switch neurons on? (a helper of `glu_neurons`)

What a head writes, o, reaches a later MLP through the norm before it. If nothing else were written there, neuron j
would be at act(g_j . o) * (u_j . o); the channel score of a head is the mean of this over neurons and prompts,
    s(h) = mean_j act(g_j . o_h / r) * (u_j . o_h / r)
with o_h the head's own output at the last token, of each prompt, and r the size by which the norm divides there. Beside
it the two readings from weights alone, of length 1: the diagonal of W_V W_O, which the paper's code comes down to, and
the direction that W_V W_O writes most strongly, with the sign that scores higher.
Source: J. Lee et al. 2025, https://arxiv.org/abs/2504.14379, section on heads; code ajyl/verify_circuit.
Beware: the product is quadratic in o for small o, so a head that writes far is favoured over three that share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.analyses.glu_neurons_inputs import ROWS, Prompts
from interp.analyses.glu_neurons_probe import Chosen, at_last
from interp.analyses.glu_neurons_scan import Mlp, activation
from interp.analyses.heads_weights import can_copy, fold_after, fold_before, output_weights, value_weights
from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.models.model import LoadedModel

Head = tuple[int, int]
Act = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadTable:
    """One value per head, layers as in `layers`."""

    layers: tuple[int, ...]
    attention: Float[Tensor, "layer head"]
    """From the last token to the one that decides, mean over prompts."""
    score: Float[Tensor, "layer head"]
    score_diagonal: Float[Tensor, "layer head"]
    score_direction: Float[Tensor, "layer head"]

    def place(self, head: Head) -> tuple[int, int]:
        """Row and column of a head."""
        return self.layers.index(head[0]), head[1]

    def ranked(self, least: float, most: int) -> list[Head]:
        """Candidates, those that attend at least so much, by score; all heads where none does."""
        heads = [(layer, head) for layer in self.layers for head in range(self.attention.shape[1])]
        near = sorted(heads, key=lambda h: -float(self.attention[self.place(h)]))
        near = [h for h in near if float(self.attention[self.place(h)]) > least][:most] or near
        return sorted(near, key=lambda h: -float(self.score[self.place(h)]))


def channel(
    out: Float[Tensor, "row d_model"], readers: Mapping[str, Float[Tensor, "neuron d_model"]], act: Act
) -> Float[Tensor, " row"]:
    """Mean over neurons of act(gate . o) * (up . o), or of act(in . o) for an ungated MLP."""
    if "in" in readers:
        return act(out @ readers["in"].T).mean(1)
    return (act(out @ readers["gate"].T) * (out @ readers["up"].T)).mean(1)


def norm_size(model: LoadedModel, stream: Float[Tensor, "row d_model"], layer: int) -> Float[Tensor, " row"]:
    """What the norm before an MLP divides by: root mean square, after centring where it centres."""
    fold = fold_before(model, Part.MLP_IN, layer)
    centred = stream - stream.mean(1, keepdim=True) if fold.centres else stream
    return centred.square().mean(1).sqrt().clamp_min(1e-12)


def attention_to(model: LoadedModel, given: Prompts, layers: Sequence[int]) -> Float[Tensor, "layer head"]:
    """Attention from the last token to each prompt's deciding one."""
    sites = [Site(Part.PATTERN, layer) for layer in layers]
    total = torch.zeros(len(layers), model.dims.n_heads or 0, dtype=torch.float64)
    for start in range(0, len(given), ROWS):
        with capture(model, sites, positions=given.last) as acts:
            model(given.ids[start : start + ROWS])
        where = given.where[start : start + ROWS]
        for row, site in enumerate(sites):
            pattern = acts[site].double().cpu()[:, :, 0]
            total[row] += pattern[torch.arange(len(where)), :, where].sum(0)
    return total / len(given)


def score_heads(
    model: LoadedModel, given: Prompts, mlps: Sequence[Mlp], chosen: Sequence[Chosen], n_channel: int
) -> HeadTable:
    """Every head of the layers up to the last MLP that was read; neurons of each class on the prompts of that class."""
    n_heads = model.dims.n_heads or 0
    layers = tuple(layer for layer in range(max(m.layer for m in mlps) + 1) if model.table.has_weight("W_O", layer))
    shape = (len(layers), n_heads)
    found = {name: torch.zeros(shape, dtype=torch.float64) for name in ("score", "diagonal", "direction")}
    outs = _outputs(model, given, layers)
    sites = {mlp.layer: Site(Part.RESID_MID, mlp.layer) for mlp in mlps}
    streams = at_last(model, given, list(sites.values()))
    for positive in (False, True):
        rows = given.label == positive
        channels = _strongest(mlps, chosen, positive, n_channel)
        for row, layer in enumerate(layers):
            later = [(mlp, ids) for mlp, ids in channels if mlp.layer >= layer]
            n_neurons = sum(len(ids) for _, ids in later)
            fixed = _from_weights(model, layer)
            for mlp, ids in later:
                act, share = activation(model, mlp.layer), len(ids) / n_neurons / 2
                readers = {name: vectors[ids] for name, vectors in mlp.readers.items()}
                size = norm_size(model, streams[sites[mlp.layer]][rows], mlp.layer)
                for head in range(n_heads):
                    out = outs[layer][rows, head] / size[:, None]
                    found["score"][row, head] += share * float(channel(out, readers, act).mean())
                    if fixed is not None:
                        diagonal, direction = fixed[0][head : head + 1], fixed[1][head : head + 1]
                        found["diagonal"][row, head] += share * float(channel(diagonal, readers, act))
                        both = channel(torch.cat([direction, -direction]), readers, act)
                        found["direction"][row, head] += share * float(both.max())
    return HeadTable(
        layers=layers,
        attention=attention_to(model, given, layers),
        score=found["score"],
        score_diagonal=found["diagonal"],
        score_direction=found["direction"],
    )


def _strongest(
    mlps: Sequence[Mlp], chosen: Sequence[Chosen], positive: bool, n: int
) -> list[tuple[Mlp, Int[Tensor, " few"]]]:
    """The n neurons of a class with the largest cosines, by layer."""
    mine = [item for item in chosen if item.positive == positive]
    every = torch.cat([item.cosines for item in mine])
    least = every.topk(min(n, len(every))).values[-1]
    by_layer = {mlp.layer: mlp for mlp in mlps}
    kept = [(by_layer[item.layer], item.neurons[item.cosines >= least]) for item in mine]
    return [(mlp, ids) for mlp, ids in kept if len(ids)]


def _outputs(
    model: LoadedModel, given: Prompts, layers: Sequence[int]
) -> dict[int, Float[Tensor, "prompt head d_model"]]:
    """What each head adds to the stream at the last token, up to the scale of a norm after the sublayer."""
    sites = {layer: Site(Part.Z, layer) for layer in layers}
    z = at_last(model, given, list(sites.values()))
    found: dict[int, Tensor] = {}
    for layer in layers:
        out = torch.einsum("bhi,hid->bhd", z[sites[layer]], output_weights(model, layer))
        found[layer] = fold_after(model, Part.ATTN_OUT, layer)(out)
    return found


def _from_weights(
    model: LoadedModel, layer: int
) -> tuple[Float[Tensor, "head d_model"], Float[Tensor, "head d_model"]] | None:
    """Diagonal of W_V W_O, and its strongest output direction, each of the norm's size 1."""
    if not can_copy(model, layer):
        return None
    w_v, w_o = value_weights(model, layer), output_weights(model, layer)
    diagonal = torch.einsum("hdi,hid->hd", w_v, w_o)
    directions: list[Tensor] = []
    for v, o in zip(w_v, w_o, strict=True):
        r = torch.linalg.qr(v).R
        directions.append(torch.linalg.svd(r @ o, full_matrices=False)[2][0])
    size = diagonal.shape[1] ** 0.5
    unit = torch.nn.functional.normalize
    return unit(diagonal, dim=1) * size, torch.stack(directions) * size


def rivals(table: HeadTable, top: Sequence[Head], n_draws: int, seed: int) -> list[list[Head]]:
    """Random sets of heads, each the stand-in of one of the top ones: among the 5 nearest to it in attention."""
    heads = [(layer, head) for layer in table.layers for head in range(table.attention.shape[1])]
    generator = torch_generator(seed, "rival heads")
    made: list[list[Head]] = []
    for _ in range(n_draws):
        taken: list[Head] = []
        for head in top:
            mass = float(table.attention[table.place(head)])
            free = [other for other in heads if other not in top and other not in taken]
            near = sorted(free, key=lambda h: abs(float(table.attention[table.place(h)]) - mass))[:5]
            if near:
                taken.append(near[int(torch.randint(len(near), (1,), generator=generator))])
        made.append(taken)
    return made
