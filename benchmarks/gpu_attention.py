"""Time int8 attention, P V in 16 or 8 bits, on one CUDA GPU against bf16 SDPA and SageAttention; correctness first.

    PYTHONPATH=. python benchmarks/gpu_attention.py [--only wan] [--minutes 7] [--commit HASH] [--dry-run]

Nothing is timed unless the kernel agrees with the op's reference on this device: ragged lengths, masks, causality,
grouped heads, widths of 40 to 256, with memory that was filled with NaN. Times include quantizing queries and keys
(compiled with the kernel, as in a model). Methods run in rotation, each as a CUDA graph; the file is rewritten after
every shape. Cosine and relative L1 against fp32 SDPA on a slice of the queries stand beside every time.
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
from gpu_timing import environment, graph_of, rotate, save
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from viditq_fx.lowering.attention_cuda import VALUES, traced_op
from viditq_fx.ops.base import QuantOp
from viditq_fx.ops.fp8 import why_no_fp8

OURS = {
    "int8 QK, viditq compiled": "16 bits",
    "int8 QK, viditq fp8 PV": "fp8",
    "int8 QK, viditq int8 PV": "int8",
}
"""Name -> what P V is computed in."""
LARGEST_ERROR = {"16 bits": 1e-2, "fp8": 3e-2, "int8": 3e-2}
"""Relative L1 against the op's reference: it rounds P beside another maximum than the kernel."""
BACKENDS = {
    "bf16 SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "bf16 SDPA flash": SDPBackend.FLASH_ATTENTION,
    "bf16 SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CHECKED_QUERIES = 256
NO_OPTIONS = (None, False, None, False)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One self attention: q, k, v [batch, heads, length, head]."""

    model: str
    batch: int
    heads: int
    length: int
    head: int

    def __str__(self) -> str:
        return f"{self.model} B{self.batch} H{self.heads} L{self.length} D{self.head}"

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.length**2 * self.head


SHAPES = (
    Shape(model="flux-1024", batch=1, heads=24, length=4608, head=128),
    Shape(model="pixart-1024", batch=2, heads=16, length=4096, head=72),
    Shape(model="sd35-large", batch=2, heads=38, length=4250, head=64),
    Shape(model="cogvideox-5b", batch=2, heads=48, length=17776, head=64),
    Shape(model="wan-14b-480p", batch=1, heads=40, length=32760, head=128),
    Shape(model="wan-14b-720p", batch=1, heads=40, length=75600, head=128),
)


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _cases() -> dict[str, tuple[Any, ...]]:
    """Operands of the op, by what is odd about them."""
    many, few = (1, 4, 333, 64), (1, 2, 200, 64)
    self_ = {
        f"head {d}": tuple(_draw(2, 3, 300, d) for _ in "qkv") + NO_OPTIONS for d in (40, 64, 72, 128, 256)
    }
    lengths = {
        f"length {n}": tuple(_draw(1, 2, n, 64) for _ in "qkv") + NO_OPTIONS for n in (1, 17, 128, 1000)
    }
    keep = torch.rand(1, 1, 333, 200, device="cuda") > 0.5
    keep[..., 5, :] = False
    q, k, v = _draw(*many), _draw(*few), _draw(*few)
    return {
        **self_,
        **lengths,
        "causal": (*(_draw(1, 2, 300, 64) for _ in "qkv"), None, True, None, False),
        "grouped": (q, k, v, None, False, None, True),
        "bool mask, a row of nothing": (q, k, v, keep, False, None, True),
        "additive mask": (q, k, v, _draw(333, 200), False, 0.2, True),
        "fp16": (*(_draw(1, 2, 300, 64, dtype=torch.float16) for _ in "qkv"), *NO_OPTIONS),
        "token-major": (*(_draw(1, 300, 2, 64).transpose(1, 2) for _ in "qkv"), *NO_OPTIONS),
        "scores of 1e4": (
            100 * _draw(1, 2, 300, 64),
            *(100 * _draw(1, 2, 300, 64) for _ in "kv"),
            *NO_OPTIONS,
        ),
    }


def ours() -> dict[str, tuple[QuantOp, str]]:
    """Name -> (op, what P V is computed in) of what this device multiplies."""
    lack = why_no_fp8(torch.device("cuda"))
    ops = {values: op for op, values in VALUES}
    return {name: (ops[values], values) for name, values in OURS.items() if not (lack and values == "fp8")}


def correctness() -> dict[str, str]:
    """ "ok" or what is wrong, by case: the kernel alone, and as Inductor compiles it."""
    return {
        f"{name}: {case}": state
        for name, (op, values) in ours().items()
        for case, state in _correct(op, values).items()
    }


def _correct(op: QuantOp, values: str) -> dict[str, str]:
    found: dict[str, str] = {}
    compiled = torch.compile(lambda *args: traced_op()(*args, values), dynamic=True)
    torch.full(
        (1 << 28,), float("nan"), device="cuda"
    )  # freed at once: what the kernel leaves unwritten is NaN
    for label, args in _cases().items():
        want = op.reference(*args).float()
        for name, run in (("kernel", lambda *args: traced_op()(*args, values)), ("compiled", compiled)):
            try:
                got = run(*args).float()
                error = float((got - want).abs().sum() / want.abs().sum())
                # bf16 P is rounded against another running maximum; a score of 1e4 has an ulp of 1e-3.
                good = bool(got.isfinite().all()) and error < (
                    5e-2 if label == "scores of 1e4" else LARGEST_ERROR[values]
                )
                found[f"{label}, {name}"] = "ok" if good else f"relative L1 {error:.2e}"
            except Exception as problem:  # noqa: BLE001 - the record says what fails
                found[f"{label}, {name}"] = f"{type(problem).__name__}: {str(problem)[:300]}"
                torch.cuda.synchronize()
    return found


def methods() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> attention of q, k, v."""

    def backend(kind: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    found: dict[str, Callable[..., Tensor]] = {name: backend(kind) for name, kind in BACKENDS.items()}
    for name, (_, values) in ours().items():
        found[name] = torch.compile(
            lambda q, k, v, values=values: traced_op()(q, k, v, *NO_OPTIONS, values), dynamic=False
        )
    try:
        from sageattention import sageattn
    except ImportError:
        return found
    found["int8 QK, SageAttention"] = lambda q, k, v: sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return found


def _quality(got: Tensor, q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    part = slice(0, min(CHECKED_QUERIES, q.shape[2]))
    want = F.scaled_dot_product_attention(q[:, :, part].float(), k.float(), v.float()).flatten()
    flat = got[:, :, part].float().flatten()
    cosine = float(F.cosine_similarity(flat, want, dim=0))
    return {"cosine": cosine, "relative_l1": float((flat - want).abs().sum() / want.abs().sum())}


def time_shape(shape: Shape, rounds: int) -> dict[str, Any]:
    """Every method on one shape; one that fails is recorded with its error."""
    size = (shape.batch, shape.length, shape.heads, shape.head)
    q, k, v = (_draw(*size).transpose(1, 2) for _ in "qkv")  # token-major, as projections leave them
    calls = max(1, min(16, int(4e-3 * 3e14 / shape.flops)))
    graphs, errors, quality, pool = {}, {}, {}, torch.cuda.graph_pool_handle()
    for name, method in methods().items():
        try:
            quality[name] = _quality(method(q, k, v), q, k, v)
            graphs[name] = graph_of(lambda _, method=method: lambda: method(q, k, v), 1, calls, pool)
        except Exception as error:  # noqa: BLE001 - one method's failure must not lose the others
            errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
            torch.cuda.synchronize()
    times = rotate(graphs, calls, rounds)
    base = min((t["p50"] for name, t in times.items() if name in BACKENDS), default=float("nan"))
    for name, entry in times.items():
        entry |= {"tflops": shape.flops / entry["p50"] / 1e6, "speedup": base / entry["p50"], **quality[name]}
    return {**asdict(shape), "calls": calls, "times": times, "errors": errors}


def show(shape: Shape, entry: dict[str, Any]) -> None:
    """One line a method, fastest first; the speed-up is over the fastest bf16 backend."""
    print(shape, flush=True)
    for name, t in sorted(entry["times"].items(), key=lambda item: item[1]["p50"]):
        spread = f"{t['p20']:9.1f} {t['p50']:9.1f} {t['p80']:9.1f} us {t['tflops']:6.0f} TFLOP/s"
        quality = f"cosine {t['cosine']:.5f} rel L1 {t['relative_l1']:.4f}"
        print(f"  {spread} {t['speedup']:5.2f}x  {quality}  {name}", flush=True)
    for name, error in entry["errors"].items():
        print(f"  FAILED {name}: {error}", flush=True)


def main() -> int:
    """0: measured. 1: the kernel is wrong on this device, nothing was timed. 2: no device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression over shape names, e.g. 'flux|wan'")
    parser.add_argument("--rounds", type=int, default=15, help="timed replays of each method")
    parser.add_argument("--minutes", type=float, default=7, help="start no new shape after this long")
    parser.add_argument("--commit", help="commit hash, where the copy has no git history")
    parser.add_argument("--out", type=Path, help="result file; see benchmarks/README.md for the names")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; needs no GPU")
    options, begun = parser.parse_args(), time.monotonic()
    shapes = [shape for shape in SHAPES if re.search(options.only, str(shape))]
    if options.dry_run:
        print(json.dumps(environment(options.commit), indent=1), *shapes, *BACKENDS, *OURS, sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu_attention.py needs a CUDA device; --dry-run does not", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "environment": environment(options.commit),
        "checks": correctness(),
        "shapes": [],
    }
    device = re.sub(r"[^a-z0-9]+", "-", record["environment"]["device"].lower()).strip("-")
    name = f"gpu-attention-{device}-torch{torch.__version__.split('+')[0]}.json"
    out = options.out or Path(__file__).parent / "results" / name
    save(record, out)
    wrong = {label: state for label, state in record["checks"].items() if state != "ok"}
    if wrong:
        print("the kernel is wrong on this device: nothing is timed", *wrong.items(), sep="\n")
        return 1
    print(f"{len(record['checks'])} checks ok, {time.monotonic() - begun:.0f} s", flush=True)
    for shape in shapes:
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
