"""Shapes of graphs that real transformers have and that the passes once misread, reduced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.small_models import capture
from viditq_fx.passes.dataflow import source_name
from viditq_fx.passes.roles import find_roles
from viditq_fx.site import fqn_of_source

WIDTH = 64


class Attention(nn.Module):
    """Self attention by scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.a, self.b, self.c)]
        return x + self.d(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class LinearAttention(Attention):
    """Attention as two matmuls without softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x) for p in (self.a, self.b, self.c))
        return x + self.d(torch.matmul(F.relu(q), torch.matmul(F.relu(k).transpose(1, 2), v)))


class PooledText(nn.Module):
    """Text pooled to one vector for each sample modulates the image."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.modulation, self.block = nn.Linear(32, WIDTH), nn.Linear(WIDTH, WIDTH), Attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        condition = self.modulation(F.silu(self.pool(text.mean(1))))
        return self.block(x * (1 + condition[:, None]))


class Embedded(nn.Module):
    """Two linears before the attention and two after it, no activation between: a residual stem and head."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.block = block
        self.third, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.second(x + self.first(x)))
        x = self.third(x)
        return x + self.last(x)


def roles(model: nn.Module, *args: Tensor, dynamic: bool = False) -> dict[str, str]:
    """Module path of each linear -> its role."""
    found = find_roles(capture(model.eval(), *args, dynamic=dynamic).graph)
    return {fqn_of_source(source_name(n.args[1])).removesuffix(".weight"): role for n, role in found.items()}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_one_row_for_each_sample_is_conditioning(batch, dynamic):
    """Also when it is pooled from tokens; such rows once made the modulation an FFN's down-projection."""
    found = roles(PooledText(), torch.randn(batch, 40, WIDTH), torch.randn(batch, 24, 32), dynamic=dynamic)
    assert found.pop("pool") == found.pop("modulation") == "cond"
    assert found == {"block.a": "attn.q", "block.b": "attn.k", "block.c": "attn.v", "block.d": "attn.out"}


def test_tokens_before_samples_are_no_conditioning():
    """[tokens, batch, channels] with batch 1: rows equal the first size, and are tokens all the same."""
    assert set(roles(Attention(), torch.randn(40, 1, WIDTH)).values()) == {
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.out",
    }


@pytest.mark.parametrize("block", [Attention, LinearAttention])
def test_stem_and_head_of_several_linears(block):
    """Every unlabelled linear before the first attention is stem and after the last is head."""
    found = roles(Embedded(block()), torch.randn(2, 40, WIDTH))
    assert [found[name] for name in ("first", "second", "third", "last")] == ["stem", "stem", "head", "head"]
    assert found["block.d"] == "attn.out"


def test_operands_of_matmul_attention_are_no_stem():
    """Nothing comes before them in a block compiled by itself, and still they embed nothing."""
    found = roles(LinearAttention(), torch.randn(2, 40, WIDTH))
    assert found == {"a": "other", "b": "other", "c": "other", "d": "attn.out"}


def test_roles_add_no_guard():
    """Asking whether a table's rows are the batch must not tie the compiled graph to the answer."""
    guards: list[int] = []

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Attention()

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return self.block(x + table.sum(0))

    def backend(gm, example_inputs):
        values = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"]
        shape_env = next(v for v in values if isinstance(v, Tensor)).fake_mode.shape_env
        before = len(shape_env.guards)
        find_roles(gm.graph)
        guards.append(len(shape_env.guards) - before)
        return gm.forward

    with torch.no_grad():
        compiled = torch.compile(Positions().eval(), backend=backend, dynamic=True)
        compiled(torch.randn(2, 40, WIDTH), torch.randn(24, WIDTH))
    assert guards == [0]


class Adapted(nn.Module):
    """linear(x) + scale * B(A(x)), as peft writes LoRA, with as many adapters as are active."""

    def __init__(self, depth: int, width: int, adapters: int) -> None:
        super().__init__()
        self.base = nn.Linear(depth, width)
        self.down = nn.ModuleList(nn.Linear(depth, 4, bias=False) for _ in range(adapters))
        self.up = nn.ModuleList(nn.Linear(4, width, bias=False) for _ in range(adapters))

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        for down, up in zip(self.down, self.up, strict=True):
            result = result + up(F.dropout(down(x.to(torch.float32)), 0.1, training=False)) * 0.5
        return result


@pytest.mark.parametrize("adapters", [0, 1, 2])
def test_adapted_linears_have_the_role_of_their_linear(adapters):
    """The sum of a linear and its adapters once ended the search as a residual does: no ffn.down behind it."""

    class Block(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d = (Adapted(WIDTH, WIDTH, adapters) for _ in range(2))
            self.e, self.f = Adapted(WIDTH, 2 * WIDTH, adapters), Adapted(2 * WIDTH, WIDTH, adapters)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x + self.f(F.gelu(self.e(F.layer_norm(x, (WIDTH,)))))

    expected = {"a": "attn.q", "b": "attn.k", "c": "attn.v", "d": "attn.out", "e": "ffn.up", "f": "ffn.down"}
    found = roles(Block(), torch.randn(2, 40, WIDTH))
    assert len(found) == 6 + 4 * 2 * adapters
    assert {name: role for name, role in found.items() if role != expected[name[0]]} == {}
