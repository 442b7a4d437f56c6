"""Which dictionaries stand in for which MLPs, and what does each active feature read and write on a prompt?

    z_j = x^l . e_j + b_j ;  y_hat^l' = sum over l <= l' of f^l W_dec^(l -> l') + b_dec^l' [+ x^l W_skip]
    error^l = y^l - y_hat^l
One `Stand` per layer, reading mlp_in (or resid_mid) of its layer and writing mlp_out of its own layer, or of all later
ones too (a cross-layer transcoder). A layer without one is left to its error.
Traps: a transcoder must read the site it was trained on; at position 0 (massive activations) it usually was not, so
features there are left out and the error takes all of the MLP's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.circuits.transcoder_graph_frozen import Frozen
from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.dictionaries.cross_layer import CrossLayerTranscoder
from interp.dictionaries.dictionary import SparseDictionary

Read = Literal["mlp_in", "resid_mid"]
LINEAR_KINDS = ("relu", "jump_relu", "topk", "batch_topk", "group_max", "top_afa", "gradient_topk")
"""Activations whose codes are the pre-activations themselves wherever a feature is active."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stand:
    """One dictionary, scales folded in."""

    layer: int
    read: Read
    dictionary: SparseDictionary
    writes: tuple[int, ...]
    """Layers whose mlp_out it writes, its own first."""

    @property
    def d_model(self) -> int:
        return self.dictionary.d_out // len(self.writes)

    def block(self, layer: int) -> slice:
        """Columns of the decoder that belong to a written layer."""
        start = self.writes.index(layer) * self.d_model
        return slice(start, start + self.d_model)

    def bias(self, dtype: torch.dtype) -> Float[Tensor, " d_dict"]:
        """z = x . e + bias, also where the dictionary subtracts b_dec first."""
        own = self.dictionary
        b = own.b_enc.detach().to(dtype)
        return b - own.b_dec.detach().to(dtype) @ own.W_enc.detach().to(dtype) if own.subtract_b_dec else b


@dataclass(frozen=True, kw_only=True, eq=False)
class Replacement:
    """What stands in for the MLPs."""

    stands: tuple[Stand, ...]

    @property
    def of_layer(self) -> dict[int, Stand]:
        return {stand.layer: stand for stand in self.stands}

    def writers(self, layer: int) -> list[Stand]:
        """Those that write to a layer."""
        return [stand for stand in self.stands if layer in stand.writes]


def replacement(
    what: Mapping[int, SparseDictionary] | CrossLayerTranscoder, *, read: Read = "mlp_in", first_layer: int = 0
) -> Replacement:
    """Transcoders by layer, or one cross-layer transcoder whose first layer is `first_layer`."""
    if read not in ("mlp_in", "resid_mid"):
        raise unknown("read", read, ("mlp_in", "resid_mid"))
    if isinstance(what, CrossLayerTranscoder):
        n = what.n_layers
        stands = [
            Stand(layer=first_layer + i, read=read, dictionary=_checked(part, first_layer + i),
                  writes=tuple(range(first_layer + i, first_layer + n)))
            for i, part in enumerate(what.parts)
        ]  # fmt: skip
    else:
        stands = [
            Stand(layer=layer, read=read, dictionary=_checked(own, layer), writes=(layer,))
            for layer, own in sorted(what.items())
        ]
    if not stands:
        raise InterpError("no transcoders were given; give one for at least one layer")
    return Replacement(stands=tuple(stands))


def _checked(dictionary: SparseDictionary, layer: int) -> SparseDictionary:
    if dictionary.token_norm != "none":
        raise InterpError(
            f"the transcoder of layer {layer} divides each token by its own {dictionary.token_norm}; edges would not "
            "be linear. Train one with token_norm='none'"
        )
    if dictionary.activation.kind not in LINEAR_KINDS:
        raise InterpError(
            f"the transcoder of layer {layer} is {dictionary.activation.kind}: its codes are no pre-activations; "
            f"attribution graphs take {', '.join(LINEAR_KINDS)}"
        )
    plain = bool((dictionary.scale_in == 1).all()) and bool((dictionary.scale_out == 1).all())
    folded = dictionary if plain else dictionary.folded().requires_grad_(False)
    return folded if folded.W_enc.device.type == "cpu" else folded.like().cpu()


@dataclass(frozen=True, kw_only=True, eq=False)
class Active:
    """The active features of a prompt, by layer, then position, then number; and what they leave unexplained."""

    layer: Int[Tensor, " feature"]
    pos: Int[Tensor, " feature"]
    number: Int[Tensor, " feature"]
    value: Float[Tensor, " feature"]
    pre: Float[Tensor, " feature"]
    """Pre-activation, measured on the model's own activations."""
    bias: Float[Tensor, " feature"]
    """The part of `pre` that is the feature's own bias."""
    errors: Float[Tensor, "layer pos d_model"]
    constants: Float[Tensor, "layer pos d_model"]
    """What the stand-ins write when no feature is active: biases, skip paths at 0."""

    def __len__(self) -> int:
        return len(self.layer)

    def where(self, layer: int) -> Tensor:
        """Numbers of the features of a layer."""
        return (self.layer == layer).nonzero().flatten()


@torch.no_grad()
def activate(frozen: Frozen, replaced: Replacement, *, skip_first: int = 1) -> Active:
    """Encode the prompt. The first `skip_first` positions have no features; their errors are whole MLP outputs."""
    dtype, n_pos, n_layers = frozen.embed.dtype, frozen.n_pos, frozen.n_layers
    errors = torch.stack([layer.mlp_out for layer in frozen.layers])
    constants = torch.zeros_like(errors)
    parts: list[dict[str, Tensor]] = []
    for stand in replaced.stands:
        _check_fits(stand, frozen)
        x = read_by(frozen, stand)
        own = stand.dictionary
        f = own.encode(x.to(own.W_enc.dtype)).dense().to(dtype)
        f[:skip_first] = 0
        pos, number = f.nonzero(as_tuple=True)
        e = own.W_enc.detach().to(dtype)[:, number]
        bias = stand.bias(dtype)[number]
        parts.append({"layer": torch.full_like(pos, stand.layer), "pos": pos, "number": number, "value": f[pos, number],
                      "pre": (x[pos] * e.T).sum(1) + bias, "bias": bias})  # fmt: skip
        for layer in stand.writes:
            columns = stand.block(layer)
            errors[layer] -= f @ own.W_dec.detach().to(dtype)[:, columns]
            errors[layer] -= own.b_dec.detach().to(dtype)[columns]
            constants[layer] += own.b_dec.detach().to(dtype)[columns]
            if own.W_skip is not None:
                W = own.W_skip.detach().to(dtype)[:, columns]
                errors[layer] -= x @ W
                constants[layer] += read_shift(frozen, stand) @ W
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert errors.shape == (n_layers, n_pos, frozen.embed.shape[1])
    return Active(**joined, errors=errors, constants=constants)


def only(active: Active, replaced: Replacement, keep: Sequence[tuple[int, ...]]) -> Active:
    """Some of the active features, as (layer, pos, number); what the others write is added to the errors."""
    wanted = set(keep)
    names = zip(active.layer.tolist(), active.pos.tolist(), active.number.tolist(), strict=True)
    stays = torch.tensor([name in wanted for name in names], dtype=torch.bool)
    errors = active.errors.clone()
    for layer in range(len(errors)):
        for index, vectors in written(replaced, active, layer):
            gone = ~stays[index]
            errors[layer].index_add_(0, active.pos[index][gone], vectors[gone])
    parts = ("layer", "pos", "number", "value", "pre", "bias")
    return replace(active, errors=errors, **{name: getattr(active, name)[stays] for name in parts})


@torch.no_grad()
def shuffled_decoders(replaced: Replacement, *, seed: int) -> Replacement:
    """The same encoders, rows of each decoder exchanged between features: a control."""
    stands: list[Stand] = []
    for stand in replaced.stands:
        own = stand.dictionary.like()
        order = torch.randperm(own.d_dict, generator=torch_generator(seed, "exchange", stand.layer))
        own.W_dec.copy_(own.W_dec[order].clone())
        stands.append(replace(stand, dictionary=own))
    return Replacement(stands=tuple(stands))


def read_by(frozen: Frozen, stand: Stand) -> Float[Tensor, "pos d_model"]:
    """What a stand-in reads."""
    layer = frozen.layers[stand.layer]
    return layer.mlp_in if stand.read == "mlp_in" else layer.resid_mid


def read_shift(frozen: Frozen, stand: Stand) -> Float[Tensor, " d_model"]:
    """What a stand-in reads where the stream is 0: the shift of a layer norm."""
    layer = frozen.layers[stand.layer]
    return layer.mlp_norm.shift if stand.read == "mlp_in" else torch.zeros_like(layer.mlp_norm.shift)


def to_stream(frozen: Frozen, stand: Stand, v: Float[Tensor, "row d_model"], pos: Tensor) -> Float[Tensor, "row d"]:
    """A direction at the site a stand-in reads, as a direction at resid_mid of its layer."""
    return frozen.layers[stand.layer].mlp_norm.pull_at(v, pos) if stand.read == "mlp_in" else v


def skip_path(frozen: Frozen, replaced: Replacement, seen: dict[int, Tensor], layer: int, g: Tensor) -> Tensor | None:
    """Gradient at resid_mid of `layer` through the linear paths of its stand-in; `seen` collects g at each mlp_out."""
    stand = replaced.of_layer.get(layer)
    seen[layer] = g
    if stand is None or stand.dictionary.W_skip is None:
        return None
    W = stand.dictionary.W_skip.detach().to(g.dtype)
    total = sum((seen[at] @ W[:, stand.block(at)].T for at in stand.writes if at in seen), torch.zeros_like(g))
    return frozen.layers[layer].mlp_norm.pull(total) if stand.read == "mlp_in" else total


def written(
    replaced: Replacement, active: Active, layer: int
) -> Iterator[tuple[Int[Tensor, " some"], Float[Tensor, "some d_model"]]]:
    """For each stand-in that writes to a layer: its active features and what each adds to mlp_out there."""
    dtype = active.value.dtype
    for stand in replaced.writers(layer):
        index = active.where(stand.layer)
        if len(index):
            rows = stand.dictionary.W_dec.detach()[active.number[index], stand.block(layer)].to(dtype)
            yield index, rows * active.value[index, None]


def _check_fits(stand: Stand, frozen: Frozen) -> None:
    d_model = frozen.embed.shape[1]
    if stand.dictionary.d_in != d_model or stand.d_model != d_model:
        raise InterpError(
            f"the transcoder of layer {stand.layer} reads {stand.dictionary.d_in} and writes {stand.d_model} numbers, "
            f"the model's stream has {d_model}"
        )
    outside: Sequence[int] = [layer for layer in stand.writes if not 0 <= layer < frozen.n_layers]
    if outside:
        raise InterpError(f"a transcoder of layer {outside[0]}, but the model has layers 0 to {frozen.n_layers - 1}")
