"""Is the W8A8 GEMM right on this CUDA device? Asked by `benchmarks/gpu.py` before it times anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from viditq_fx.lowering.extern_linear import viditq_int_mm_linear
from viditq_fx.lowering.kernel_log import kernel_log
from viditq_fx.ops import LINEAR_W8A8
from viditq_fx.ops.base import EPILOGUE_TOLERANCES
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_token
from viditq_fx.triton_templates.base import GemmConfig, LinearProblem, architecture
from viditq_fx.triton_templates.linear_w8a8 import TEMPLATE, launch


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One linear of a model: x [M, K], w [N, K]."""

    model: str
    rows: int
    depth: int
    width: int

    def __str__(self) -> str:
        return f"{self.model} M{self.rows} K{self.depth} N{self.width}"


def _shapes(model: str, rows: int, sizes: tuple[tuple[int, int], ...]) -> tuple[Shape, ...]:
    return tuple(Shape(model=model, rows=rows, depth=k, width=n) for k, n in sizes)


SHAPES = (
    *_shapes("flux", 4608, ((3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072), (3072, 9216))),
    *_shapes("pixart", 8192, ((1152, 1152), (1152, 4608), (4608, 1152))),
    *_shapes("wan", 32760, ((5120, 5120), (5120, 13824), (13824, 5120))),
    # Text tokens and a deep K, where K may be split; many tokens and few columns.
    *_shapes("few rows", 77, ((4096, 3072), (12288, 3072), (15360, 3072))),
    *_shapes("few rows", 32, ((12288, 3072),)),
    *_shapes("tall", 32760, ((5120, 64), (1536, 256))),
)


def problem(shape: Shape, out_dtype: torch.dtype = torch.bfloat16) -> LinearProblem:
    """The shape on this device."""
    return LinearProblem(
        rows=shape.rows,
        width=shape.width,
        depth=shape.depth,
        out_dtype=out_dtype,
        capability=torch.cuda.get_device_capability(),
        processors=torch.cuda.get_device_properties(0).multi_processor_count,
    )


def _integers(rows: int, depth: int, width: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator(device="cuda").manual_seed(rows * 7919 + depth * 31 + width)
    make = {"generator": gen, "dtype": torch.int8, "device": "cuda"}
    return torch.randint(-127, 128, (rows, depth), **make), torch.randint(-127, 128, (width, depth), **make)


def check_exact(config: GemmConfig, rows: int, depth: int, width: int) -> str | None:
    """None when every sum is right: unit scales, so fp32 holds the rounded int32."""
    x_MK, w_NK = _integers(rows, depth, width)
    ones_M, ones_N = torch.ones(rows, 1, device="cuda"), torch.ones(width, device="cuda")
    got = launch(x_MK, ones_M, w_NK, ones_N, None, torch.float32, config=config)
    want = (x_MK.double() @ w_NK.double().t()).float()
    wrong = int((got != want).sum())
    return f"{wrong} of {want.numel()} sums are wrong" if wrong else None


def check_epilogue(config: GemmConfig, dtype: torch.dtype) -> str | None:
    """None when scales and bias agree with the op's reference within its tolerance."""
    x, w = torch.randn(333, 520, device="cuda"), torch.randn(200, 520, device="cuda")
    bias = torch.randn(200, device="cuda").to(dtype)
    args = (*quantize_per_token(x, 8), *quantize_per_channel(w, 8), bias, dtype)
    want, tolerance = LINEAR_W8A8.reference(*args), EPILOGUE_TOLERANCES[dtype]
    for name, got in {
        "kernel": launch(*args, config=config),
        "extern": viditq_int_mm_linear(*args[:5], out_dtype=dtype),
    }.items():
        if not torch.allclose(got.float(), want.float(), rtol=tolerance.rtol, atol=tolerance.atol):
            return f"{name}: largest difference {float((got.float() - want.float()).abs().max())}"
    return None


def correctness() -> Iterator[tuple[str, str | None]]:
    """(what was checked, None or what is wrong)."""
    arch = architecture(torch.cuda.get_device_capability())
    assert arch is not None
    for known, shape_name, configs in TEMPLATE.configs:
        for config in configs if known == arch else ():
            label = f"{shape_name} {config} s{config.num_stages} w{config.num_warps}"
            for rows, depth, width in ((512, 1152, 384), (333, 1000, 200), (257, 77, 131)):
                yield f"exact {label} M{rows} K{depth} N{width}", check_exact(config, rows, depth, width)
    for rows in (*range(1, 18), 33):
        config = TEMPLATE.candidates(problem(Shape(model="", rows=rows, depth=96, width=72)))[0]
        yield f"exact M{rows}", check_exact(config, rows, 96, 72)
    wide = TEMPLATE.candidates(problem(SHAPES[0]))[0]
    for shape in (Shape(model="large", rows=4608, depth=12288, width=3072),):
        yield f"exact {shape}", check_exact(wide, shape.rows, shape.depth, shape.width)
    for dtype in EPILOGUE_TOLERANCES:
        yield f"epilogue {dtype}", check_epilogue(wide, dtype)


def quantized_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    """Quantize per token, then the W8A8 linear: two kernels when compiled."""
    x_q, x_scale = torch.ops.viditq.quantize_per_token(x, 8)
    return torch.ops.viditq.linear_w8a8(x_q, x_scale, w_q, w_scale, bias, x.dtype)


def compiled_checks() -> Iterator[tuple[str, str | None]]:
    """The same question of what Inductor makes of it, by default and autotuned; names the kernels."""
    for size, width in (((2, 1000, 1152), 1152), ((1, 77, 12288), 3072)):  # of the second K is split
        x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        w_q, w_scale = quantize_per_channel(torch.randn(width, size[-1], device="cuda") * 0.03, 8)
        args = (x, w_q, w_scale, torch.randn(width, device="cuda", dtype=torch.bfloat16))
        want = quantized_linear(*args).float()
        for mode in ("default", "max-autotune-no-cudagraphs"):
            torch._dynamo.reset()
            with kernel_log() as log:
                got = torch.compile(quantized_linear, mode=mode, dynamic=False)(*args).float()
            kernels = "; ".join(entry.kernel for entry in log.values()) or "from Inductor's cache"
            error = float((got - want).norm() / want.norm())
            label = f"compiled {mode} {tuple(size)} ({kernels})"
            yield label, None if error < 5e-3 else f"relative error {error:.2e}"


def guarded(checks: Callable[[], Iterator[tuple[str, str | None]]]) -> dict[str, str]:
    """What was checked -> "ok" or what is wrong; an exception ends the checks and is one of them."""
    results: dict[str, str] = {}
    try:
        for label, wrong in checks():
            results[label] = wrong or "ok"
            if wrong:
                print(f"WRONG {label}: {wrong}", flush=True)
    except Exception as error:  # noqa: BLE001 - the record must say what failed, whatever it was
        results[f"after {len(results)} checks"] = f"{type(error).__name__}: {str(error)[:1000]}"
        print(f"FAILED {list(results.items())[-1]}", flush=True)
    return results


def sqnr(want: list[Tensor], got: list[Tensor]) -> float:
    """dB over all results of a block or a model."""
    signal = sum(float(w.double().square().sum()) for w in want)
    noise = sum(float((w.double() - g.double()).square().sum()) for w, g in zip(want, got, strict=True))
    return float("inf") if noise == 0 else 10 * float(torch.log10(torch.tensor(signal / noise)))
