"""What the GPU benchmarks share: CUDA graphs timed in rotation, the machine they ran on, the file of results."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
OPERAND_BYTES = 200 << 20
"""Operands rotate over at least this much memory: more than any L2 (126 MiB on B200)."""
Method = Callable[[], Any]


def graph_of(call: Callable[[int], Method], copies: int, calls: int, pool: Any) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls` calls over rotating copies of the operands.

    All graphs of a shape share a memory pool: they run one after another and nobody reads their results.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(3, copies)):
            call(i)()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for i in range(calls):
            call(i % copies)()
    return graph


def rotate(graphs: dict[str, torch.cuda.CUDAGraph], calls: int, rounds: int) -> dict[str, dict[str, float]]:
    """Replay each graph once a round: microseconds of one call as 20th, 50th, 80th percentile."""
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number >= 2:  # two rounds of warm-up
                samples[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: _percentiles(times) for name, times in samples.items()}


def _percentiles(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=10)
    return {"p20": cuts[1], "p50": statistics.median(times), "p80": cuts[7], "rounds": len(times)}


def environment(commit: str | None) -> dict[str, Any]:
    """Hardware, versions, commit."""
    import triton

    known = (
        commit
        or subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    record = {
        "commit": known or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        props = torch.cuda.get_device_properties(0)
        capability = f"sm_{props.major}{props.minor}"
        record |= {"device": props.name, "capability": capability, "sms": props.multi_processor_count}
    return record


def save(record: dict[str, Any], out: Path) -> None:
    """Write the file whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    temporary.replace(out)
