"""Time the quantized GEMMs on one CUDA GPU against bf16, int8 and fp8 peers; correctness comes first.

    PYTHONPATH=. python benchmarks/gpu.py [--sweep] [--write-tuned] [--only flux] [--minutes 7] [--dry-run]

Nothing is timed unless the kernel is exact on this device: every int32 sum equal to an fp64 matrix
product, for odd shapes, M = 1..17 and every config. The other schemes (w4a8, w4a8 and w4a4 with input scales of
blocks, each with weight groups of 128, of 64 and without; fp8) and the variants of the kernel (split-K, persistent,
TMA) are checked in the same way, and one that is wrong is left out alone. Methods of one shape are timed in rotation,
each as a CUDA graph of several calls over rotating operands (more than L2 holds), so that neither launch cost nor a
warm cache nor the clock favours one. The result file is rewritten after every shape.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_checks import SHAPES, Shape, compiled_checks, correctness, guarded, problem, quantized_linear
from gpu_schemes import SCHEMES, method_names, scheme_checks, scheme_methods
from gpu_timing import OPERAND_BYTES, ROOT, Method, environment, graph_of, rotate, save
from gpu_tuned import PREFIX, tuned_file, tuned_methods
from gpu_variants import VARIANTS, variant_checks, variant_methods, variant_names
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.lowering.inductor_compat import wide_persistent_reductions
from viditq_fx.lowering.install import install
from viditq_fx.lowering.tuned_configs import write_tuned
from viditq_fx.ops.linear import linear_epilogue
from viditq_fx.ops.quantize import quantize_per_channel, quantize_per_token
from viditq_fx.triton_templates.base import GemmConfig
from viditq_fx.triton_templates.linear_w8a8 import TEMPLATE, launch

BASELINE = "bf16 cuBLAS"
OURS_COMPILED = "int8 quantize + GEMM, viditq compiled"


# ---------------------------------------------------------------------------------------- methods


@dataclass(frozen=True, kw_only=True)
class Operands:
    """One copy of a shape's tensors."""

    x: Tensor
    w: Tensor
    bias: Tensor
    x_q: Tensor
    x_scale: Tensor
    w_q: Tensor
    w_scale: Tensor

    @classmethod
    def make(cls, shape: Shape) -> Operands:
        x = torch.randn(shape.rows, shape.depth, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(shape.width, shape.depth, device="cuda", dtype=torch.bfloat16) * shape.depth**-0.5
        x_q, x_scale = quantize_per_token(x, 8)
        w_q, w_scale = quantize_per_channel(w, 8)
        bias = torch.randn(shape.width, device="cuda", dtype=torch.bfloat16)
        return cls(x=x, w=w, bias=bias, x_q=x_q, x_scale=x_scale, w_q=w_q, w_scale=w_scale)

    @property
    def integers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a kernel takes: both operands with their scales, and the bias."""
        return self.x_q, self.x_scale, self.w_q, self.w_scale, self.bias


def _bf16(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, w, bias)


def _int_mm_with_scales(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    acc_MN = torch._int_mm(x_q, w_q.t())
    return linear_epilogue(acc_MN, x_scale, w_scale, bias, torch.bfloat16)


def _dynamic_int_mm(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    return _int_mm_with_scales(*quantize_per_token(x, 8), w_q, w_scale, bias)


def _peer_name() -> str:
    try:
        import torchao
    except ImportError:
        return "int8 quantize + torch._int_mm + scales, compiled (torchao is not installed)"
    return f"int8 torchao {torchao.__version__} dynamic, compiled"


def _peer(operands: list[Operands]) -> Callable[[int], Method]:
    """copy -> torchao's int8 dynamic linear, or the substitute that `_peer_name` names."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        fast = torch.compile(_dynamic_int_mm, dynamic=False)
        return lambda i: lambda: fast(operands[i].x, operands[i].w_q, operands[i].w_scale, operands[i].bias)
    width, depth = operands[0].w.shape
    layers = []
    for o in operands:
        layer = torch.nn.Sequential(torch.nn.Linear(depth, width, device="cuda", dtype=torch.bfloat16))
        layer[0].weight.data, layer[0].bias.data = o.w, o.bias
        quantize_(layer.requires_grad_(False), Int8DynamicActivationInt8WeightConfig())
        layers.append(layer)
    run = torch.compile(lambda layer, x: layer(x), dynamic=False)
    return lambda i: lambda: run(layers[i], operands[i].x)


def methods(shape: Shape, o: list[Operands]) -> dict[str, Callable[[], Callable[[int], Method]]]:
    """Name -> maker of (copy -> call). Names that say "quantize" include quantizing the input."""
    best = TEMPLATE.candidates(problem(shape))[0]

    def compiled(function: Callable[..., Any], *fields: str) -> Callable[[int], Method]:
        fast = torch.compile(function, dynamic=False)
        return lambda i: lambda: fast(*(getattr(o[i], name) for name in fields))

    integers = ("x_q", "x_scale", "w_q", "w_scale", "bias")
    return {
        BASELINE: lambda: lambda i: lambda: F.linear(o[i].x, o[i].w, o[i].bias),
        "bf16 compiled": lambda: compiled(_bf16, "x", "w", "bias"),
        "int8 GEMM only, viditq": lambda: (
            lambda i: lambda: launch(*o[i].integers, torch.bfloat16, config=best)
        ),
        "int8 GEMM only, torch._int_mm + scales, compiled": lambda: compiled(_int_mm_with_scales, *integers),
        OURS_COMPILED: lambda: compiled(quantized_linear, "x", "w_q", "w_scale", "bias"),
        _peer_name(): lambda: _peer(o),
    }


# ------------------------------------------------------------------------------------------ sweep


def _sweep() -> Iterator[GemmConfig]:
    tiles = [
        GemmConfig(block_m=m, block_n=n, block_k=128, num_stages=3, num_warps=8)
        for m, n in ((128, 128), (128, 256), (256, 128))
    ]
    for tile in tiles:
        for depth in (64, 128):
            for stages in (3, 4):
                yield replace(tile, block_k=depth, num_stages=stages)
    for group in (1, 4, 16):
        for tile in tiles[1:]:
            yield replace(tile, group_m=group)
    yield GemmConfig(block_m=128, block_n=128, block_k=128, num_stages=4, num_warps=4)
    yield GemmConfig(block_m=64, block_n=256, block_k=128, num_stages=4, num_warps=4)
    yield GemmConfig(block_m=64, block_n=256, block_k=128, num_stages=4, num_warps=8)


SWEEP = tuple(_sweep())


def compile_one(shape: Shape, config: GemmConfig) -> None:
    """Fill Triton's disk cache for this shape and config: runs in a process of its own.

    M is an argument of the kernel, specialized only by whether 16 divides it: few rows stand for many.
    """
    few = Shape(
        model=shape.model, rows=16 if shape.rows % 16 == 0 else 24, depth=shape.depth, width=shape.width
    )
    o = Operands.make(few)
    launch(*o.integers, torch.bfloat16, config=config)


def precompile(shapes: list[Shape], configs: tuple[GemmConfig, ...]) -> None:
    """Compile a sweep on many cores; what fails here fails again, and is reported, where it is timed."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=spawn) as pool:
        jobs = [pool.submit(compile_one, shape, config) for shape in shapes for config in configs]
        failed = sum(job.exception() is not None for job in jobs)
    print(f"compiled {len(jobs) - failed} of {len(jobs)} kernels of the sweep", flush=True)


# ----------------------------------------------------------------------------------------- timing


def time_shape(
    shape: Shape, options: argparse.Namespace, skip: set[str], schemes: list[str], variants: list[str]
) -> dict[str, Any]:
    """Every method on one shape; a method that fails is recorded with its error and left out."""
    copies = max(2, min(8, -(-OPERAND_BYTES // (shape.depth * (shape.rows + shape.width)))))
    operands = [Operands.make(shape) for _ in range(copies)]
    flops = 2 * shape.rows * shape.depth * shape.width
    calls = max(copies, min(32, int(4e-3 * 5e14 / flops)))
    makers = methods(shape, operands) | scheme_methods(shape, operands, schemes)
    makers |= variant_methods(shape, operands, variants)
    if options.write_tuned:
        makers |= tuned_methods(shape, operands, schemes, variants)
    if options.sweep:
        for config in SWEEP:
            label = f"sweep {config} s{config.num_stages} w{config.num_warps} g{config.group_m}"
            makers[label] = lambda config=config: (
                lambda i: lambda: launch(*operands[i].integers, torch.bfloat16, config=config)
            )
    graphs, errors, pool = {}, {}, torch.cuda.graph_pool_handle()
    for name, maker in makers.items():
        if name in skip:
            continue
        try:
            graphs[name] = graph_of(maker(), copies, calls, pool)
        except Exception as error:  # noqa: BLE001 - one method's failure must not lose the others
            errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
            torch.cuda.synchronize()
    times = rotate(graphs, calls, options.rounds)
    for entry in times.values():
        entry["tflops"] = flops / entry["p50"] / 1e6
        if BASELINE in times:
            entry["speedup"] = times[BASELINE]["p50"] / entry["p50"]
    chosen = str(TEMPLATE.candidates(problem(shape))[0])
    return {
        **asdict(shape),
        "copies": copies,
        "calls": calls,
        "config": chosen,
        "times": times,
        "errors": errors,
    }


# ------------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true", help=f"time {len(SWEEP)} more configs a shape")
    parser.add_argument(
        "--write-tuned", action="store_true", help="time every kernel that could be chosen; keep the fastest"
    )
    parser.add_argument("--only", default="", help="regular expression over shape names, e.g. 'flux|wan'")
    parser.add_argument("--rounds", type=int, default=30, help="timed replays of each method")
    parser.add_argument("--minutes", type=float, default=7, help="start no new shape after this long")
    parser.add_argument("--commit", help="commit hash, where the copy has no git history")
    parser.add_argument("--out", type=Path, help="result file; see benchmarks/README.md for the names")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; needs no GPU")
    return parser.parse_args()


def main() -> int:
    """0: measured. 1: the kernel is wrong on this device, nothing was timed. 2: no device."""
    options, begun = arguments(), time.monotonic()
    shapes = [shape for shape in SHAPES if re.search(options.only, str(shape))]
    if options.dry_run:
        print(json.dumps(environment(options.commit), indent=1), *shapes, sep="\n")
        print("and at each of them, beside what w8a8 is compared with:", *method_names(), sep="\n  ")
        for what, shape in (("up to 128", next(s for s in SHAPES if s.rows <= 128)), ("more", SHAPES[0])):
            print(f"variants of the kernel at {what} rows:", *variant_names(shape), sep="\n  ")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; --dry-run does not", file=sys.stderr)
        return 2
    record: dict[str, Any] = {"environment": environment(options.commit), "checks": {}, "shapes": []}
    device = re.sub(r"[^a-z0-9]+", "-", record["environment"]["device"].lower()).strip("-")
    name = (
        f"gpu-linear-{device}-torch{torch.__version__.split('+')[0]}{'-sweep' if options.sweep else ''}.json"
    )
    out = options.out or Path(__file__).parent / "results" / name
    record["checks"] = guarded(correctness)
    save(record, out)
    if any(state != "ok" for state in record["checks"].values()):
        print("the kernel is wrong on this device: nothing is timed")
        return 1
    print(f"{len(record['checks'])} checks ok, {time.monotonic() - begun:.0f} s", flush=True)
    install()
    with wide_persistent_reductions():
        record["checks_compiled"] = guarded(compiled_checks)
        print(*record["checks_compiled"].items(), sep="\n", flush=True)
        skip = set() if set(record["checks_compiled"].values()) == {"ok"} else {OURS_COMPILED}
        record["checks_schemes"] = {name: guarded(partial(scheme_checks, name)) for name in SCHEMES}
        schemes = right(record["checks_schemes"])
        print(f"schemes that are right here: {', '.join(schemes) or 'none'}", flush=True)
        record["checks_variants"] = {name: guarded(partial(variant_checks, name)) for name in VARIANTS}
        variants = right(record["checks_variants"])
        print(f"variants that are right here: {', '.join(variants) or 'none'}", flush=True)
        if options.sweep:
            precompile(shapes, SWEEP)
        for shape in shapes:
            if time.monotonic() - begun > options.minutes * 60:
                print(f"out of time before {shape}", flush=True)
                break
            try:
                record["shapes"].append(time_shape(shape, options, skip, schemes, variants))
                show(record["shapes"][-1], shape, time.monotonic() - begun)
            except Exception:  # noqa: BLE001 - one failing shape must not lose the rest
                record["shapes"].append({**asdict(shape), "error": traceback.format_exc()[-2000:]})
                print(f"FAILED {shape}\n{record['shapes'][-1]['error']}", flush=True)
            save(record, out)
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    print(f"wrote {out}")
    if options.write_tuned:
        capability = record["environment"]["capability"]
        tuned = ROOT / "viditq_fx" / "lowering" / "tuned" / f"{capability}-{device}.json"
        write_tuned(tuned, tuned_file(record))
        print(f"wrote {tuned}")
    return 0


def right(checks: dict[str, dict[str, str]]) -> list[str]:
    """What was checked and found right in every case."""
    return [name for name, found in checks.items() if set(found.values()) == {"ok"}]


def show(entry: dict[str, Any], shape: Shape, seconds: float) -> None:
    """One line a method, fastest first; of a sweep the best five."""
    print(f"{shape} (config {entry['config']}, {seconds:.0f} s)", flush=True)
    shown = sorted(entry["times"].items(), key=lambda item: item[1]["p50"])
    swept = [name for name, _ in shown if name.startswith(("sweep", PREFIX))][5:]
    for name, t in shown:
        if name not in swept:
            spread = f"{t['p20']:8.1f} {t['p50']:8.1f} {t['p80']:8.1f} us"
            print(f"  {spread} {t['tflops']:7.0f} TFLOP/s {t.get('speedup', 0):5.2f}x  {name}", flush=True)
    for name, error in entry["errors"].items():
        if not name.startswith("sweep"):
            print(f"  FAILED {name}: {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
