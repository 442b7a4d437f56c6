"""The same network with nothing learnt: every weight drawn anew.

Matrices come from a normal distribution with their own mean and standard deviation, vectors (gains, biases) keep their
entries in another order: sizes of activations stay comparable, structure is gone. Tied weights stay tied.
Source: T. Heap et al. 2025, Sparse autoencoders can interpret randomly initialized transformers,
https://arxiv.org/abs/2501.17727 (their "re-randomized" models). Beware: tokens still differ, so dictionaries of such a
model find latents for single tokens; what they do not find is what training put there.
"""

from __future__ import annotations

import copy

import torch

from interp.core.seed import torch_generator
from interp.models.model import LoadedModel


@torch.no_grad()
def rerandomised(model: LoadedModel, *, seed: int = 0) -> LoadedModel:
    """A copy with random weights; the model itself is left as it is."""
    module = copy.deepcopy(model.module)
    for name, weight in module.named_parameters():
        generator = torch_generator(seed, "rerandomised", name)
        if weight.ndim > 1:
            drawn = torch.randn(weight.shape, generator=generator)
            wide = weight.float()
            weight.copy_((drawn.to(wide.device) * wide.std() + wide.mean()).to(weight.dtype))
        else:
            weight.copy_(weight[torch.randperm(len(weight), generator=generator).to(weight.device)].clone())
    return LoadedModel(module=module, tokenizer=model.tokenizer, source=f"{model.source}, weights drawn anew")
