"""RWKV-4: a decaying average of values with one fixed decay per channel, gated by the receptance; a gated channel mix.

    r, k, v = W (m x_t + (1 - m) x_{t-1});  mixer_out = sigmoid(r) * wkv;  w = -exp(time_decay)
    wkv_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v)
    mlp_out = sigmoid(channel_receptance_pre) * (relu(neurons_pre)^2 W_channel_out)

Each layer has two receptances: `receptance` gates what is read from the past, `channel_receptance` what the channel mix
returns. `time_decay` is the parameter itself, one row of channels, the same at every position.

Source: transformers 5.23 (model type rwkv); Peng et al., arXiv 2305.13048. `resid_pre` of block 0 is after its extra
norm. Traps: every `config.rescale_every` blocks the model halves the stream, and at its first forward divides the
weights that write to it (in place: a weight hash from before is of other numbers). There is no mask: padding on the
left is refused. Decoding with a cache mixes the rows of a batch up (transformers shifts by a tensor that lacks an
axis), so several rows are generated without one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp.core.sites import Part
from interp.models.family import Family, Reach, Rule, Tiny, Weight

BLOCK = "rwkv.blocks.{layer}"
MIX = f"{BLOCK}.attention"
CHANNEL = f"{BLOCK}.feed_forward"
INNER = ("batch", "pos", "d_inner")


def _fields(of: Mapping[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": of["d_vocab"], "hidden_size": of["d_model"], "num_hidden_layers": of["n_layers"],
        "attention_hidden_size": of["d_model"], "intermediate_size": of["d_mlp"], "context_length": of["n_ctx"],
        "rescale_every": 2, "tie_word_embeddings": False,
    }  # fmt: skip


def stream_scale(model: Any, layer: int) -> float:
    """The stream is halved after some blocks, so that half precision does not overflow."""
    every = model.config.rescale_every if model.rwkv.layers_are_rescaled else 0
    return 0.5 if every and (layer + 1) % every == 0 else 1.0


def _mixed(module: str, name: str) -> Any:
    """The product with this token and the one before, in the module's proportion."""

    def project(layer: Any, x: Tensor) -> Tensor:
        part = getattr(layer, module)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        share = getattr(part, f"time_mix_{name}")
        return (before + share * (x - before)) @ getattr(part, name).weight.T

    return project


def _sigmoid(_layer: Any, x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _read(layer: Any, receptance: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The sum over the past, written out: weight e^{(t-1-i) w + k_i} for i < t, e^{u + k_t} for i = t."""
    t = torch.arange(k.shape[1])
    age = (t[:, None] - 1 - t)[..., None].to(k.device)
    weight = k[:, None] - age * decay.exp()
    weight = torch.where(age < 0, k[:, None] + layer.attention.time_first, weight)
    weight = weight.masked_fill(age < -1, -torch.inf).softmax(dim=2)
    return receptance * torch.einsum("btic,bic->btc", weight, v)


RULES = (
    *(
        Rule(
            text=f"mixed attn_in @ W == {part}", result=part, inputs=(Part.ATTN_IN,), function=_mixed("attention", name)
        )
        for part, name in ((Part.K, "key"), (Part.V, "value"), (Part.RECEPTANCE_PRE, "receptance"))
    ),
    *(
        Rule(
            text=f"mixed mlp_in @ W == {part}",
            result=part,
            inputs=(Part.MLP_IN,),
            function=_mixed("feed_forward", name),
        )
        for part, name in ((Part.NEURONS_PRE, "key"), (Part.CHANNEL_RECEPTANCE_PRE, "receptance"))
    ),
    *(
        Rule(text=f"1 / (1 + exp(-{before})) == {part}", result=part, inputs=(before,), function=_sigmoid)
        for before, part in (
            (Part.RECEPTANCE_PRE, Part.RECEPTANCE),
            (Part.CHANNEL_RECEPTANCE_PRE, Part.CHANNEL_RECEPTANCE),
        )
    ),
    Rule(
        text="receptance * weighted mean of v == mixer_out",
        result=Part.MIXER_OUT,
        inputs=(Part.RECEPTANCE, Part.K, Part.V, Part.TIME_DECAY),
        function=_read,
    ),
    Rule(
        text="mixer_out @ W_mixer == attn_out",
        result=Part.ATTN_OUT,
        inputs=(Part.MIXER_OUT,),
        function=lambda layer, x: x @ layer.attention.output.weight.T,
    ),
    Rule(
        text="relu(neurons_pre)^2 == neurons",
        result=Part.NEURONS,
        inputs=(Part.NEURONS_PRE,),
        function=lambda _layer, x: x.clamp_min(0) * x,
    ),
    Rule(
        text="channel_receptance * (neurons @ W_channel_out) == mlp_out",
        result=Part.MLP_OUT,
        inputs=(Part.CHANNEL_RECEPTANCE, Part.NEURONS),
        function=lambda layer, gate, x: gate * F.linear(x, layer.feed_forward.value.weight),
    ),
)

FAMILY = Family(
    name="rwkv",
    model_types=("rwkv",),
    blocks="rwkv.blocks",
    parts={
        Part.EMBED: Reach(path="rwkv.embeddings"),
        Part.RESID_PRE: (Reach(path=f"{BLOCK}.pre_ln"), Reach(path=BLOCK, side="input")),
        Part.ATTN_IN: Reach(path=f"{BLOCK}.ln1"),
        Part.K: Reach(path=f"{MIX}.key", axes=INNER),
        Part.V: Reach(path=f"{MIX}.value", axes=INNER),
        Part.TIME_DECAY: Reach(path=MIX, side="parameter", item="time_decay"),
        Part.RECEPTANCE_PRE: Reach(path=f"{MIX}.receptance"),
        Part.RECEPTANCE: Reach(path=MIX, side="op", op="sigmoid"),
        Part.MIXER_OUT: Reach(path=f"{MIX}.output", side="input"),
        Part.ATTN_OUT: Reach(path=MIX),
        Part.RESID_MID: Reach(path=f"{BLOCK}.ln2", side="input", carry=BLOCK),
        Part.MLP_IN: Reach(path=f"{BLOCK}.ln2"),
        Part.NEURONS_PRE: Reach(path=f"{CHANNEL}.key"),
        Part.NEURONS: Reach(path=f"{CHANNEL}.value", side="input"),
        Part.CHANNEL_RECEPTANCE_PRE: Reach(path=f"{CHANNEL}.receptance"),
        Part.CHANNEL_RECEPTANCE: Reach(path=CHANNEL, side="op", op="sigmoid"),
        Part.MLP_OUT: Reach(path=CHANNEL),
        Part.RESID_POST: Reach(path=BLOCK),
        Part.FINAL_NORM: Reach(path="rwkv.ln_out"),
        Part.LOGITS: Reach(path="head"),
    },
    weights={
        "W_E": Weight(path="rwkv.embeddings.weight", transpose=False),
        "W_U": Weight(path="head.weight"),
        "W_mixer": Weight(path=f"{MIX}.output.weight"),
        "W_channel_out": Weight(path=f"{CHANNEL}.value.weight"),
    },
    sizes={"d_inner": f"{MIX}.key.weight:0", "d_mlp": f"{CHANNEL}.key.weight:0"},
    rules=RULES,
    stream_scale=stream_scale,
    left_padding=False,
    batch_cache=False,
    tiny={"rwkv": Tiny(config="RwkvConfig", model="RwkvForCausalLM", fields=_fields)},
)
