"""Quantization schemes by name: which integers stand for weights and for activations."""

from __future__ import annotations

import re
from dataclasses import dataclass

from viditq_fx.errors import SchemeError

GROUP = 128
"""Input channels that share one weight scale where a scheme has groups; the last group may be shorter."""
INT4_MULTIPLE = 128
"""K of 4-bit weights is padded to this: each half of a row is then a whole number of 64-byte tiles."""
_NAME = re.compile(r"^w(\d+)a(\d+)(?:-g(\d+))?$")


@dataclass(frozen=True, kw_only=True)
class WeightForm:
    """What a weight is packed to. Schemes that differ in the input alone share one packed weight."""

    bits: int = 8
    group: int | None = None
    nibbles: bool = False
    """Two integers to a byte (see ops/pack.py)."""
    floating: bool = False
    """e4m3 numbers and not integers."""

    def stored_width(self, depth: int) -> int:
        """Elements of a stored row, one byte each, for K = `depth`."""
        return half_width(depth) if self.nibbles else depth

    def nbytes(self, width: int, depth: int) -> int:
        """Bytes of integers and scales of a weight [N, K] = [width, depth]."""
        groups = 1 if self.group is None else -(-depth // self.group)
        return width * (self.stored_width(depth) + 4 * groups)


def half_width(depth: int) -> int:
    """Bytes of a row of K = `depth` 4-bit weights: half of K, padded to INT4_MULTIPLE."""
    return -(-depth // INT4_MULTIPLE) * (INT4_MULTIPLE // 2)


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How one linear is quantized: symmetric integers, weights static and inputs dynamic.

    Weights [N, K] -> integers [N, K], one fp32 scale per output channel [N], or with groups one for each
    `group` input channels of each output channel [ceil(K / group), N].
    Inputs [..., K] -> int8 [..., K], one fp32 scale per token [..., 1], found at run time
    (ViDiT-Q section 4.1). Integers are clamped to +-(2^(bits-1) - 1), so -128 and -8 never occur.

    `w8a8` is the default. `w8a7` keeps one bit less of the input: CPU integer units without VNNI
    add pairs of products in 16 bits, which saturates with 8-bit inputs and is exact with 7.
    `w4a8` halves the weights' memory again; `w4a8-g128` gives most of the lost precision back.
    `fp8` is `w8a8` in e4m3, 8-bit floating point, for GPUs that multiply it (sm_89 and later).
    """

    weight_bits: int
    input_bits: int
    group: int | None = None
    floating: bool = False

    def __post_init__(self) -> None:
        if (self.weight_bits, self.input_bits, self.group, self.floating) not in _AVAILABLE:
            raise SchemeError(f"scheme {str(self)!r} is not available; choose one of {available_schemes()}")

    def __str__(self) -> str:
        return _name(self.weight_bits, self.input_bits, self.group, self.floating)

    @property
    def weight_form(self) -> WeightForm:
        """What its weights are packed to."""
        return WeightForm(
            bits=self.weight_bits,
            group=self.group,
            nibbles=self.weight_bits == 4,
            floating=self.floating,
        )

    @classmethod
    def parse(cls, name: str | QuantScheme) -> QuantScheme:
        """Read a scheme from its name, e.g. "w8a8".

        Raises SchemeError for a name of another form or for widths that are not available.
        """
        if isinstance(name, QuantScheme):
            return name
        if not isinstance(name, str):
            raise SchemeError(f"a scheme is a name such as 'w8a8', not {type(name).__name__} {name!r}")
        if name.strip().lower() == "fp8":
            return cls(weight_bits=8, input_bits=8, floating=True)
        match = _NAME.match(name.strip().lower())
        if match is None:
            raise SchemeError(f"unknown scheme {name!r}; choose one of {available_schemes()}")
        group = int(match[3]) if match[3] else None
        return cls(weight_bits=int(match[1]), input_bits=int(match[2]), group=group)


_AVAILABLE = (
    (8, 8, None, False),
    (8, 7, None, False),
    (4, 8, None, False),
    (4, 8, GROUP, False),
    (8, 8, None, True),
)


def _name(weight: int, inputs: int, group: int | None, floating: bool) -> str:
    if floating:
        return "fp8"
    return f"w{weight}a{inputs}" + (f"-g{group}" if group else "")


def available_schemes() -> tuple[str, ...]:
    """Names that `QuantScheme.parse` accepts."""
    return tuple(_name(*parts) for parts in _AVAILABLE)


def largest_int(bits: int) -> int:
    """Largest magnitude of a symmetric `bits`-wide integer: 127 for 8, 63 for 7, 7 for 4."""
    return (1 << (bits - 1)) - 1
