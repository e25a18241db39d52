"""A small transformer with every default role, and the call that captures its Dynamo graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from viditq_fx.graph_edit import copy_graph_module
from viditq_fx.passes.base import PassContext
from viditq_fx.runtime import executions
from viditq_fx.scheme import QuantScheme
from viditq_fx.testing import relative_error as relative_error
from viditq_fx.testing import targets as targets


class Block(nn.Module):
    """Pre-norm block with timestep modulation: q, k, v, out, up, down and one modulation linear."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, S, C], condition [B, C] -> [B, S, C]."""
        shift, scale, gate = self.modulation(F.silu(condition)).unsqueeze(1).chunk(3, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        q, k, v = (p(h).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + gate * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class TinyDiT(nn.Module):
    """Stem, timestep embedding, blocks, head; S tokens of 8 channels."""

    def __init__(self, layers: int = 2, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.time = nn.Linear(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x [B, S, 8], timestep [B] -> [B, S, 8]."""
        angles = timestep[:, None] * torch.exp(-torch.arange(16, device=x.device) / 4.0)
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype))
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


QUANTIZED_PER_LAYER = 6
GEMMS_PER_LAYER = 4
"""q, k and v read one input: they run as one wide GEMM."""
KEPT_OUTSIDE_LAYERS = 3


def tiny_dit(layers: int = 2, width: int = 64, seed: int = 0) -> TinyDiT:
    """A TinyDiT with fixed random weights, in eval mode."""
    torch.manual_seed(seed)
    return TinyDiT(layers, width).eval().requires_grad_(False)


def tiny_inputs(batch: int = 2, tokens: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    """One call's inputs."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 8, generator=gen), torch.linspace(1, 999, batch)


def capture(model: Callable[..., Any], *args: Any, dynamic: bool | None = False) -> fx.GraphModule:
    """Dynamo's graph of a call, copied."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(copy_graph_module(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert len(graphs) == 1
    return graphs[0]


def compiled(model: Callable[..., Any], **kwargs: Any) -> Any:
    """`torch.compile` with our backend."""
    return torch.compile(model, backend="viditq", **kwargs)


def run_counting(call: Callable[..., Any], *args: Any) -> tuple[Any, list[int]]:
    """(result, sites quantized in each graph that ran)."""
    with executions() as ran:
        result = call(*args)
    return result, [sum(site.done is not None for site in run.report.sites) for run in ran]


def context(scheme: str = "w8a8", keep: tuple[str, ...] = ()) -> PassContext:
    """A fresh PassContext."""
    return PassContext(scheme=QuantScheme.parse(scheme), keep=keep)


def count(gm: fx.GraphModule, name: str) -> int:
    """How many nodes of a graph call this."""
    return targets(gm).count(name)
