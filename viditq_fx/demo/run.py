"""Run the demo: draw the same digits in full precision and quantized, measure both, write what came out."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from viditq_fx import __version__
from viditq_fx.demo.config import DemoConfig
from viditq_fx.demo.grid import draw_grid
from viditq_fx.demo.measure import gather_figures, time_in_rotation
from viditq_fx.demo.model import NULL_CLASS, load_digits_dit
from viditq_fx.demo.output import OutputFolder
from viditq_fx.demo.report import render_html, render_json
from viditq_fx.demo.result import DemoResult
from viditq_fx.demo.sampling import balanced_labels, initial_noise, sample
from viditq_fx.demo.variants import (
    ModelLoader,
    Variant,
    build_variant,
    choose_device,
    compile_variant,
    variant_names,
)


class Progress(Protocol):
    """Hears how far a run is; `viditq demo` draws bars from it."""

    def stage(self, title: str, total: int) -> None:
        """A stage with `total` units of work begins, and the one before it is done."""

    def advance(self) -> None:
        """One unit of the current stage is done."""


class Silent:
    """Progress that nobody watches."""

    def stage(self, title: str, total: int) -> None: ...

    def advance(self) -> None: ...


def run_demo(
    config: DemoConfig, load_model: ModelLoader = load_digits_dit, progress: Progress | None = None
) -> DemoResult:
    """Compare full precision with every scheme and write grid.png, table.json and report.html.

    Raises DemoError or SchemeError for settings that cannot be, OSError when the folder cannot be
    written (checked before the slow part), ImportError without diffusers, jinja2 or matplotlib.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    device = choose_device(config.device)
    with OutputFolder(config.out) as out:
        variants = _prepare(config, load_model, device, progress)
        labels = balanced_labels(config.images_per_seed)
        images, recorded = _draw(config, variants, labels, progress)
        progress.stage("time one step of each, in turn", config.timing_rounds * len(variants))
        timings = time_in_rotation(variants, recorded[0], config.timing_rounds, progress.advance)
        progress.stage("judge the images, write the report", 2)
        result = DemoResult(
            variants=gather_figures(config, variants, images, labels, timings, recorded),
            settings=_settings(config, variants),
            machine=describe_machine(device),
        )
        progress.advance()
        grid = draw_grid({name: drawn[0] for name, drawn in images.items()}, labels, seed=config.seed)
        result.seconds = time.perf_counter() - start
        out.write("grid.png", grid)
        out.write("table.json", render_json(result).encode())
        out.write("report.html", render_html(result, grid).encode())
        progress.advance()
    return result


def _prepare(
    config: DemoConfig, load_model: ModelLoader, device: torch.device, progress: Progress
) -> list[Variant]:
    """Load and compile every variant for the one shape that sampling uses."""
    names = variant_names(config, device)
    rows = 2 * config.batch_size
    inputs = {
        "hidden_states": initial_noise(rows, config.seed),
        "timestep": torch.full((rows,), 1000.0),
        "class_labels": torch.full((rows,), NULL_CLASS),
        "return_dict": False,
    }
    # Stale code of an earlier run in this process would count against Dynamo's recompile limit.
    torch.compiler.reset()
    variants = []
    for name in names:
        progress.stage(f"compile {name}", 1)
        variants.append(build_variant(name, load_model, device))
        compile_variant(variants[-1], inputs)
        progress.advance()
    return variants


def _draw(
    config: DemoConfig, variants: Sequence[Variant], labels: Tensor, progress: Progress
) -> tuple[dict[str, list[Tensor]], list[dict[str, Any]]]:
    """(images of every seed by variant, inputs of a few steps that full precision took)."""
    calls = -(-config.images_per_seed // config.batch_size) * config.steps
    baseline = variants[0]
    # An early, a middle and a late step: quantization errs differently on noise and on images.
    baseline.record = frozenset(int(config.steps * part) for part in (0.1, 0.5, 0.9))
    images: dict[str, list[Tensor]] = {variant.name: [] for variant in variants}
    progress.stage(
        f"draw {config.images} digits with each of {len(variants)}", calls * len(config.seeds) * len(variants)
    )
    for seed in config.seeds:
        for variant in variants:
            drawn = sample(
                variant,
                labels=labels,
                seed=seed,
                steps=config.steps,
                batch_size=config.batch_size,
                progress=lambda done, total: progress.advance(),
                device=variant.device,
                dtype=variant.dtype,
            )
            images[variant.name].append(drawn)
    return images, list(baseline.recorded.values())


def _settings(config: DemoConfig, variants: Sequence[Variant]) -> dict[str, Any]:
    return {
        "command": config.command,
        "images": config.images,
        "seeds": list(config.seeds),
        "images_per_seed": config.images_per_seed,
        "steps": config.steps,
        "guidance": 2.0,
        "rows_per_step": 2 * config.batch_size,
        "timing_rounds": config.timing_rounds,
        "variants": [variant.name for variant in variants],
        "model": type(variants[0].model).__name__,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that the figures hold for."""
    import diffusers

    machine = {
        "viditq_fx": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def cpu_name() -> str:
    """The CPU's model name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
