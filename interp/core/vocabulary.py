"""The vocabulary of sites: one word for each thing a gated network computes.

`PARTS` says for each its meaning, its axes and its side of the non-linearity, in the order in which a block computes
them. Sizes of axes are a model's own; `...` stands for any further axes. A table, and long for that reason alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a site holds. The text of a member is what users type."""

    EMBED = "embed"
    RESID_PRE = "resid_pre"
    RESID_MID = "resid_mid"
    RESID_POST = "resid_post"
    ATTN_IN = "attn_in"
    Q_LATENT = "q_latent"
    KV_LATENT = "kv_latent"
    K_ROTARY = "k_rotary"
    Q = "q"
    K = "k"
    V = "v"
    ATTN_SCORES = "attn_scores"
    PATTERN = "pattern"
    ATTN_GATE_PRE = "attn_gate_pre"
    ATTN_GATE = "attn_gate"
    Z = "z"
    CONV_IN = "conv_in"
    MIXER_IN = "mixer_in"
    STATE_IN = "state_in"
    STATE_OUT = "state_out"
    RECURRENCE_GATE_PRE = "recurrence_gate_pre"
    RECURRENCE_GATE = "recurrence_gate"
    DECAY_PRE = "decay_pre"
    DECAY = "decay"
    LOG_DECAY = "log_decay"
    TIME_DECAY = "time_decay"
    STEP_LATENT = "step_latent"
    STEP_SIZE_PRE = "step_size_pre"
    STEP_SIZE = "step_size"
    WRITE_GATE_PRE = "write_gate_pre"
    WRITE_GATE = "write_gate"
    INPUT_GATE_PRE = "input_gate_pre"
    INPUT_GATE = "input_gate"
    FORGET_GATE_PRE = "forget_gate_pre"
    FORGET_GATE = "forget_gate"
    RESET_GATE = "reset_gate"
    UPDATE_GATE = "update_gate"
    CELL_INPUT = "cell_input"
    CELL = "cell"
    OUTPUT_GATE_PRE = "output_gate_pre"
    OUTPUT_GATE = "output_gate"
    HIDDEN = "hidden"
    READOUT = "readout"
    MIXER_OUT = "mixer_out"
    RECEPTANCE_PRE = "receptance_pre"
    RECEPTANCE = "receptance"
    CHANNEL_RECEPTANCE_PRE = "channel_receptance_pre"
    CHANNEL_RECEPTANCE = "channel_receptance"
    ATTN_OUT = "attn_out"
    MLP_IN = "mlp_in"
    GATE_PRE = "gate_pre"
    GATE = "gate"
    UP = "up"
    NEURONS_PRE = "neurons_pre"
    NEURONS = "neurons"
    ROUTER_LOGITS = "router_logits"
    ROUTER_EXPERTS = "router_experts"
    ROUTER_WEIGHTS = "router_weights"
    EXPERT_GATE_PRE = "expert_gate_pre"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_NEURONS = "expert_neurons"
    EXPERT_OUT = "expert_out"
    ROUTED_OUT = "routed_out"
    SHARED_GATE_PRE = "shared_gate_pre"
    SHARED_GATE = "shared_gate"
    SHARED_UP = "shared_up"
    SHARED_NEURONS = "shared_neurons"
    SHARED_WEIGHT_PRE = "shared_weight_pre"
    SHARED_WEIGHT = "shared_weight"
    SHARED_OUT = "shared_out"
    MLP_OUT = "mlp_out"
    FINAL_NORM = "final_norm"
    LOGITS_PRE = "logits_pre"
    LOGITS = "logits"
    CLASS_LOGITS = "class_logits"
    SE_GATE_PRE = "se_gate_pre"
    SE_GATE = "se_gate"
    POSITION_GATE_PRE = "position_gate_pre"
    POSITION_GATE = "position_gate"
    SPATIAL_GATE = "spatial_gate"
    SKIP_GATE = "skip_gate"
    RESIDUAL_GATE = "residual_gate"
    EXIT_GATE = "exit_gate"
    ROUTING = "routing"
    MODALITY_GATE = "modality_gate"
    MODULE = "module"


@dataclass(frozen=True)
class PartInfo:
    """One row of the vocabulary."""

    meaning: str
    axes: tuple[str, ...]
    """Axis names in order; sizes come from the model's `Dims`."""
    side: str
    """`pre` or `post` the non-linearity it belongs to, `linear` where there is none."""
    lens: str | None
    """TransformerLens name, with `{layer}` where there is one."""
    words: tuple[str, ...] = ()
    """Other engines' words for the same point."""
    per_layer: bool = True


_RESID = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_KV = ("batch", "pos", "kv_head", "d_head")
_MLP = ("batch", "pos", "d_mlp")
_EXPERTS = ("batch", "pos", "expert")
_SLOTS = ("batch", "pos", "slot", "d_expert")
_SHARED = ("batch", "pos", "d_shared")
_ONE = ("batch", "pos", "one")
_INNER = ("batch", "pos", "d_inner")
_STATE = ("batch", "pos", "...")
_CELL = ("batch", "pos", "d_hidden")
_IMAGE = ("batch", "channel", "height", "width")
_PAIRS = ("batch", "head", "query", "key")

PARTS: dict[Part, PartInfo] = {
    Part.EMBED: PartInfo("token embeddings, without positions", _RESID, "linear", "hook_embed", per_layer=False),
    Part.RESID_PRE: PartInfo("residual stream entering the block", _RESID, "linear", "blocks.{layer}.hook_resid_pre"),
    Part.ATTN_IN: PartInfo("normed input of attention, or of the recurrence in its place", _RESID, "linear", None),
    Part.Q_LATENT: PartInfo("compressed queries, normed", ("batch", "pos", "d_q_latent"), "linear", None),
    Part.KV_LATENT: PartInfo(
        "compressed keys and values, normed: what the cache holds", ("batch", "pos", "d_latent"), "linear", None
    ),
    Part.K_ROTARY: PartInfo(
        "the part of the keys that all heads share, before rotary embedding",
        ("batch", "pos", "d_rotary"),
        "linear",
        None,
    ),
    Part.Q: PartInfo("queries, before rotary embedding", _HEADS, "linear", "blocks.{layer}.attn.hook_q"),
    Part.K: PartInfo("keys, before rotary embedding", _KV, "linear", "blocks.{layer}.attn.hook_k"),
    Part.V: PartInfo("values", _KV, "linear", "blocks.{layer}.attn.hook_v"),
    Part.ATTN_SCORES: PartInfo(
        "masked attention scores, before the softmax", _PAIRS, "pre", "blocks.{layer}.attn.hook_attn_scores"
    ),
    Part.PATTERN: PartInfo(
        "attention weights, rows sum to 1 where no sink takes a share",
        _PAIRS,
        "post",
        "blocks.{layer}.attn.hook_pattern",
    ),
    Part.Z: PartInfo("head outputs before W_O", _HEADS, "linear", "blocks.{layer}.attn.hook_z"),
    Part.ATTN_GATE_PRE: PartInfo("attention's output gate, before its sigmoid", _HEADS, "pre", None),
    Part.ATTN_GATE: PartInfo("attention's output gate: what head outputs are multiplied with", _HEADS, "post", None),
    Part.CONV_IN: PartInfo("what enters the short convolution before the recurrence", _INNER, "linear", None),
    Part.MIXER_IN: PartInfo("what enters the recurrence, after the convolution", _INNER, "post", None),
    Part.STATE_IN: PartInfo("B of a state space: how the input enters the state", _STATE, "linear", None, ("ssm_b",)),
    Part.STATE_OUT: PartInfo("C of a state space: how the state is read", _STATE, "linear", None, ("ssm_c",)),
    Part.RECURRENCE_GATE_PRE: PartInfo("gate on the decay's exponent, before its sigmoid", _CELL, "pre", None),
    Part.RECURRENCE_GATE: PartInfo("gate on the decay's exponent: 0 keeps the state (RG-LRU)", _CELL, "post", None),
    Part.DECAY_PRE: PartInfo("decay of the recurrence, before its non-linearity", _STATE, "pre", None),
    Part.TIME_DECAY: PartInfo("parameter w of a decay exp(-exp(w))", ("d_inner",), "pre", None),
    Part.LOG_DECAY: PartInfo("logarithm of the decay, at most 0", _STATE, "post", None),
    Part.DECAY: PartInfo("factor in (0, 1] by which the state is kept", _STATE, "post", None),
    Part.STEP_LATENT: PartInfo(
        "step size in low rank, before it is expanded", ("batch", "pos", "d_step"), "linear", None
    ),
    Part.STEP_SIZE_PRE: PartInfo("step size of a state space, before the softplus", _INNER, "pre", None),
    Part.STEP_SIZE: PartInfo("step size (delta) of a state space", _INNER, "post", None),
    Part.WRITE_GATE_PRE: PartInfo("strength of writing to the state, before its sigmoid", _STATE, "pre", None),
    Part.WRITE_GATE: PartInfo("strength of writing to the state (beta)", _STATE, "post", None),
    Part.INPUT_GATE_PRE: PartInfo("input gate, before its non-linearity", _CELL, "pre", None),
    Part.INPUT_GATE: PartInfo("input gate: how much of the new value enters", _CELL, "post", None),
    Part.FORGET_GATE_PRE: PartInfo("forget gate, before its non-linearity", _CELL, "pre", None),
    Part.FORGET_GATE: PartInfo("forget gate: how much of the state is kept", _CELL, "post", None),
    Part.RESET_GATE: PartInfo("reset gate: how much of the past the new value sees", _CELL, "post", None),
    Part.UPDATE_GATE: PartInfo("update gate: how much of the past is kept", _CELL, "post", None),
    Part.CELL_INPUT: PartInfo("new value offered to the state", _CELL, "post", None),
    Part.CELL: PartInfo("cell state after the step", _CELL, "linear", None),
    Part.OUTPUT_GATE_PRE: PartInfo("output gate, before its non-linearity", _CELL, "pre", None),
    Part.OUTPUT_GATE: PartInfo("output gate: what leaves the recurrence is multiplied with it", _CELL, "post", None),
    Part.HIDDEN: PartInfo("hidden state after the step", _CELL, "post", None),
    Part.READOUT: PartInfo("what is read from the state, before the output gate", _STATE, "linear", None),
    Part.MIXER_OUT: PartInfo("input of the recurrence's output projection", _INNER, "linear", None),
    Part.RECEPTANCE_PRE: PartInfo("receptance, before its sigmoid", _INNER, "pre", None),
    Part.RECEPTANCE: PartInfo("receptance: the gate on what is read from the past", _INNER, "post", None),
    Part.ATTN_OUT: PartInfo(
        "what attention, or the recurrence in its place, adds to the stream",
        _RESID,
        "linear",
        "blocks.{layer}.hook_attn_out",
    ),
    Part.RESID_MID: PartInfo(
        "residual stream between attention and MLP", _RESID, "linear", "blocks.{layer}.hook_resid_mid"
    ),
    Part.MLP_IN: PartInfo("normed input of the MLP", _RESID, "linear", None),
    Part.GATE_PRE: PartInfo(
        "x @ W_gate, before the gate's non-linearity", _MLP, "pre", "blocks.{layer}.mlp.hook_pre", ("mlp_pre",)
    ),
    Part.GATE: PartInfo("act(gate_pre)", _MLP, "post", None),
    Part.UP: PartInfo(
        "x @ W_up, the ungated branch", _MLP, "linear", "blocks.{layer}.mlp.hook_pre_linear", ("mlp_pre_linear",)
    ),
    Part.NEURONS_PRE: PartInfo("x @ W_in of an ungated MLP", _MLP, "pre", "blocks.{layer}.mlp.hook_pre", ("mlp_pre",)),
    Part.NEURONS: PartInfo(
        "input of W_down: gate * up, or act(neurons_pre) where nothing is gated",
        _MLP,
        "post",
        "blocks.{layer}.mlp.hook_post",
        ("mlp_act",),
    ),
    Part.ROUTER_LOGITS: PartInfo("scores of all experts; the choice follows an edit", _EXPERTS, "pre", None),
    Part.ROUTER_EXPERTS: PartInfo("numbers of the chosen experts", ("batch", "pos", "slot"), "post", None),
    Part.ROUTER_WEIGHTS: PartInfo("weight of every expert, 0 where it was not chosen", _EXPERTS, "post", None),
    Part.EXPERT_GATE_PRE: PartInfo("x @ W_gate of each chosen expert", _SLOTS, "pre", None),
    Part.EXPERT_GATE: PartInfo("act(expert_gate_pre)", _SLOTS, "post", None),
    Part.EXPERT_UP: PartInfo("x @ W_up of each chosen expert", _SLOTS, "linear", None),
    Part.EXPERT_NEURONS: PartInfo("expert_gate * expert_up, the input of the expert's W_down", _SLOTS, "post", None),
    Part.EXPERT_OUT: PartInfo(
        "what each chosen expert returns, before its weight", ("batch", "pos", "slot", "d_model"), "linear", None
    ),
    Part.ROUTED_OUT: PartInfo("weighted sum over the chosen experts", _RESID, "linear", None),
    Part.SHARED_GATE_PRE: PartInfo("gate_pre of the shared expert", _SHARED, "pre", None),
    Part.SHARED_GATE: PartInfo("act(shared_gate_pre)", _SHARED, "post", None),
    Part.SHARED_UP: PartInfo("x @ W_up of the shared expert", _SHARED, "linear", None),
    Part.SHARED_NEURONS: PartInfo("shared_gate * shared_up", _SHARED, "post", None),
    Part.SHARED_WEIGHT_PRE: PartInfo("gate on the shared expert, before its sigmoid", _ONE, "pre", None),
    Part.SHARED_WEIGHT: PartInfo("gate on the shared expert: what its output is multiplied with", _ONE, "post", None),
    Part.CHANNEL_RECEPTANCE_PRE: PartInfo("receptance of the channel mix, before its sigmoid", _RESID, "pre", None),
    Part.CHANNEL_RECEPTANCE: PartInfo(
        "receptance of the channel mix: the gate on what it returns", _RESID, "post", None
    ),
    Part.SHARED_OUT: PartInfo("what the shared expert returns, before its gate", _RESID, "linear", None),
    Part.MLP_OUT: PartInfo("what the MLP adds to the stream", _RESID, "linear", "blocks.{layer}.hook_mlp_out"),
    Part.RESID_POST: PartInfo("residual stream leaving the block", _RESID, "linear", "blocks.{layer}.hook_resid_post"),
    Part.FINAL_NORM: PartInfo("normed stream the unembedding reads", _RESID, "linear", None, per_layer=False),
    Part.LOGITS_PRE: PartInfo(
        "final_norm @ W_U, before the soft cap of the logits", ("batch", "pos", "d_vocab"), "pre", None, per_layer=False
    ),
    Part.LOGITS: PartInfo("next-token logits", ("batch", "pos", "d_vocab"), "linear", None, per_layer=False),
    Part.CLASS_LOGITS: PartInfo("class scores", ("batch", "class"), "linear", None, per_layer=False),
    Part.SE_GATE_PRE: PartInfo("squeeze-and-excitation gate, before its non-linearity", _IMAGE, "pre", None),
    Part.SE_GATE: PartInfo("squeeze-and-excitation gate: a factor for each channel", _IMAGE, "post", None),
    Part.POSITION_GATE_PRE: PartInfo("share of positional attention, before its sigmoid", ("head",), "pre", None),
    Part.POSITION_GATE: PartInfo("share of positional attention, per head", ("head",), "post", None),
    Part.SPATIAL_GATE: PartInfo("spatial gate of a gMLP block", ("batch", "pos", "channel"), "linear", None),
    Part.SKIP_GATE: PartInfo("attention gate on a skip connection (U-Net)", _IMAGE, "post", None),
    Part.RESIDUAL_GATE: PartInfo("factor on what a residual branch adds", ("...",), "post", None),
    Part.EXIT_GATE: PartInfo("probability of leaving at this layer", ("batch", "..."), "post", None),
    Part.ROUTING: PartInfo("routing coefficients between capsules", ("batch", "in", "out", "..."), "post", None),
    Part.MODALITY_GATE: PartInfo("gate between modalities", ("batch", "..."), "post", None),
    Part.MODULE: PartInfo("what a module returns, or takes (`path@input`)", ("...",), "linear", None, per_layer=False),
}
"""The vocabulary, in the order in which a block computes it."""
