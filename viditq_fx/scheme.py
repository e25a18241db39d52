"""Quantization schemes by name: which integers stand for weights and for activations, and what is done before."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from dataclasses import dataclass

from viditq_fx.errors import SchemeError

BLOCK = 128
"""Channels of a token that share one input scale where a scheme has blocks; the last block may be shorter."""
GROUPS = (128, 64)
"""Input channels that may share one weight scale where a scheme has groups, widest first; the last group may be
shorter. Each divides BLOCK, so that a group has one input scale."""
INT4_MULTIPLE = 128
"""K of 4-bit weights is padded to this: each half of a row is then a whole number of 64-byte tiles."""
ZERO_BITS = 4
"""Most bits of weights whose zero points take a byte; those of wider ones are fp32."""
WEIGHT_BITS = (8, 6, 4)
INPUT_BITS = (8, 7, 6, 4)
INPUT_RANGES = ("dynamic", "static", "timestep", "position")
_NAME = re.compile(r"^w([0-9]+)a([0-9]+)((?:-[a-z0-9]+)*)$")
_ALIASES = {
    "dvd-w4a8": "w4a8-bgr-rot-block",
    "dvd-w4a4": "w4a4-bgr-rot-block",
}
"""DVD-Quant: BGR weights (section 3.2) and auto-scaling rotated inputs (3.3), with no data."""

SCHEME_MARK = "viditq_scheme"
"""Key of `node.meta["custom"]` under which a layer of `quantize_` tells its scheme's name to the graphs it is in."""

SWITCHED = {"dvd-w4a6": ("dvd-w4a4", "dvd-w4a8")}
"""Schemes whose steps run at one of two widths of the input (DVD-Quant section 3.4): low, high; 6 bits on average."""


@dataclass(frozen=True, kw_only=True)
class WeightForm:
    """What a weight is packed to. Schemes that differ in the input alone share one packed weight."""

    bits: int = 8
    group: int | None = None
    nibbles: bool = False
    """Two integers to a byte (see ops/pack.py)."""
    floating: bool = False
    """e4m3 numbers and not integers."""
    grid: str | None = None
    """None: symmetric. "minmax" or "bgr": a scale and an integer zero point for each row (ops/grid.py)."""
    rotation: int = 1
    """Block of the Hadamard rotation that the weight went through (ops/rotate.py); 1 is none."""
    rank: int = 0
    """Of a branch in full precision that takes the largest part off first (ops/low_rank.py); 0 is none."""
    multiplier: Hashable = None
    """What its input channels were divided by before that: an ops.weight_forms.Multiplier, or None."""

    def stored_width(self, depth: int) -> int:
        """Elements of a stored row, one byte each, for K = `depth`."""
        return half_width(depth) if self.nibbles else depth

    def nbytes(self, width: int, depth: int) -> int:
        """Bytes of integers, scales and zero points of a weight [N, K] = [width, depth]."""
        groups = 1 if self.group is None else -(-depth // self.group)
        branch = 2 * self.rank * (width + depth)
        zero = 0 if self.grid is None else 1 if self.bits <= ZERO_BITS else 4
        return width * (self.stored_width(depth) + (4 + zero) * groups) + branch


def group_of(scales: int, depth: int) -> int | None:
    """Input channels that share one of the `scales` of an output channel of K = `depth`; None: no number of GROUPS.

    The one place where the size of a stored weight's groups is read off its scales [G, N]. One that holds all of K is
    called the widest.
    """
    return next((group for group in GROUPS if -(-depth // group) == scales), None)


def group_shapes(width: int, depth: int) -> tuple[tuple[int, int], ...]:
    """The shapes [G, N] that scales of groups of a weight [N, K] = [width, depth] may have."""
    return tuple(dict.fromkeys((-(-depth // group), width) for group in GROUPS))


def half_width(depth: int) -> int:
    """Bytes of a row of K = `depth` 4-bit weights: half of K, padded to INT4_MULTIPLE."""
    return -(-depth // INT4_MULTIPLE) * (INT4_MULTIPLE // 2)


@dataclass(frozen=True, kw_only=True)
class QuantScheme:
    """How one linear is quantized; its name says all of it: `w<bits>a<bits>` and suffixes.

    Weights [N, K] -> integers [N, K], one fp32 scale per output channel [N], or with groups one for each
    `group` input channels of each output channel [ceil(K / group), N]. 6-bit weights take a byte each in memory.
    Inputs [..., K] -> int8 [..., K], one fp32 scale per token [..., 1], found at run time (ViDiT-Q section 4.1).

        -g128, -g64   a weight scale for each 128 or 64 input channels
        -asym      weights with an integer zero point, w ~= s * (q - z), by min and max of a row
        -bgr       the same, its grid refined to the row's least squares (DVD-Quant section 3.2)
        -rot       input and weight rotated by a blocked Hadamard matrix first (QuaRot; ViDiT-Q section 4.2)
        -block     an input scale for each token and 128 channels of it (DVD-Quant section 3.3, on integers)
        -svd16, -svd32   a low-rank branch in full precision beside the weight (SVDQuant)
        -static    one input scale for all tokens and steps, from calibration
        -timestep  one input scale for each range of the timestep, from calibration
        -position  one input scale for each position of a token in its sequence, from calibration (per-token static)

    `w8a8` is the default. `w8a7` keeps one bit less of the input: CPU integer units without VNNI
    add pairs of products in 16 bits, which saturates with 8-bit inputs and is exact with 7.
    `fp8` is `w8a8` in e4m3, 8-bit floating point, for GPUs that multiply it (sm_89 and later).
    `dvd-w4a8` and `dvd-w4a4` name DVD-Quant's combinations.
    """

    weight_bits: int
    input_bits: int
    group: int | None = None
    floating: bool = False
    grid: str | None = None
    """As in `WeightForm`."""
    rotate: bool = False
    block: int | None = None
    """Channels of a token that share one input scale; None: the whole token."""
    rank: int = 0
    """As in `WeightForm`: 0, 16 or 32."""
    input_range: str = "dynamic"
    """Where the input's scale comes from: one of INPUT_RANGES."""

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            raise SchemeError(
                f"scheme {str(self)!r} is not available: {problem}; choose one such as {available_schemes()}"
            )

    def _problem(self) -> str | None:
        four = self.weight_bits == 4
        if self.floating:
            rest = (
                self.weight_bits,
                self.input_bits,
                self.group,
                self.grid,
                self.rotate,
                self.block,
                self.rank,
            )
            if rest != (8, 8, None, None, False, None, 0) or self.input_range != "dynamic":
                return "fp8 is taken as it is"
        elif self.weight_bits not in WEIGHT_BITS or self.input_bits not in INPUT_BITS:
            return f"weights have {WEIGHT_BITS} bits and inputs {INPUT_BITS}"
        if self.group not in (None, *GROUPS) or (self.group and not four):
            return "groups are of " + " or ".join(map(str, GROUPS)) + " channels and for 4-bit weights"
        if self.grid not in (None, "minmax", "bgr"):
            return f"grid {self.grid!r} is not known"
        if self.block not in (None, BLOCK) or (self.block and not (four and self.input_bits in (4, 8))):
            return "scales for blocks of the input are for w4a8 and w4a4"
        if self.rank not in (0, 16, 32) or (self.rank and not four):
            return "a branch of rank 16 or 32 is for 4-bit weights"
        if self.input_range not in INPUT_RANGES or (self.block and self.input_range != "dynamic"):
            return "scales for blocks of the input are found at run time"
        return None

    def __str__(self) -> str:
        if self.floating:
            return "fp8"
        parts = [f"w{self.weight_bits}a{self.input_bits}"]
        parts += [f"g{self.group}"] if self.group else []
        parts += [{"minmax": "asym", "bgr": "bgr"}.get(self.grid, self.grid)] if self.grid else []
        parts += ["rot"] if self.rotate else []
        parts += ["block"] if self.block else []
        parts += [f"svd{self.rank}"] if self.rank else []
        parts += [self.input_range] if self.input_range != "dynamic" else []
        name = "-".join(parts)
        return _SHORT.get(name, name)

    @property
    def weight_form(self) -> WeightForm:
        """What its weights are packed to."""
        return WeightForm(
            bits=self.weight_bits,
            group=self.group,
            nibbles=self.weight_bits == 4,
            floating=self.floating,
            grid=self.grid,
            rank=self.rank,
        )

    @property
    def calibrated(self) -> bool:
        """Whether its input scales come from calibration, so that it needs a recipe."""
        return self.input_range != "dynamic"

    @classmethod
    def parse(cls, name: str | QuantScheme) -> QuantScheme:
        """Read a scheme from its name, e.g. "w8a8" or "w4a8-g128-rot".

        Raises SchemeError for a name of another form or for widths that are not available.
        """
        if isinstance(name, QuantScheme):
            return name
        if not isinstance(name, str):
            raise SchemeError(f"a scheme is a name such as 'w8a8', not {type(name).__name__} {name!r}")
        text = name.strip().lower()
        if text == "fp8":
            return cls(weight_bits=8, input_bits=8, floating=True)
        match = _NAME.match(_ALIASES.get(text, text))
        if match is None:
            raise SchemeError(
                f"unknown scheme {name!r}{_nearest(text)}; choose one such as {available_schemes()}"
            )
        fields: dict[str, object] = {}
        for suffix in filter(None, match[3].split("-")):
            added = _SUFFIXES.get(suffix)
            if added is None or added.keys() & fields.keys():
                problem = "is not known" if added is None else "is given beside another of its kind"
                raise SchemeError(
                    f"scheme {name!r} is not available: suffix -{suffix} {problem}; suffixes are "
                    f"{', '.join('-' + s for s in _SUFFIXES)}; choose one such as {available_schemes()}"
                )
            fields |= added
        return cls(weight_bits=int(match[1]), input_bits=int(match[2]), **fields)  # type: ignore[arg-type]


_SUFFIXES: dict[str, dict[str, object]] = {
    **{f"g{group}": {"group": group} for group in GROUPS},
    "asym": {"grid": "minmax"},
    "bgr": {"grid": "bgr"},
    "rot": {"rotate": True},
    "block": {"block": BLOCK},
    "svd16": {"rank": 16},
    "svd32": {"rank": 32},
    "static": {"input_range": "static"},
    "timestep": {"input_range": "timestep"},
    "position": {"input_range": "position"},
}
_SHORT = {long: short for short, long in _ALIASES.items()}


def _nearest(text: str) -> str:
    near = difflib.get_close_matches(text, available_schemes(), n=2)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def available_schemes() -> tuple[str, ...]:
    """Schemes in common use that need no calibration; `QuantScheme.parse` accepts other combinations too."""
    return ("w8a8", "w8a7", "w6a6", "w4a8", f"w4a8-g{GROUPS[0]}", "w4a8-rot", "dvd-w4a8", "dvd-w4a4", "fp8")


def largest_int(bits: int) -> int:
    """Largest magnitude of a symmetric `bits`-wide integer: 127 for 8, 63 for 7, 7 for 4."""
    return (1 << (bits - 1)) - 1
