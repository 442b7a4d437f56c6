"""How are transcoder features wired: by the weights alone, and on one prompt?

Input-invariant (weights alone), with e_j the encoder row seen through the gain w of the norm it reads behind:
    connection  c_ij = W_dec[i] . e_j           de-embedding  W_E e_j, through a head W_E W_V W_O e_j
On a prompt, any direction v read from the stream at a position is the sum of what was written there before:
    v . resid = v . embed + sum of features, errors, straight paths at this position + sum over heads and sources s of
                A[t, s] (x_s W_V W_O) . v
`sources` lists these terms; `paths` follows the largest ones back through heads and features, several steps. A score of
attention is a direction too: with the query fixed, its gradient at the key's input says what the key is read from
(`score_sources`).
Paper: J. Dunefsky et al. 2024, https://arxiv.org/abs/2406.11944.
Traps: a connection is an effect per unit of activation and norm scale, not an effect on any input; features that never
fire together may be strongly connected. Through attention, the pattern itself is taken as given.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.transcoder_graph_frozen import Frozen, freeze
from interp.circuits.transcoder_graph_layers import Active, Replacement, Stand, activate, to_stream, written
from interp.circuits.transcoder_graph_norms import norm_form
from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.models.model import LoadedModel

COLUMNS = ["kind", "layer", "head", "pos", "number", "value"]


def stand_of(replaced: Replacement, layer: int) -> Stand:
    """The stand-in of a layer."""
    if layer not in replaced.of_layer:
        raise InterpError(f"layer {layer} has no transcoder; layers with one: {sorted(replaced.of_layer)}")
    return replaced.of_layer[layer]


def through_norm(model: LoadedModel, site: Site, v: Float[Tensor, "d_model *n"]) -> Float[Tensor, "d_model *n"]:
    """A direction read behind a norm, as one of the stream before it, without the scale of any input."""
    reach = model.table.reach(site)
    if reach.side == "input":
        return v
    w, centred, _ = norm_form(model.module.get_submodule(reach.path), v.flatten(1)[:, 0] if v.ndim > 1 else v)
    out = v * (w[:, None] if v.ndim > 1 else w)
    return out - out.mean(0) if centred else out


def encoder_rows(model: LoadedModel, stand: Stand, numbers: Tensor | None = None) -> Float[Tensor, "d_model feature"]:
    """e_j of some features (of all by default) as directions of the stream."""
    e = stand.dictionary.W_enc.detach()
    e = e if numbers is None else e[:, numbers]
    return through_norm(model, Site(Part.MLP_IN, stand.layer), e) if stand.read == "mlp_in" else e


@torch.no_grad()
def connections(model: LoadedModel, replaced: Replacement, source: int, target: int) -> Float[Tensor, "source target"]:
    """c_ij from all features of one layer to all of a later one: d_dict^2 numbers."""
    a, b = stand_of(replaced, source), stand_of(replaced, target)
    if source >= target:
        raise InterpError(f"features of layer {source} write after layer {target} has read; give a later target")
    e = encoder_rows(model, b)
    total = torch.zeros(a.dictionary.d_dict, b.dictionary.d_dict, dtype=e.dtype)
    for layer in a.writes:
        if layer < target:
            total += a.dictionary.W_dec.detach()[:, a.block(layer)] @ e
    return total


@torch.no_grad()
def strongest(model: LoadedModel, replaced: Replacement, layer: int, number: int, *, k: int = 10) -> pd.DataFrame:
    """The strongest connections into a feature: value, and in units of the spread over the source layer (z)."""
    target = stand_of(replaced, layer)
    e = encoder_rows(model, target, torch.tensor([number]))[:, 0]
    rows: list[tuple[int, int, float, float]] = []
    for source in (own for own in replaced.stands if own.layer < layer):
        blocks = [source.block(at) for at in source.writes if at < layer]
        c = sum((source.dictionary.W_dec.detach()[:, block] @ e for block in blocks), e.new_zeros(()))
        z = (c - c.mean()) / c.std().clamp_min(1e-30)
        best = z.abs().topk(min(k, len(z))).indices
        rows += [(source.layer, int(i), float(c[i]), float(z[i])) for i in best]
    rows.sort(key=lambda row: -abs(row[3]))
    return pd.DataFrame(rows[:k], columns=["layer", "number", "connection", "z"])


@torch.no_grad()
def de_embedding(
    model: LoadedModel, replaced: Replacement, layer: int, number: int, *, head: tuple[int, int] | None = None,
) -> Float[Tensor, " vocab"]:  # fmt: skip
    """How much each token's embedding drives a feature directly, or through one head (layer, head) below it."""
    e = encoder_rows(model, stand_of(replaced, layer), torch.tensor([number]))[:, 0]
    W_E = model.weight("W_E").detach().to(e)
    if head is None:
        return W_E @ e
    at, own = head
    if not 0 <= at <= layer:
        raise InterpError(f"head {own} of layer {at} does not write before the MLP of layer {layer}")
    W_O = model.weight("W_O", at).detach().to(e)
    if not 0 <= own < len(W_O):
        raise InterpError(f"layer {at} has heads 0 to {len(W_O) - 1}, not {own}")
    d_head, per = W_O.shape[1], len(W_O) // (model.dims.n_kv_heads or len(W_O))
    group = slice(own // per * d_head, (own // per + 1) * d_head)
    W_V = model.weight("W_V", at).detach().to(e)[:, group]
    return W_E @ through_norm(model, Site(Part.ATTN_IN, at), W_V @ (W_O[own] @ e))


@torch.no_grad()
def promoted(model: LoadedModel, replaced: Replacement, layer: int, number: int) -> Float[Tensor, " vocab"]:
    """What a feature adds to each logit directly, per unit and before the final norm's scale, mean over tokens 0."""
    stand = stand_of(replaced, layer)
    d = stand.dictionary.W_dec.detach()[number].unflatten(0, (-1, stand.d_model)).sum(0)
    U = through_norm(model, Site(Part.FINAL_NORM), model.weight("W_U").detach().to(d))
    scores = d @ U
    return scores - scores.mean()


@torch.no_grad()
def sources(
    frozen: Frozen, replaced: Replacement, active: Active, v: Float[Tensor, " d_model"], layer: int, pos: int, *,
    mid: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Everything that adds to v . stream at a position, at resid_mid of a layer (or at its resid_pre, `mid=False`)."""
    rows: list[tuple[str, int, int, int, int, float]] = [
        ("token", -1, -1, pos, int(frozen.tokens[pos]), float(v @ frozen.embed[pos])),
        ("position", -1, -1, pos, -1, float(v @ frozen.positions[pos])),
    ]
    for at in range(layer):
        explained = v.new_zeros(())
        for index, vectors in written(replaced, active, at):
            here = index[active.pos[index] == pos]
            values = vectors[active.pos[index] == pos] @ v
            rows += [
                ("feature", int(active.layer[i]), -1, pos, int(active.number[i]), float(value))
                for i, value in zip(here, values, strict=True)
            ]
            explained = explained + values.sum()
        error = active.errors[at, pos] @ v
        rows.append(("error", at, -1, pos, -1, float(error)))
        rows.append(("straight", at, -1, pos, -1, float(frozen.layers[at].mlp_out[pos] @ v - explained - error)))
    for at in range(layer + 1 if mid else layer):
        rows += _heads(frozen, at, v, pos)
    merged: dict[tuple[str, int, int, int, int], float] = {}
    for *name, value in rows:  # a cross-layer feature writes several times
        key = (str(name[0]), int(name[1]), int(name[2]), int(name[3]), int(name[4]))
        merged[key] = merged.get(key, 0.0) + value
    return pd.DataFrame([(*name, value) for name, value in merged.items()], columns=COLUMNS)


def _heads(frozen: Frozen, at: int, v: Tensor, pos: int) -> list[tuple[str, int, int, int, int, float]]:
    own = frozen.layers[at]
    raw = own.after_attn.pull_at(v[None], torch.tensor([pos]))[0]
    z = own.W_O @ raw
    per = len(own.W_O) // len(own.values)
    values = torch.einsum("hpe,he->hp", own.values.repeat_interleave(per, dim=0), z) * own.pattern[:, pos]
    found = [
        ("head", at, head, source, -1, float(values[head, source]))
        for head in range(len(own.W_O))
        for source in range(pos + 1)
    ]
    rest = float(v @ (own.attn_out[pos])) - float(values[:, : pos + 1].sum())
    return [*found, ("bias", at, -1, pos, -1, rest)]


def feature_direction(
    frozen: Frozen, replaced: Replacement, layer: int, number: int, pos: int
) -> Float[Tensor, " d_model"]:
    """The direction of resid_mid that drives a feature at a position of this prompt."""
    stand = stand_of(replaced, layer)
    e = stand.dictionary.W_enc.detach()[:, number].to(frozen.embed.dtype)
    return to_stream(frozen, stand, e[None], torch.tensor([pos]))[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """A path so far: what it ends in, and the direction it reads there."""

    names: tuple[str, ...]
    value: float
    v: Tensor
    layer: int
    pos: int
    mid: bool


@torch.no_grad()
def paths(
    frozen: Frozen, replaced: Replacement, active: Active, target: tuple[int, int, int], *, depth: int = 2,
    branches: int = 5,
) -> pd.DataFrame:  # fmt: skip
    """Greedy paths into the feature `target` (layer, pos, number): the largest sources, each followed `depth` steps.

    A step through a head goes on with the direction it reads at its source position; one through a feature with the
    feature's own encoder row, scaled so that values stay shares of the target's pre-activation.
    """
    layer, pos, number = target
    v = feature_direction(frozen, replaced, layer, number, pos)
    open_: list[_Step] = [_Step(names=(f"f{layer}.{number}@{pos}",), value=1.0, v=v, layer=layer, pos=pos, mid=True)]
    rows: list[tuple[int, str, float]] = []
    for step in range(1, depth + 1):
        longer: list[_Step] = []
        for path in open_:
            table = sources(frozen, replaced, active, path.v, path.layer, path.pos, mid=path.mid)
            for record in sorted(table.to_dict("records"), key=lambda row: -abs(row["value"]))[:branches]:
                name = _name(record)
                value = float(record["value"])
                rows.append((step, " <- ".join([*path.names, name]), value))
                following = _follow(frozen, replaced, active, path, record)
                if following is not None:
                    longer.append(following)
        open_ = sorted(longer, key=lambda path: -abs(path.value))[:branches]
    return pd.DataFrame(rows, columns=["steps", "path", "value"])


def _name(record: dict[str, object]) -> str:
    kind, layer, head, pos, number = (record[name] for name in COLUMNS[:-1])
    if kind == "feature":
        return f"f{layer}.{number}@{pos}"
    return f"a{layer}.h{head}@{pos}" if kind == "head" else f"{kind}@{pos}" if layer == -1 else f"{kind}{layer}@{pos}"


def _follow(
    frozen: Frozen, replaced: Replacement, active: Active, path: _Step, record: dict[str, object]
) -> _Step | None:
    kind, layer, head, pos, number = (record[name] for name in COLUMNS[:-1])
    assert isinstance(layer, int) and isinstance(head, int) and isinstance(pos, int) and isinstance(number, int)
    value = float(str(record["value"]))
    names = (*path.names, _name(record))
    if kind == "head":
        own = frozen.layers[layer]
        raw = own.after_attn.pull_at(path.v[None], torch.tensor([path.pos]))[0]
        per, d_head = len(own.W_O) // len(own.values), own.W_O.shape[1]
        group = slice(head // per * d_head, (head // per + 1) * d_head)
        v = own.W_V[:, group] @ (own.W_O[head] @ raw) * own.pattern[head, path.pos, pos]
        v = own.attn_norm.pull_at(v[None], torch.tensor([pos]))[0]
        return _Step(names=names, value=value, v=v, layer=layer, pos=pos, mid=False)
    if kind == "feature":
        here = (active.layer == layer) & (active.pos == pos) & (active.number == number)
        scale = value / float(active.value[here][0])
        v = feature_direction(frozen, replaced, layer, number, pos) * scale
        return _Step(names=names, value=value, v=v, layer=layer, pos=pos, mid=True)
    return None


def score_sources(
    model: LoadedModel, frozen: Frozen, replaced: Replacement, active: Active, head: tuple[int, int], query: int,
    key: int, *, side: str = "key",
) -> pd.DataFrame:  # fmt: skip
    """What the score of a head (layer, head) between two positions is read from, on the key's or the query's side.

    The other side is held fixed, so the score is linear in this one (to first order, where keys are normed).
    """
    layer, own = head
    if side not in ("key", "query") or query == key:
        raise InterpError(f"side={side!r} is 'key' or 'query', and query {query} differs from key {key}")
    sites = [Site(Part.ATTN_IN, layer), Site(Part.ATTN_SCORES, layer)]
    with capture(model, sites, grad=True) as acts:
        model(frozen.tokens[None])
        acts[sites[1]][0, own, query, key].backward()
    pos = key if side == "key" else query
    g = acts.grad(sites[0])[0, pos].to(frozen.embed)
    v = frozen.layers[layer].attn_norm.pull_at(g[None], torch.tensor([pos]))[0]
    return sources(frozen, replaced, active, v, layer, pos, mid=False)


@torch.no_grad()
def mean_attributions(
    model: LoadedModel, replaced: Replacement, rows: list[Tensor], source: int, target: int, number: int
) -> Float[Tensor, " source"]:
    """Mean over the tokens of prompts of z_i * d pre_j / d z_i along the stream: features of a layer to one feature."""
    a = stand_of(replaced, source)
    total, n = torch.zeros(a.dictionary.d_dict), 0
    for tokens in rows:
        frozen = freeze(model, tokens)
        active = activate(frozen, replaced)
        own = active.where(source)
        for pos in range(1, frozen.n_pos):
            v = feature_direction(frozen, replaced, target, number, pos)
            here = own[active.pos[own] == pos]
            blocks = [a.block(layer) for layer in a.writes if layer < target]
            for block in blocks:
                c = a.dictionary.W_dec.detach()[active.number[here], block].to(v.dtype) @ v
                total.index_add_(0, active.number[here], (c * active.value[here]).float())
        n += frozen.n_pos - 1
    return total / max(n, 1)
