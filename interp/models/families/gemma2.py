"""Gemma 2: Gemma 3's layout without norms on queries and keys; scores and logits are softly capped.

`attn_scores` are after their cap, as the softmax sees them. The model returns c tanh(x / c): that is `logits`, and x is
`logits_pre`, on which direct effects add up.
"""

from typing import Any, cast

import torch

from interp.core.sites import Part
from interp.models.families.gemma3 import BEFORE_AND_AFTER, gemma_fields
from interp.models.families.llama import ATTENTION, BLOCK, ENDS, MLP, WEIGHTS
from interp.models.family import Family, Reach, Rule, Tiny


def _capped(model: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(cast(Any, model).config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    blocks="model.layers",
    parts={
        **ENDS,
        **ATTENTION,
        **MLP,
        **BEFORE_AND_AFTER,
        Part.LOGITS_PRE: Reach(path="lm_head"),
        Part.LOGITS: Reach(path="", item="logits"),
    },
    weights=WEIGHTS,
    rules=(
        Rule(text="c tanh(logits_pre / c) == logits", result=Part.LOGITS, inputs=(Part.LOGITS_PRE,), function=_capped),
    ),
    tiny={"gemma2": Tiny(config="Gemma2Config", model="Gemma2ForCausalLM", fields=gemma_fields)},
    act=f"{BLOCK}.mlp.act_fn",
    down=f"{BLOCK}.mlp.down_proj",
    out=f"{BLOCK}.self_attn.o_proj",
    after_attn=f"{BLOCK}.post_attention_layernorm",
    after_mlp=f"{BLOCK}.post_feedforward_layernorm",
)
