"""Activation and quantize in one op: what stands between the two projections of a feed-forward.

    h = act(x)          or, gated (GEGLU, SwiGLU):    h = act(x) * gate
    q, s = quantize_per_token(h)

In fp32 from the input to the integers. Composite: a compiler fuses it into one read and one write.

Shapes: x, gate [..., K] (often the two halves of one tensor), or gate [K]; q int8 [..., K], s fp32 [..., 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.quantize import quantize_per_token


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": _relu_squared,
}


def activation_quantize(x: Tensor, kind: str, gate: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """The reference (see the module's formula); `kind` is a key of ACTIVATIONS.

    Raises ValueError for another kind, and for bits outside 2..8.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation_quantize: kind is one of {tuple(ACTIVATIONS)}, not {kind!r}")
    value = ACTIVATIONS[kind](x.to(torch.float32))
    if gate is not None:
        value = value * gate.to(torch.float32)
    return quantize_per_token(value, bits)


def _samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for kind in ACTIVATIONS:
        x = torch.randn(2, 5, 64, generator=gen, device=device)
        yield Sample(label=kind, args=(x, kind, None, 8))
    both = torch.randn(4, 5, 66, generator=gen, device=device).to(torch.bfloat16)
    value, gate = both.chunk(2, dim=-1)
    yield Sample(label="swiglu-halves", args=(value, "silu", gate, 8))
    yield Sample(label="geglu-7-bit", args=(value, "gelu", gate, 7))
    yield Sample(label="vector", args=(value, "gelu", gate[0, 0].float(), 8))


ACTIVATION_QUANTIZE = register(
    QuantOp(
        name="activation_quantize",
        schema="(Tensor x, str kind, Tensor? gate, int bits) -> (Tensor, Tensor)",
        reference=activation_quantize,
        fake=None,
        samples=_samples,
    )
)
