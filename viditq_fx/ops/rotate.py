"""Rotate the input channels of a linear in blocks, so that no channel is larger than the others.

    x' = (x * m) R        W' = (W / m) R        R = diag(H, ..., H), so that x' W'^T = x W^T

H is the regular Hadamard matrix of a block: a Kronecker power of the symmetric 4 x 4 one, entries +-1/sqrt(block), each
row with the same sum. It is orthonormal and symmetric, hence its own inverse. Regular, because the usual (Sylvester)
one gathers what all channels have in common, as after a GELU, into one channel, and then quantizes worse than none.

The multiplier m is 1/s of channel balancing times random signs (ViDiT-Q section 4.2; DVD-Quant equation 9).

Shapes: x [..., K]; w [N, K]; multiplier [K] fp32; q int8 [..., K]; s fp32 [..., 1], or [..., G], G = ceil(K / group).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.linear import without_autocast
from viditq_fx.ops.quantize import check_bits, quantize_per_token

LARGEST_BLOCK = 256


def rotation_block(width: int) -> int:
    """The block in which `width` input channels are rotated: the largest power of 4 that divides it, at most 256.

    1 (no rotation) for an odd multiple of 1 or 2. Raises ValueError for a width below 1.
    """
    if width < 1:
        raise ValueError(f"rotation_block: the number of input channels is at least 1, not {width}")
    block = 1
    while block < LARGEST_BLOCK and width % (4 * block) == 0:
        block *= 4
    return block


def hadamard(block: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The regular Hadamard matrix [block, block]: orthonormal, symmetric, entries +-1/sqrt(block).

    An entry is negative where its row and its column agree in an odd number of base-4 digits. Made of aten ops each
    time: a cached tensor would be a foreign constant to a tracer, on one device only.
    Raises ValueError for a block that is no power of 4.
    """
    _check_block(block)
    index = torch.arange(block, device=device, dtype=torch.int32)
    differ = index.unsqueeze(1) ^ index
    value = torch.full((block, block), block**-0.5, device=device, dtype=dtype)
    for shift in range(0, block.bit_length() - 1, 2):
        value = torch.where(((differ >> shift) & 3) == 0, -value, value)
    return value


def rotate(x: Tensor, multiplier: Tensor | None, block: int) -> Tensor:
    """x [..., K] of any float dtype -> (x * multiplier) H block by block, fp32 [..., K].

    The product is in fp32, at the precision that the user set for it on CUDA. Raises ValueError for a block that is no
    power of 4 or does not divide K, and for a multiplier that is not [K].
    """
    _check(x, multiplier, block, "rotate: x is [..., K]")
    scaled = x.to(torch.float32)
    if multiplier is not None:
        scaled = scaled * multiplier.to(torch.float32)
    return _in_blocks(scaled, block)


def transform_weight(w: Tensor, multiplier: Tensor | None, block: int) -> Tensor:
    """w [N, K] of any float dtype -> (w / multiplier) H block by block, fp32 [N, K]: undoes `rotate` of the input.

    Done once for a weight, hence in fp64: one rounding, whatever precision the user set for fp32 products.
    Raises ValueError as `rotate` does, and for a weight that is not 2-D.
    """
    if w.dim() != 2:
        raise ValueError(f"transform_weight: a weight is [N, K]; got shape {tuple(w.shape)}")
    _check(w, multiplier, block, "transform_weight: w is [N, K]")
    balanced = w.to(torch.float64)
    if multiplier is not None:
        balanced = balanced / multiplier.to(torch.float64)
    return _in_blocks(balanced, block).to(torch.float32)


def rotate_quantize(
    x: Tensor, multiplier: Tensor | None, block: int, bits: int, group: int
) -> tuple[Tensor, Tensor]:
    """`rotate`, then integers with one scale for each row (group 0) or for each `group` channels of a row.

    -> (q int8 [..., K], s fp32 [..., 1] or [..., ceil(K / group)]; the last group may be short). DVD-Quant section 3.3
    has the groups. Raises ValueError as `rotate` does, for bits outside 2..8 and for a negative group.
    """
    if group < 0:
        raise ValueError(
            f"rotate_quantize: a group has at least 1 channel, or is 0 for whole rows; got {group}"
        )
    rotated = rotate(x, multiplier, block)
    if group == 0:
        return quantize_per_token(rotated, bits)
    rows, width = x.shape[:-1], x.shape[-1]
    padded = F.pad(rotated, (0, -width % group))  # zeros change no group's largest magnitude
    q, scale = quantize_per_token(padded.reshape(*rows, -(-width // group), group), bits)
    return q.reshape(padded.shape)[..., :width].contiguous(), scale.squeeze(-1)


def check_rotate_quantize(x: Tensor, multiplier: Tensor | None, block: int, bits: int, group: int) -> None:
    """Raise what `rotate_quantize` raises for these arguments."""
    check_bits(bits)
    if group < 0:
        raise ValueError(
            f"rotate_quantize: a group has at least 1 channel, or is 0 for whole rows; got {group}"
        )
    _check(x, multiplier, block, "rotate_quantize: x is [..., K]")


def fake_rotated(x: Tensor, *_: object) -> Tensor:
    """What `rotate` and `transform_weight` return, without values: for fake tensors."""
    return x.new_empty(x.shape, dtype=torch.float32)


def fake_rotate_quantize(
    x: Tensor, multiplier: Tensor | None, block: int, bits: int, group: int
) -> tuple[Tensor, Tensor]:
    """What `rotate_quantize` returns, without values: for fake tensors."""
    scales = -(-x.shape[-1] // group) if group else 1
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], scales), dtype=torch.float32)


def _in_blocks(x: Tensor, block: int) -> Tensor:
    if block == 1:
        return x.contiguous()
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    with without_autocast(x):  # it would multiply, and return, 16 bits
        return (blocks @ hadamard(block, x.device, x.dtype)).reshape(x.shape)


def _check_block(block: int) -> None:
    if block < 1 or block & (block - 1) or block.bit_length() % 2 == 0:
        raise ValueError(f"rotation: a block is a power of 4 (1: no rotation), not {block}")


def _check(x: Tensor, multiplier: Tensor | None, block: int, what: str) -> None:
    _check_block(block)
    if x.dim() == 0:
        raise ValueError(f"{what}; got a 0-d tensor")
    width = x.shape[-1]
    if width % block:
        raise ValueError(
            f"{what}: blocks of {block} do not divide K={width}; rotation_block(K) gives one that does"
        )
    if multiplier is not None and multiplier.shape != (width,):
        raise ValueError(f"{what} and the multiplier [K]: K={width}, multiplier {tuple(multiplier.shape)}")


def _multiplier(width: int, device: torch.device, gen: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (width,), generator=gen, device=device) * 2.0 - 1.0
    return signs * torch.rand(width, generator=gen, device=device).add(0.5)


def _rotate_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 5, 48, generator=gen, device=device).to(dtype)
        yield Sample(label=f"3d-{dtype}", args=(x, _multiplier(48, device, gen), 16))
    yield Sample(label="plain", args=(torch.randn(4, 128, generator=gen, device=device), None, 64))
    odd = torch.randn(16, 6, generator=gen, device=device).t()
    yield Sample(label="non-contiguous", args=(odd, None, 4))
    yield Sample(label="no-rotation", args=(odd, _multiplier(16, device, gen), 1))


def _weight_samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(6, 64, generator=gen, device=device).to(dtype)
        yield Sample(label=f"{dtype}", args=(w, _multiplier(64, device, gen), 64))
    yield Sample(label="no-rotation", args=(torch.randn(5, 33, generator=gen, device=device), None, 1))


def _quantize_samples(device: torch.device) -> Iterator[Sample]:
    for sample in _rotate_samples(device):
        yield Sample(label=sample.label, args=(*sample.args, 8, 0))
    x, multiplier, block = next(_rotate_samples(device)).args
    yield Sample(label="short-last-group", args=(x, multiplier, block, 8, 32))
    yield Sample(label="even-groups-4-bit", args=(x, None, block, 4, 16))


ROTATE = register(
    QuantOp(
        name="rotate",
        schema="(Tensor x, Tensor? multiplier, int block) -> Tensor",
        reference=rotate,
        fake=None,
        samples=_rotate_samples,
    )
)
TRANSFORM_WEIGHT = register(
    QuantOp(
        name="transform_weight",
        schema="(Tensor w, Tensor? multiplier, int block) -> Tensor",
        reference=transform_weight,
        fake=None,
        samples=_weight_samples,
    )
)
ROTATE_QUANTIZE = register(
    QuantOp(
        name="rotate_quantize",
        schema="(Tensor x, Tensor? multiplier, int block, int bits, int group) -> (Tensor, Tensor)",
        reference=rotate_quantize,
        fake=None,
        samples=_quantize_samples,
    )
)
