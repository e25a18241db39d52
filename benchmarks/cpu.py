"""Time int8 against fp32 and the CPU peers on one machine, in one run, in rotation.

    python benchmarks/cpu.py [--isa native|avx512|avx2] [--rounds 15] [--cases linears,block-256,...]

Cases: "linears", a lone linear at DiT-XL/2's shapes, activation quantization included (M x K x N of 256 x 1152 x
4608, 1024 x 1152 x 4608 and 4096 x 1152 x 1152); a DiT-XL/2-size block (1152 wide, 16 heads, 4608 hidden) over
256 and 1024 tokens, batch 1; the demo's digits DiT (one step, batch 64). Variants: eager fp32, Inductor fp32,
torch's own `quantize_dynamic`, torchao's int8 dynamic (compiled), and this package's schemes; `--variants` is a
regular expression over their names (the baseline always runs).

Every round times each variant once, so a noisy machine is noisy for all; figures are medians, with
the 20th and 80th percentile. Each variant's error is printed beside its time: SQNR against fp32.
`--isa` keeps oneDNN, MKL, ATen and FBGEMM (which `quantize_dynamic` uses) from newer instructions, to see what a
CPU without VNNI would run; our 4-bit kernel under avx512 still finds VNNI. A result file says so in its name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESULTS = Path(__file__).parent / "results"
_ISA = {
    "native": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
_MARK = "VIDITQ_BENCH_ISA"
BASELINE = "inductor fp32"
LINEARS = ((256, 1152, 4608), (1024, 1152, 4608), (4096, 1152, 1152))
"""M, K, N."""


class DiTBlock(nn.Module):
    """adaLN-zero block of DiT-XL/2: 1152 wide, 16 heads, 4608 hidden, modulation given."""

    def __init__(self, width: int = 1152, heads: int = 16, ratio: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, S, C], modulation [B, 6, C] -> [B, S, C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(2).unbind(1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v)
        )
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.to_out(a)
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


@dataclass(kw_only=True)
class Row:
    """One variant of one case."""

    case: str
    variant: str
    p50_ms: float = float("nan")
    p20_ms: float = float("nan")
    p80_ms: float = float("nan")
    ratio: float = float("nan")
    """Median time of Inductor fp32 over this variant's: above 1 is faster."""
    sqnr_db: float = float("nan")
    compile_s: float = float("nan")
    kernels: list[str] = field(default_factory=list)
    error: str | None = None


def cases(names: list[str]) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[Any, ...]]]:
    """(name, maker of the model with fixed weights, inputs of one step)."""
    gen = torch.Generator().manual_seed(0)
    for rows, depth, width in LINEARS if "linears" in names else ():
        x = torch.randn(rows, depth, generator=gen)
        yield f"linear-{rows}x{depth}x{width}", partial(_linear, depth, width), (x,)
    for tokens in (256, 1024):
        if f"block-{tokens}" in names:
            x = torch.randn(1, tokens, 1152, generator=gen)
            yield f"block-{tokens}", _block, (x, 0.3 * torch.randn(1, 6, 1152, generator=gen))
    if "demo" in names:
        from viditq_fx.demo.model import load_digits_dit

        x = torch.randn(64, 1, 32, 32, generator=gen)
        yield "demo", load_digits_dit, (x, torch.full((64,), 500.0), torch.arange(64) % 10)


def _linear(depth: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(depth, width)).eval().requires_grad_(False)


def _block() -> nn.Module:
    torch.manual_seed(0)
    return DiTBlock().eval().requires_grad_(False)


def _quantize_dynamic(model: nn.Module) -> Any:
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _torchao(model: nn.Module) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model)


def _viditq(scheme: str, model: nn.Module) -> Any:
    return torch.compile(model, backend="viditq", options={"scheme": scheme})


SCHEMES = ("w8a8", "w8a7", "w4a8", "w4a8-g128", "w8a8-rot", "w4a8-rot", "dvd-w4a8", "dvd-w4a4")
VARIANTS: dict[str, Callable[[nn.Module], Any]] = {
    "eager fp32": lambda model: model,
    BASELINE: lambda model: torch.compile(model),
    "torch quantize_dynamic": _quantize_dynamic,
    "torchao int8 dynamic, compiled": _torchao,
    **{f"viditq {scheme}": partial(_viditq, scheme) for scheme in SCHEMES},
}


def _output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _sqnr(reference: Tensor, got: Tensor) -> float:
    noise = (reference.double() - got.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(reference.double().square().sum() / noise))


def _prepare(case: str, name: str, make: Callable[[], nn.Module], inputs: tuple[Any, ...]) -> tuple[Row, Any]:
    from viditq_fx.runtime import executions

    row = Row(case=case, variant=name)
    torch._dynamo.reset()
    try:
        start = time.perf_counter()
        run = VARIANTS[name](make())
        with executions() as ran:
            run(*inputs)
        row.compile_s = time.perf_counter() - start
        row.kernels = sorted({s.kernel for e in ran for s in e.report.sites if s.kernel})
    except (RuntimeError, ImportError, NotImplementedError) as error:
        # Raised by torch itself, or a missing torchao: this peer cannot run here, and its row says why.
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return row, None
    return row, run


def bench_case(
    case: str, make: Callable[[], nn.Module], inputs: tuple[Any, ...], rounds: int, variants: str = ""
) -> list[Row]:
    """Time every variant of a case in rotation; a variant that takes over 2 s runs three times only."""
    reference = _output(make()(*inputs))
    names = [name for name in VARIANTS if name == BASELINE or re.search(variants, name)]
    prepared = [_prepare(case, name, make, inputs) for name in names]
    times: dict[str, list[float]] = {row.variant: [] for row, _ in prepared}
    for index in range(rounds):
        for row, run in prepared:
            slow = times[row.variant] and times[row.variant][0] > 2.0
            if run is None or (slow and index >= 3):
                continue
            start = time.perf_counter()
            result = run(*inputs)
            times[row.variant].append(time.perf_counter() - start)
            row.sqnr_db = _sqnr(reference, _output(result))
    for row, _ in prepared:
        if times[row.variant]:
            cuts = (
                statistics.quantiles(times[row.variant], n=10) if len(times[row.variant]) > 1 else [0.0] * 9
            )
            row.p50_ms = 1e3 * statistics.median(times[row.variant])
            row.p20_ms, row.p80_ms = 1e3 * cuts[1], 1e3 * cuts[7]
    base = next(row.p50_ms for row, _ in prepared if row.variant == BASELINE)
    for row, _ in prepared:
        row.ratio = base / row.p50_ms
        note = row.error or f"{row.p50_ms:9.2f} ms [{row.p20_ms:.2f}, {row.p80_ms:.2f}]  {row.ratio:5.2f}x"
        print(
            f"{case:21} {row.variant:31} {note}  SQNR {row.sqnr_db:5.1f} dB  {' '.join(row.kernels)}",
            flush=True,
        )
    return [row for row, _ in prepared]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    units = [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in flags.split()
    ]
    return f"{names[0] if names else platform.processor()}, {len(names)} threads ({', '.join(units)})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", choices=sorted(_ISA), default="native")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", default="linears,block-256,block-1024,demo")
    parser.add_argument("--variants", default="", help="regular expression over variants, e.g. 'viditq'")
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/cpu-<isa>.json")
    options = parser.parse_args()
    if options.isa != "native" and os.environ.get(_MARK) != options.isa:  # libraries read these at start-up
        # Inductor's cache key has no vector width: code of one must not be found by a process of another.
        with tempfile.TemporaryDirectory() as cache:
            env = {**os.environ, **_ISA[options.isa], _MARK: options.isa, "TORCHINDUCTOR_CACHE_DIR": cache}
            return subprocess.call([sys.executable, *sys.argv], env=env)
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    with torch.no_grad():
        for case, make, inputs in cases(options.cases.split(",")):
            rows += bench_case(case, make, inputs, options.rounds, options.variants)
    out = options.out or RESULTS / f"cpu-{options.isa}.json"
    record = {
        "command": f"python benchmarks/cpu.py --isa {options.isa} --rounds {options.rounds} --cases {options.cases}"
        + (f" --variants '{options.variants}'" if options.variants else ""),
        "cpu": _cpu(),
        "isa_limit": _ISA[options.isa],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "baseline": BASELINE,
        "rows": [asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    temporary.replace(out)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
