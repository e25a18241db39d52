"""Compile tiny versions of diffusers' transformers with the real backend, over five resolutions.

    PYTHONPATH=. python benchmarks/coverage.py [--only wan,flux_dev] [--layers 1] [--dtype float32]

Each model runs in a process of its own with `fullgraph=True, dynamic=True` and Inductor's generated
code, once with backend="viditq" and once with plain Inductor. The table says how many graphs each
made, what became of every linear, and the SQNR of the worst resolution against the eager model.
Where plain Inductor itself fails or is wrong, the row shows it. Random weights: this shows coverage
and correctness, not picture quality.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SIZES = (1, 0, 2, 3, 4)
"""Not rising: the first resolution is neither the smallest nor the largest."""
TIMEOUT_S = 1500


def measure(name: str, layers: int, dtype: torch.dtype) -> dict[str, Any]:
    """One model, in this process: the row of the table."""
    import viditq_fx
    from tests.models.tiny_dits import TINY_DITS, cast

    dit = TINY_DITS[name]
    model = dit.build(layers)
    inputs = [dit.make_inputs(size=size) for size in SIZES]
    if dtype != torch.float32:
        inputs = [cast(model, kwargs, dtype) for kwargs in inputs]
    if name == "zimage":  # builds its rotary tables at the first call, in a way that Dynamo cannot trace
        dit.run(model, inputs[0])
    fullgraph = name != "lumina2"  # reads lengths out of a mask and branches on them: breaks in any backend
    row: dict[str, Any] = {"model": name, "class": dit.class_name, "fullgraph": fullgraph}
    for backend in ("inductor", "viditq"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=True)
        try:
            row[backend] = run_all(dit, model, compiled, inputs)
        except Exception as error:  # noqa: BLE001 - whatever torch raises is the row's content
            row[backend] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    if "error" not in row["viditq"]:
        report = viditq_fx.explain(compiled, **inputs[-1])
        row |= {outcome: report.count(outcome) for outcome in ("quantized", "kept", "refused")}
        row["reasons"] = sorted({site.reason for site in report.sites if site.reason})
    return row


def run_all(dit: Any, model: Any, compiled: Any, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Graphs that Dynamo handed to the backend, and SQNR of each resolution in dB."""
    from torch._dynamo.utils import counters

    from tests.models.tiny_dits import sqnr

    references = [dit.run(model, kwargs) for kwargs in inputs]
    counters.clear()
    started = time.perf_counter()
    outputs = [dit.run(compiled, kwargs) for kwargs in inputs]
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "sqnr_db": [min(round(sqnr(a, b), 1), 999.0) for a, b in zip(references, outputs, strict=True)],
        "seconds": round(time.perf_counter() - started, 1),
    }


def in_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one model, from a process of its own; a failure is a row too."""
    command = [sys.executable, __file__, "--one", name, "--layers", str(args.layers), "--dtype", args.dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"model": name, "error": f"more than {TIMEOUT_S} s"}
    with contextlib.suppress(IndexError, json.JSONDecodeError):
        return json.loads(done.stdout.splitlines()[-1])
    return {"model": name, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['model']:16} FAILED: {row['error'].splitlines()[-1][:120]}"
    backends = "  ".join(f"{backend}: {outcome(row[backend])}" for backend in ("inductor", "viditq"))
    sites = "  ".join(f"{key} {row.get(key, '-')}" for key in ("quantized", "kept", "refused"))
    return f"{row['model']:16} {backends}  {sites}" + ("" if row["fullgraph"] else "  (graph breaks)")


def outcome(result: dict[str, Any]) -> str:
    """One backend's part of a row."""
    if "error" in result:
        return f"FAILED {result['error'][:60]}"
    return f"{result['graphs']} graphs {min(result['sqnr_db']):.1f} dB {result['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names separated by commas; all by default")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.layers, getattr(torch, args.dtype))))
        return
    from tests.models.tiny_dits import TINY_DITS

    rows, path = [], RESULTS / f"coverage-cpu-{args.dtype}.json"
    for name in args.only.split(",") if args.only else TINY_DITS:
        rows.append(in_process(name, args))
        print(line(rows[-1]), flush=True)
        if not args.only:  # after each, so that a run that is cut off keeps what it had
            result = {"torch": torch.__version__, "layers": args.layers, "models": rows}
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if any("error" in row or ("error" in row["viditq"] and "error" not in row["inductor"]) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
