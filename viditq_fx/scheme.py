"""Quantization schemes by name: which integers stand for weights and for activations."""

from __future__ import annotations

import re
from dataclasses import dataclass

from viditq_fx.errors import SchemeError

_NAME = re.compile(r"^w(\d+)a(\d+)$")


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How one linear is quantized: symmetric integers, weights static and inputs dynamic.

    Weights [N, K] -> int8 [N, K], one fp32 scale per output channel [N].
    Inputs [..., K] -> int8 [..., K], one fp32 scale per token [..., 1], found at run time
    (ViDiT-Q section 4.1). Integers are clamped to +-(2^(bits-1) - 1), so -128 never occurs.

    `w8a8` is the default. `w8a7` keeps one bit less of the input: CPU integer units without VNNI
    add pairs of products in 16 bits, which saturates with 8-bit inputs and is exact with 7.
    """

    weight_bits: int
    input_bits: int

    def __post_init__(self) -> None:
        if (self.weight_bits, self.input_bits) not in _AVAILABLE:
            raise SchemeError(f"scheme {str(self)!r} is not available; choose one of {available_schemes()}")

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.input_bits}"

    @classmethod
    def parse(cls, name: str | QuantScheme) -> QuantScheme:
        """Read a scheme from its name, e.g. "w8a8".

        Raises SchemeError for a name of another form or for widths that are not available.
        """
        if isinstance(name, QuantScheme):
            return name
        if not isinstance(name, str):
            raise SchemeError(f"a scheme is a name such as 'w8a8', not {type(name).__name__} {name!r}")
        match = _NAME.match(name.strip().lower())
        if match is None:
            raise SchemeError(f"unknown scheme {name!r}; choose one of {available_schemes()}")
        return cls(weight_bits=int(match[1]), input_bits=int(match[2]))


_AVAILABLE = ((8, 8), (8, 7))


def available_schemes() -> tuple[str, ...]:
    """Names that `QuantScheme.parse` accepts."""
    return tuple(f"w{weight}a{inputs}" for weight, inputs in _AVAILABLE)


def largest_int(bits: int) -> int:
    """Largest magnitude of a symmetric `bits`-wide integer: 127 for 8, 63 for 7."""
    return (1 << (bits - 1)) - 1
