"""Small networks around blocks of vision libraries, for tests: the same classes, children and parameters by name.

Re-stated from the papers named in `interp/models/blocks/`; the arithmetic is the one documented there. Whether the real
timm classes are reached in the same way is tested where timm can be imported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from interp.core.seed import torch_generator


def filled(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights large enough that every gate matters, in eval mode."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch_generator(seed, name))
            small = 0.5 * noise + (0 if name.endswith("bias") else 1)  # no random start of torch's own
            parameter.copy_(small if parameter.ndim <= 1 else noise / parameter[0].numel() ** 0.5)
    return module.to(dtype).eval()


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch_generator(seed, "input")).to(dtype)


class SEModule(nn.Module):
    """timm.layers.SEModule."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.fc1, self.bn = nn.Conv2d(channels, 4, 1), nn.Identity()
        self.act, self.fc2, self.gate = nn.ReLU(inplace=True), nn.Conv2d(4, channels, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(x.mean((2, 3), keepdim=True))))))


class SqueezeExcite(nn.Module):
    """timm.models._efficientnet_blocks.SqueezeExcite."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, 4, 1), nn.SiLU(inplace=True)
        self.conv_expand, self.gate = nn.Conv2d(4, channels, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class SpatialGatingUnit(nn.Module):
    """timm.models.mlp_mixer.SpatialGatingUnit."""

    def __init__(self, width: int = 12, n_pos: int = 5) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width // 2), nn.Linear(n_pos, n_pos)

    def forward(self, x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return u * self.proj(self.norm(v).transpose(-1, -2)).transpose(-1, -2)


class GPSA(nn.Module):
    """timm.models.convit.GPSA, with the distances of a square of patches."""

    def __init__(self, width: int = 8, n_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = n_heads
        self.qk, self.v = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, width, bias=False)
        self.attn_drop, self.proj, self.pos_proj = nn.Dropout(0.0), nn.Linear(width, width), nn.Linear(3, n_heads)
        self.gating_param = nn.Parameter(torch.ones(n_heads))

    def forward(self, x: Tensor) -> Tensor:
        n_rows, n_pos, width = x.shape
        qk = self.qk(x).reshape(n_rows, n_pos, 2, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        side = torch.arange(n_pos**0.5, dtype=x.dtype)
        down, right = side.repeat_interleave(len(side)), side.repeat(len(side))
        dy, dx = down[None] - down[:, None], right[None] - right[:, None]
        distances = torch.stack([dx, dy, dx**2 + dy**2], dim=-1)[None]
        positions = self.pos_proj(distances).permute(0, 3, 1, 2).softmax(dim=-1)
        content = (qk[0] @ qk[1].transpose(-2, -1) * (width // self.num_heads) ** -0.5).softmax(dim=-1)
        gate = self.gating_param.view(1, -1, 1, 1)
        attention = (1.0 - torch.sigmoid(gate)) * content + torch.sigmoid(gate) * positions
        attention /= attention.sum(dim=-1).unsqueeze(-1)
        v = self.v(x).reshape(n_rows, n_pos, self.num_heads, -1).permute(0, 2, 1, 3)
        return self.proj((self.attn_drop(attention) @ v).transpose(1, 2).reshape(x.shape))


class GluMlp(nn.Module):
    """timm.layers.GluMlp; SwiGLUPacked is this with SiLU and gate_last=False."""

    def __init__(self, width: int = 6, hidden: int = 8, *, gate_last: bool = True, use_conv: bool = False) -> None:
        super().__init__()
        linear = (lambda a, b: nn.Conv2d(a, b, 1)) if use_conv else nn.Linear
        self.chunk_dim, self.gate_last = 1 if use_conv else -1, gate_last
        self.fc1, self.act = linear(width, hidden), nn.Sigmoid() if gate_last else nn.SiLU()
        self.drop1, self.norm = nn.Dropout(0.0), nn.Identity()
        self.fc2, self.drop2 = linear(hidden // 2, width), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=self.chunk_dim)
        x = first * self.act(second) if self.gate_last else self.act(first) * second
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class SwiGLU(nn.Module):
    """timm.layers.SwiGLU."""

    def __init__(self, width: int = 6, hidden: int = 8) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x, self.act = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.SiLU()
        self.drop1, self.norm, self.fc2 = nn.Dropout(0.0), nn.LayerNorm(hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.drop1(self.act(self.fc1_g(x)) * self.fc1_x(x))))


class SwiGLUFFN(nn.Module):
    """The feed-forward network of the original DINOv2."""

    def __init__(self, width: int = 6, hidden: int = 8) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(first) * second)


class AttentionBlock(nn.Module):
    """The U-Net attention gate, named as in MONAI; the coarse signal is the fine one, pooled."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.W_g, self.W_x = nn.Conv2d(channels, 3, 1), nn.Conv2d(channels, 3, 1)
        self.psi = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        coarse = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2)
        return x * self.psi(functional.relu(self.W_g(coarse) + self.W_x(x)))


class ReZero(nn.Module):
    """x + alpha F(x), alpha used as the paper writes it."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.branch, self.alpha = nn.Linear(width, width), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * torch.tanh(self.branch(x))


class GatedSkip(nn.Module):
    """h + sigmoid(W h + b) * F(h)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.gate, self.branch = nn.Linear(width, 1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate(x)) * torch.tanh(self.branch(x))


class EarlyExit(nn.Module):
    """The mixture of leaving now and going on, by the probability of leaving."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.gate, self.now, self.later = nn.Linear(width, 1), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        leave = torch.sigmoid(self.gate(x.mean(dim=1)))[:, None]
        return leave * self.now(x) + (1 - leave) * self.later(x).tanh()


class GatedMultimodalUnit(nn.Module):
    """Arevalo et al.: the two halves of the width are the two modalities."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width // 2, width), nn.Linear(width // 2, width)
        self.choose = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        z = torch.sigmoid(self.choose(x))
        return z * self.first(first).tanh() + (1 - z) * self.second(second).tanh()


class DenseCapsule(nn.Module):
    """Dynamic routing between capsules; (batch, in, d_in) to (batch, out, d_out)."""

    def __init__(self, n_in: int = 5, d_in: int = 6, n_out: int = 3, d_out: int = 4, routings: int = 3) -> None:
        super().__init__()
        self.routings = routings
        self.weight = nn.Parameter(torch.zeros(n_out, n_in, d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.einsum("oide,bie->boid", self.weight, x)
        logits = votes.new_zeros(votes.shape[:3])
        output = votes[:, :, 0]
        for _ in range(self.routings):
            share = functional.softmax(logits, dim=1)
            total = (share[..., None] * votes).sum(dim=2)
            norm = total.norm(dim=-1, keepdim=True)
            output = norm / (1 + norm**2) * total
            logits = logits + (votes * output[:, :, None]).sum(-1)
        return output


class Around(nn.Module):
    """A block between two layers, so that neither its input nor its output is the network's."""

    def __init__(self, block: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.block, self.after = before, block, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.before(x)))


def around(block: nn.Module, kind: str, width: int, out: int | None = None) -> nn.Module:
    """The block in a network for images (`image`) or for tokens (`tokens`)."""
    out = out or width
    if kind == "image":
        head = nn.Sequential(nn.Conv2d(out, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Around(block, nn.Conv2d(3, width, 3, padding=1), head)
    return Around(block, nn.Linear(4, width), nn.Linear(out, 3))
