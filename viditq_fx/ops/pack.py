"""Weight packing, defined once: the memory layouts that kernels read.

plain      w_q int8 [N, K], row-major. What the reference reads.
padded     w_q int8 [N, Kp] with Kp = K rounded up to `multiple` and zeros in the tail, so that every
           row starts on a `multiple`-byte boundary and the K loop of a GEMM needs no mask on w.
int4       w_q uint8 [N, H], H = half of K padded to 128: byte j of a row holds weight j in its low four bits and
           weight j + H in its high ones, two's complement, zeros where K is padded. Halves and not neighbours,
           so that a tile of bytes is two tiles of K and nothing is interleaved when it is widened.
           4-bit activations [..., K] are packed the same way, at run time: so `pack_int4` is composed of aten ops,
           which Inductor fuses with what made the integers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, register
from viditq_fx.ops.blocked import plain_weight
from viditq_fx.scheme import half_width


def _check(w: Tensor, op: str) -> None:
    if w.dtype != torch.int8 or w.dim() != 2:
        raise ValueError(f"{op}: a packed weight is int8 [N, K]; got {w.dtype} {tuple(w.shape)}")


def pack_int8(w_NK: Tensor, multiple: int) -> Tensor:
    """int8 [N, K] -> int8 [N, Kp], K padded with zeros to a multiple of `multiple`, row-major.

    Raises ValueError for another dtype or rank, or `multiple` < 1.
    """
    _check(w_NK, "pack_int8")
    if multiple < 1:
        raise ValueError(f"pack_int8: multiple={multiple} must be at least 1")
    pad = -w_NK.shape[1] % multiple
    return F.pad(w_NK, (0, pad)).contiguous() if pad else w_NK.clone(memory_format=torch.contiguous_format)


def unpack_int8(w_packed: Tensor, depth: int) -> Tensor:
    """int8 [N, Kp] -> int8 [N, depth]: the inverse of `pack_int8`.

    Raises ValueError for another dtype or rank, or `depth` > Kp.
    """
    _check(w_packed, "unpack_int8")
    if not 0 < depth <= w_packed.shape[1]:
        raise ValueError(f"unpack_int8: K={depth} does not fit the packed width {w_packed.shape[1]}")
    return w_packed[:, :depth].clone(memory_format=torch.contiguous_format)


def read_int8(w: Tensor) -> Tensor:
    """A copy of the integers that the key `w` stands for (see `blocked`), for code that is compiled.

    Raises ValueError for another dtype or rank than int8 [N, K].
    """
    _check(w, "read_int8")
    return plain_weight(w).clone(memory_format=torch.contiguous_format)


def pack_int4(q: Tensor) -> Tensor:
    """int8 [..., K] of integers in [-8, 7] -> uint8 [..., H], two to a byte (see the module's layout).

    Raises ValueError for another dtype or no dimension, and for an integer that four bits do not hold. Only plain
    tensors on a CPU are searched for one: reading a value would wait for a device, and tracing has none.
    """
    if q.dtype != torch.int8 or q.dim() == 0:
        raise ValueError(f"pack_int4: 4-bit integers come as int8 [..., K]; got {q.dtype} {tuple(q.shape)}")
    if type(q) is Tensor and q.device.type == "cpu" and q.numel():
        smallest, largest = (int(bound) for bound in torch.aminmax(q))
        if smallest < -8 or largest > 7:
            raise ValueError(f"pack_int4: four bits hold -8 to 7; got integers from {smallest} to {largest}")
    half = half_width(q.shape[-1])
    padded = F.pad(q, (0, 2 * half - q.shape[-1])).view(torch.uint8)
    return (padded[..., :half] & 15) | (padded[..., half:] << 4)


def unpack_int4(packed: Tensor, depth: int) -> Tensor:
    """uint8 [..., H] -> int8 [..., depth]: the inverse of `pack_int4`.

    Raises ValueError for another dtype or no dimension, or where H is not that of K = `depth`.
    """
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != half_width(depth):
        raise ValueError(
            f"unpack_int4: packed integers of K={depth} are uint8 [..., {half_width(depth)}]; got {packed.dtype} "
            f"{tuple(packed.shape)}"
        )
    both = torch.cat([packed & 15, packed >> 4], dim=-1)[..., :depth]
    # Not shifts of int8: Inductor's C++ does them in int, which keeps what should have been shifted out.
    return (both ^ 8).to(torch.int8) - 8


def _weights(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    gen = torch.Generator(device=device).manual_seed(0)
    for rows, depth in ((8, 32), (5, 17), (3, 1)):
        w = torch.randint(-127, 128, (rows, depth), generator=gen, device=device, dtype=torch.int8)
        yield f"{rows}x{depth}", w


def _pack_samples(device: torch.device) -> Iterator[Sample]:
    for label, w in _weights(device):
        yield Sample(label=label, args=(w, 16))


def _read_samples(device: torch.device) -> Iterator[Sample]:
    for label, w in _weights(device):
        yield Sample(label=label, args=(w,))


def _int4_weights(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    gen = torch.Generator(device=device).manual_seed(0)
    for shape in ((8, 256), (5, 17), (3, 129), (2, 3, 130), (40,)):
        q = torch.randint(-8, 8, shape, generator=gen, device=device, dtype=torch.int8)
        yield "x".join(map(str, shape)), q


def _pack_int4_samples(device: torch.device) -> Iterator[Sample]:
    for label, w in _int4_weights(device):
        yield Sample(label=label, args=(w,))


def _unpack_int4_samples(device: torch.device) -> Iterator[Sample]:
    for label, w in _int4_weights(device):
        yield Sample(label=label, args=(pack_int4(w), w.shape[-1]))


def _unpack_samples(device: torch.device) -> Iterator[Sample]:
    for label, w in _weights(device):
        yield Sample(label=label, args=(pack_int8(w, 16), w.shape[1]))


PACK_INT8 = register(
    QuantOp(
        name="pack_int8",
        schema="(Tensor w, int multiple) -> Tensor",
        reference=pack_int8,
        fake=lambda w, multiple: w.new_empty((w.shape[0], w.shape[1] + -w.shape[1] % multiple)),
        samples=_pack_samples,
    )
)
READ_INT8 = register(
    QuantOp(
        name="read_int8",
        schema="(Tensor w) -> Tensor",
        reference=read_int8,
        fake=lambda w: w.new_empty(w.shape),
        samples=_read_samples,
    )
)
UNPACK_INT8 = register(
    QuantOp(
        name="unpack_int8",
        schema="(Tensor w_packed, int depth) -> Tensor",
        reference=unpack_int8,
        fake=lambda w_packed, depth: w_packed.new_empty((w_packed.shape[0], depth)),
        samples=_unpack_samples,
    )
)
PACK_INT4 = register(
    QuantOp(
        name="pack_int4",
        schema="(Tensor w) -> Tensor",
        reference=pack_int4,
        fake=None,
        samples=_pack_int4_samples,
    )
)
UNPACK_INT4 = register(
    QuantOp(
        name="unpack_int4",
        schema="(Tensor w_packed, int depth) -> Tensor",
        reference=unpack_int4,
        fake=lambda w_packed, depth: w_packed.new_empty((*w_packed.shape[:-1], depth), dtype=torch.int8),
        samples=_unpack_int4_samples,
    )
)
