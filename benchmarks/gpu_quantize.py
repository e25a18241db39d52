"""Time the kernels that quantize rows on one CUDA GPU against Inductor's fusion and the memory's bandwidth.

    PYTHONPATH=. python benchmarks/gpu_quantize.py [--only flux] [--minutes 7] [--resume] [--commit HASH] [--dry-run]

Nothing is timed unless the kernels agree with the ops' references on this device: ragged widths and row counts, all
dtypes, broadcasts, NaN, with memory that was filled with NaN. What is timed is a whole chain from the bf16 row in
memory to its integers. The limit is the time that its bytes, each read or written once, take at the bandwidth of a copy
of 512 MiB, which runs in the same rotation. The file is rewritten after every shape; --resume keeps the shapes in it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_timing import OPERAND_BYTES, environment, graph_of, rotate, save
from torch import Tensor

from viditq_fx.lowering.inductor_compat import wide_persistent_reductions
from viditq_fx.lowering.quantize_cuda import KERNELS, traced_op
from viditq_fx.ops.rotate import rotation_block

OURS, INDUCTOR, COPY = "viditq triton", "inductor", "copy of 512 MiB"
SAME_RUN = ("device", "torch", "triton", "commit")
CHAINS = {
    "adaln": "norm_modulate_quantize",
    "gelu": "activation_quantize",
    "swiglu": "activation_quantize",
    "rotate": "rotate_quantize",
    "rotate g128": "rotate_quantize",
}
"""What is timed -> the op that computes it."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One chain over [rows, width]."""

    model: str
    chain: str
    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.model} {self.chain} M{self.rows} K{self.width}"

    @property
    def bytes(self) -> int:
        """Each operand read once, each result written once; vectors of K are nothing beside rows."""
        groups = -(-self.width // 128) if "g128" in self.chain else 1
        return self.rows * (self.width * (5 if self.chain == "swiglu" else 3) + 4 * groups)


def _shapes() -> tuple[Shape, ...]:
    before, behind = ("adaln", "rotate", "rotate g128"), ("gelu", "swiglu", "rotate")
    widths = (
        ("flux-1024", 4608, 3072, before),
        ("flux-1024", 4608, 12288, behind),
        ("flux-1024-single", 4608, 15360, ("rotate",)),
        ("pixart-1024", 8192, 1152, before),
        ("pixart-1024", 8192, 4608, behind),
        ("wan-14b-480p", 32760, 5120, before),
        ("wan-14b-480p", 32760, 13824, behind),
    )
    return tuple(
        Shape(model=model, chain=chain, rows=rows, width=width)
        for model, rows, width, chains in widths
        for chain in chains
    )


SHAPES = _shapes()


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def operands(chain: str, x: Tensor, beside: Tensor | None = None) -> tuple[Any, ...]:
    """Arguments of the chain's op for rows x [1, M, K]; `beside` is the gate's half of a tensor [1, M, 2 K]."""
    width = x.shape[-1]
    if chain == "adaln":
        modulation = _draw(1, 1, width), _draw(1, 1, width)
        return x, "layer_norm", None, None, 1e-6, modulation[0], 1.0, modulation[1], 8
    if chain in ("gelu", "swiglu"):
        return x, "gelu_tanh" if chain == "gelu" else "silu", beside, 8
    multiplier = _draw(width, dtype=torch.float32).sign() * (0.5 + torch.rand(width, device="cuda"))
    return x, multiplier, rotation_block(width), 8, 128 if "g128" in chain else 0


def _rows(shape: Shape) -> tuple[Any, ...]:
    if shape.chain != "swiglu":
        return operands(shape.chain, _draw(1, shape.rows, shape.width))
    value, gate = _draw(1, shape.rows, 2 * shape.width).chunk(2, -1)
    return operands(shape.chain, value, gate)


def _cases() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """label -> (op, its arguments)."""
    found = {}
    for chain, op in CHAINS.items():
        for rows, width in ((1, 40), (17, 1152), (33, 3072), (5, 12288), (3, 15360)):
            for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 3 if width == 1152 else 1]:
                value, gate = _draw(1, rows, 2 * width, dtype=dtype).chunk(2, -1)
                args = operands(chain, value, gate if chain == "swiglu" else None)
                found[f"{chain} {rows}x{width} {dtype}"] = op, args
        broken = _draw(1, 17, 1152)
        broken[0, 3, 5], broken[0, 7, 0], broken[0, 9] = float("nan"), float("inf"), 0.0
        found[f"{chain} not finite"] = op, operands(chain, broken)
    by_frame = (
        _draw(2, 3, 50, 64),
        "rms_norm",
        _draw(64),
        None,
        1e-6,
        _draw(2, 1, 1, 64),
        1.0,
        _draw(3, 1, 64),
        8,
    )
    found["modulated by frame"] = "norm_modulate_quantize", by_frame
    for block in (1, 4, 16, 64, 256):
        found[f"block {block}"] = "rotate_quantize", (_draw(9, 768), None, block, 8, 0)
    return found


def _difference(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> str:
    """ "ok" or what is wrong: integers may differ by 1 where a half rounds the other way."""
    (q, s), (want_q, want_s) = got, want
    finite = want_s.isfinite()
    if not torch.equal(s.isfinite(), finite):
        return "other rows are not finite"
    scale = float(((s - want_s).abs() / want_s)[finite].max())
    off = (q.int() - want_q.int()).abs()
    share = float((off > 0).float().mean())
    good = scale < 1e-4 and int(off.max()) <= 1 and share < 2e-3
    return (
        "ok" if good else f"scale {scale:.1e}, {share:.1e} of the integers differ, by up to {int(off.max())}"
    )


def correctness() -> dict[str, str]:
    """ "ok" or what is wrong, by case: the kernel alone, and as Inductor compiles it."""
    found: dict[str, str] = {}
    references = {kernel.op.name: kernel.op.reference for kernel in KERNELS}
    compiled = {name: torch.compile(traced_op(name), dynamic=False) for name in references}
    torch.full((1 << 28,), float("nan"), device="cuda")  # freed at once: what is left unwritten is NaN
    for number, (label, (name, args)) in enumerate(_cases().items()):
        want = references[name](*args)
        runs = {"kernel": traced_op(name)} | ({"compiled": compiled[name]} if number % 4 == 0 else {})
        for how, run in runs.items():
            torch._dynamo.reset()
            try:
                found[f"{label}, {how}"] = _difference(run(*args), want)
            except Exception as problem:  # noqa: BLE001 - the record says what fails
                found[f"{label}, {how}"] = f"{type(problem).__name__}: {str(problem)[:300]}"
                torch.cuda.synchronize()
    return found


def methods(shape: Shape) -> dict[str, Callable[..., Any]]:
    """Name -> the chain of `operands`."""
    (kernel,) = (kernel for kernel in KERNELS if kernel.op.name == CHAINS[shape.chain])
    return {
        OURS: traced_op(kernel.op.name),
        INDUCTOR: torch.compile(kernel.op.overload, dynamic=False),
    }


def time_shape(shape: Shape, rounds: int) -> dict[str, Any]:
    """Every method on one shape, and a copy; one that fails is recorded with its error."""
    copies = max(2, min(8, -(-OPERAND_BYTES // shape.bytes)))
    sets = [_rows(shape) for _ in range(copies)]
    calls = max(copies, min(64, int(4e-3 * 3e12 / shape.bytes)))
    graphs, errors, pool = {}, {}, torch.cuda.graph_pool_handle()
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graphs[COPY] = graph_of(lambda _: lambda: target.copy_(source), 1, calls, pool)
    with wide_persistent_reductions():
        for name, method in methods(shape).items():
            try:
                call = lambda i, method=method: lambda: method(*sets[i])  # noqa: E731 - one a method
                graphs[name] = graph_of(call, copies, calls, pool)
            except Exception as error:  # noqa: BLE001 - one method's failure must not lose the others
                errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
                torch.cuda.synchronize()
    times = rotate(graphs, calls, rounds)
    bandwidth = 2 * source.numel() / times.pop(COPY)["p50"] * 1e6
    limit = shape.bytes / bandwidth * 1e6
    for entry in times.values():
        entry["of_the_limit"] = limit / entry["p50"]
    record = {"copies": copies, "calls": calls, "copy_tb_s": bandwidth / 1e12, "limit_us": limit}
    return {**asdict(shape), "bytes": shape.bytes, **record, "times": times, "errors": errors}


def show(shape: Shape, entry: dict[str, Any]) -> None:
    """One line a method, fastest first."""
    print(f"{shape}: limit {entry['limit_us']:.1f} us at {entry['copy_tb_s']:.2f} TB/s", flush=True)
    for name, t in sorted(entry["times"].items(), key=lambda item: item[1]["p50"]):
        spread = f"{t['p20']:9.1f} {t['p50']:9.1f} {t['p80']:9.1f} us"
        print(f"  {spread} {t['of_the_limit']:6.1%} of the limit  {name}", flush=True)
    for name, error in entry["errors"].items():
        print(f"  FAILED {name}: {error}", flush=True)


def begin(out: Path, resume: bool, commit: str | None) -> dict[str, Any]:
    """The record to go on with: that of `out` where it is of this device, these versions and this commit."""
    now = environment(commit)
    if resume and out.exists():
        record = json.loads(out.read_text())
        if all(record["environment"].get(key) == now.get(key) for key in SAME_RUN):
            return record
        print(f"{out} is of another device, version or commit: begun anew", flush=True)
    return {"environment": now, "checks": correctness(), "shapes": []}


def main() -> int:
    """0: measured. 1: a kernel is wrong on this device, nothing was timed. 2: no device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression over shape names, e.g. 'flux|rotate'")
    parser.add_argument("--rounds", type=int, default=20, help="timed replays of each method")
    parser.add_argument("--minutes", type=float, default=7, help="start no new shape after this long")
    parser.add_argument("--resume", action="store_true", help="keep the shapes that the result file has")
    parser.add_argument("--commit", help="commit hash, where the copy has no git history")
    parser.add_argument("--out", type=Path, help="result file; see benchmarks/README.md for the names")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; needs no GPU")
    options, begun = parser.parse_args(), time.monotonic()
    shapes = [shape for shape in SHAPES if re.search(options.only, str(shape))]
    if options.dry_run:
        print(json.dumps(environment(options.commit), indent=1), *shapes, OURS, INDUCTOR, COPY, sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu_quantize.py needs a CUDA device; --dry-run does not", file=sys.stderr)
        return 2
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    name = f"gpu-quantize-{device}-torch{torch.__version__.split('+')[0]}.json"
    out = options.out or Path(__file__).parent / "results" / name
    record = begin(out, options.resume, options.commit)
    save(record, out)
    wrong = {label: state for label, state in record["checks"].items() if state != "ok"}
    if wrong:
        print("a kernel is wrong on this device: nothing is timed", *wrong.items(), sep="\n")
        return 1
    print(f"{len(record['checks'])} checks ok, {time.monotonic() - begun:.0f} s", flush=True)
    done = {str(Shape(**{key: entry[key] for key in asdict(SHAPES[0])})) for entry in record["shapes"]}
    for shape in shapes:
        if str(shape) in done:
            continue
        if time.monotonic() - begun > options.minutes * 60:
            print(f"out of time before {shape}", flush=True)
            break
        torch._dynamo.reset()
        record["shapes"].append(time_shape(shape, options.rounds))
        show(shape, record["shapes"][-1])
        save(record, out)
        torch.cuda.empty_cache()
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
