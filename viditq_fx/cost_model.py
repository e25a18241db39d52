"""What a linear is expected to take on a GPU, in full precision and quantized: the numbers, and the sum.

    gemm     = max(tiles in waves x work of one tile / rate, bytes / bandwidth) + launch
    quantize = (bytes read + written) / bandwidth + launch, where its input's producer cannot take it in; else 0
    zero points: sums of the input's integers, and with groups of g an fp32 GEMM of them [M, K / g] x [K / g, N]
    low-rank branch: two thin GEMMs, [M, K] x [K, r] and [M, r] x [r, N]

What the last two add is which kernels Inductor generates for `ops/zero_point.py` and `ops/low_rank.py` on CUDA.
An estimate, made before anything is compiled and with no device at hand: it is to tell clear cases apart. Nothing
here was measured by this project yet; each number says where it is from.

Legend: M rows (tokens x batch), N output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from viditq_fx.scheme import BLOCK, QuantScheme

LAUNCH_US = 2.0
"""From the end of one kernel to the end of an empty one behind it on the same stream. Assumed: CUDA graphs do better,
a stream that Python feeds worse."""
BANDWIDTH_REACH = 0.8
"""Share of the data sheet's bandwidth that an elementwise kernel reaches. Assumed; e.g. 4.0 of H200's 4.8 TB/s."""
SCHEME_RATE: Mapping[tuple[int, int | None], float] = MappingProxyType(
    {(8, None): 1.0, (4, None): 0.85, (4, 128): 0.6, (4, 64): 0.55}
)
"""(bits of a stored weight, group or block) -> rate relative to w8a8's. Assumed: unpacking takes ALU slots, scales
along K halve the tiles, and groups of 64 fit no tile that is deeper."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What GEMMs reach on one architecture, in TFLOP/s of the whole reference card; other cards scale by SMs."""

    card: str
    processors: int
    bandwidth: float
    """TB/s of the data sheet, for where the driver does not tell."""
    half: float
    """bf16 and fp16 by cuBLAS."""
    full: float
    """fp32 by cuBLAS, without TF32."""
    int8: float
    """int8 by our Triton kernels."""
    fp8: float | None
    """e4m3 by our Triton kernels; None: the hardware has none."""


# "x of y": x taken here, y the data sheet's dense figure.
RATES: Mapping[int, Rates] = MappingProxyType(
    {
        # bf16 250 of 312; int8 of 624: CUTLASS was measured at 419 to 448 (sgl-project/sglang#3093), Triton less.
        80: Rates(card="A100 SXM", processors=108, bandwidth=2.04, half=250, full=18, int8=390, fp8=None),
        # 115 of 150 and 190 of 299 (the same shares as on Ada).
        86: Rates(card="A40", processors=84, bandwidth=0.70, half=115, full=34, int8=180, fp8=None),
        # 280 of 362; 8 bits 440 of 733: Triton was 25% below cuBLAS on Ada (pytorch/ao#574). GeForce cards sum bf16
        # and fp8 in fp32 at half of this: int8 gains more there than is said.
        89: Rates(card="L40S", processors=142, bandwidth=0.864, half=280, full=80, int8=440, fp8=440),
        # bf16 750 of 989 measured on a Hopper (vllm-project/vllm-omni#6789); fp8 1280 of 1979 measured with Triton at
        # 3.5k and more (triton-lang/triton#3546); int8 1100 assumed: no figure is published, the unit is fp8's.
        90: Rates(card="H200 SXM", processors=132, bandwidth=4.8, half=750, full=55, int8=1100, fp8=1280),
        # bf16 1700 of 2250; 8 bits half of 4500, assumed: not all versions of Triton use tcgen05 for it.
        100: Rates(card="B200", processors=148, bandwidth=8.0, half=1700, full=70, int8=2250, fp8=2250),
        # B300 gave its integer units up: int8 150 TOPS (NVIDIA Blackwell technical brief, table 3).
        103: Rates(card="B300", processors=148, bandwidth=8.0, half=1700, full=70, int8=110, fp8=2250),
        # fp32 sums: bf16 165 of 209, int8 500 of 838, fp8 250 of 419.
        120: Rates(card="RTX 5090", processors=170, bandwidth=1.79, half=165, full=80, int8=500, fp8=250),
    }
)
_SAME = {87: 86, 121: 120}
"""Architectures without a row that have another's units: Orin as Ampere, GB10 as consumer Blackwell."""

_TILES = ((256, 128, 1.0), (128, 128, 0.85), (64, 128, 0.6), (64, 64, 0.4), (16, 128, 0.15))
"""(BLOCK_M, BLOCK_N, rate of a full tile relative to the best one), as in triton_templates."""
_SPLIT_DEPTH = 512
"""cuBLAS splits K where tiles do not fill the device, down to about this; our kernels do not."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU as far as the estimate goes."""

    capability: tuple[int, int]
    processors: int
    """Streaming multiprocessors."""
    bandwidth: float
    """TB/s, of the data sheet."""

    @property
    def name(self) -> str:
        """E.g. "sm_90"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def rates(self) -> Rates:
        """The row of its architecture. Raises KeyError where there is none: `device_of` makes no such device."""
        return _rates_of(self.capability)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One linear [M, K] x [N, K]."""

    rows: int
    width: int
    depth: int
    dtype: torch.dtype
    """In full precision; the result's too."""


def device_of(device: torch.device) -> Device | None:
    """The GPU that a tensor is on; None for other devices, and for architectures that RATES does not know."""
    if device.type != "cuda" or torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    try:
        rates = _rates_of(capability)
    except KeyError:
        return None
    told = torch.cuda.get_device_properties(device)
    return Device(
        capability=capability,
        processors=told.multi_processor_count,
        bandwidth=_bandwidth(told) or rates.bandwidth,
    )


def _bandwidth(told: Any) -> float:
    """TB/s by the driver's clock (kHz, two transfers each) and bus (bits); 0 where it tells none."""
    return 2e3 * getattr(told, "memory_clock_rate", 0) * getattr(told, "memory_bus_width", 0) / 8 / 1e12


def _rates_of(capability: tuple[int, int]) -> Rates:
    number = 10 * capability[0] + capability[1]
    return RATES[_SAME.get(number, number)]


def full_us(problem: Problem, device: Device) -> float:
    """Microseconds of the linear in its own dtype by cuBLAS."""
    rate = device.rates.full if problem.dtype == torch.float32 else device.rates.half
    size = problem.dtype.itemsize
    moved = size * (
        problem.rows * problem.depth + problem.width * problem.depth + problem.rows * problem.width
    )
    return _gemm_us(problem, device, rate, moved, splits=True)


def quantized_us(
    problem: Problem, scheme: QuantScheme, device: Device, *, fused: bool, readers: int = 1
) -> float | None:
    """Microseconds of the linear under `scheme`, quantizing its input included; None where hardware has no such units.

    `fused`: what computes the input takes the quantization in. `readers`: linears that share it. The correction by
    zero points and the low-rank branch are in it.
    """
    rate = device.rates.fp8 if scheme.floating else device.rates.int8
    if rate is None:
        return None
    stored = 4 if scheme.weight_form.nibbles else 8  # 6-bit weights are int8 too
    rate *= SCHEME_RATE[stored, scheme.group or scheme.block]
    x_bytes, y_bytes = problem.rows * problem.depth, problem.rows * problem.width * problem.dtype.itemsize
    moved = x_bytes + scheme.weight_form.nbytes(problem.width, problem.depth) + y_bytes
    # What the epilogue adds to the sums comes from memory: a number a row, or a whole result.
    if scheme.grid is not None:
        moved += 4 * problem.rows * (problem.width if scheme.group else 1)
    if scheme.rank:
        moved += y_bytes
    gemm = _gemm_us(problem, device, rate, moved, splits=False)
    once = 0.0 if fused else _quantize_us(problem, device)
    for part_once, part in (
        _zero_point_us(problem, scheme, device),
        _branch_us(problem, scheme, device, fused),
    ):
        once, gemm = once + part_once, gemm + part
    return gemm + once / readers


def _quantize_us(problem: Problem, device: Device) -> float:
    """A pass of its own over the input: read in full precision, written in 8 bits with a scale a row."""
    moved = problem.rows * (problem.depth * (problem.dtype.itemsize + 1) + 4)
    return _moving_us(moved, device) + LAUNCH_US


def _zero_point_us(problem: Problem, scheme: QuantScheme, device: Device) -> tuple[float, float]:
    """(what linears with one input share, what each takes) of kernels beside the GEMM: the zero points' correction."""
    if scheme.grid is None:
        return 0.0, 0.0
    groups = -(-problem.depth // (scheme.group or scheme.block or BLOCK))
    parts = groups if scheme.group or scheme.block else 1
    # Inductor's quantize adds up too, over the part of a row that has one scale; behind a rotation it is ours, which
    # does not: then, and where weights alone have groups or smaller ones, the integers are read once more.
    again = scheme.rotate or (scheme.group is not None and scheme.group != scheme.block)
    sums = 4 * problem.rows * parts
    shared = _moving_us(sums + (problem.rows * problem.depth if again else 0), device)
    shared += LAUNCH_US if again else 0.0
    if scheme.group is None:
        # Of blocks, sums times scales are added to one number a row.
        added = 4 * problem.rows * (2 * groups + 1)
        return shared + (_moving_us(added, device) + LAUNCH_US if scheme.block else 0.0), 0.0
    products = _moving_us(12 * groups * problem.width, device) + LAUNCH_US  # scales times zero points
    return shared, products + full_us(replace(problem, depth=groups, dtype=torch.float32), device)


def _branch_us(problem: Problem, scheme: QuantScheme, device: Device, fused: bool) -> tuple[float, float]:
    """(what linears with one input share, what each takes) of kernels beside the GEMM: the low-rank branch."""
    if not scheme.rank:
        return 0.0, 0.0
    # Where the quantization is taken in, the input in full precision is written for the branch alone.
    written = problem.rows * problem.depth * problem.dtype.itemsize if fused else 0
    down, up = replace(problem, width=scheme.rank), replace(problem, depth=scheme.rank)
    return _moving_us(written, device), full_us(down, device) + full_us(up, device)


def _gemm_us(problem: Problem, device: Device, rate: float, moved: float, *, splits: bool) -> float:
    rate *= device.processors / device.rates.processors
    ways = [
        _tiled_us(problem, device.processors, rate * share, block_m, block_n, parts)
        for block_m, block_n, share in _TILES
        for parts in (_parts(problem.depth) if splits else (1,))
    ]
    return max(min(ways), _moving_us(moved, device)) + LAUNCH_US


def _tiled_us(
    problem: Problem, processors: int, rate: float, block_m: int, block_n: int, parts: int
) -> float:
    """Waves of tiles, each `parts`-th of K deep, at `rate` TFLOP/s of a device that is full."""
    tiles = -(-problem.rows // block_m) * -(-problem.width // block_n) * parts
    waves = -(-tiles // processors)
    return waves * processors * 2 * block_m * block_n * (problem.depth / parts) / rate / 1e6


@lru_cache(maxsize=256)
def _parts(depth: int) -> tuple[int, ...]:
    return tuple(parts for parts in (1, 2, 4, 8, 16) if parts == 1 or depth // parts >= _SPLIT_DEPTH)


def _moving_us(moved: float, device: Device) -> float:
    return moved / (device.bandwidth * BANDWIDTH_REACH) / 1e6
