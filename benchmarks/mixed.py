"""Mixed precision on the video DiT: metric-decoupled, by squared error alone, and none, at one budget of bits.

    PYTHONPATH=. python benchmarks/mixed.py [--bits 5] [--videos 10] [--steps 6] [--table FILE] [--out FILE]

Calibrates for w4a8, measures every unit by the three losses of `video_judge` (and by squared error), allocates, then
draws other videos from other noise with each plan as `quantize_` runs it, on real integers. Losses are against fp32
from the same noise, lower is better. --table keeps the measurement, which goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cpu import _commit  # the script beside this one
from torch import Tensor

import viditq_fx as vq
from viditq_fx.calibration.sensitivity import relative_square
from viditq_fx.demo.video import initial_video_noise, load_video_dit, sample_videos
from viditq_fx.demo.video_metrics import video_judge

FRAMES = {"temporal": "temporal_transformer_blocks.*.attn*"}
"""Latte's second half of blocks attends over frames."""


def _at(recipe: vq.Recipe, scheme: str) -> vq.Recipe:
    """The same transforms with every site at one scheme."""
    parsed = vq.QuantScheme.parse(scheme)
    sites = {
        path: replace(plan, scheme=replace(parsed, rotate=plan.rotation > 1))
        for path, plan in recipe.sites.items()
    }
    return replace(recipe, scheme=parsed, sites=sites)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=float, default=5.0)
    parser.add_argument("--videos", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--table", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mixed-video.json")
    asked = parser.parse_args()
    torch.manual_seed(0)
    video = load_video_dit()
    label_n = torch.arange(asked.videos) % 10

    def draw(transformer: Any, seed: int) -> Tensor:
        given = {"labels": label_n, "steps": asked.steps, "batch_size": asked.videos}
        return sample_videos(video, seed=seed, transformer=transformer, **given)

    judge = video_judge(label_n)
    recipe = vq.calibrate(video.transformer, lambda: draw(video.transformer, 100), scheme="w4a8")
    table = vq.measure_sensitivity(
        video.transformer,
        lambda model: draw(model, 1),
        recipe,
        metrics={**vars(judge), "mse": relative_square},
        groups=FRAMES,
        resume=asked.table,
        progress=True,
    )
    one = replace(table, units=tuple(replace(unit, group="mse") for unit in table.units), errors={"mse": 1.0})
    plans = {"none: all w4a8": recipe, "none: all w8a8": _at(recipe, "w8a8")}
    for method in ("greedy", "milp"):
        plans[f"decoupled, {method}"] = vq.allocate(table, recipe, budget=asked.bits, method=method)
        plans[f"squared error, {method}"] = vq.allocate(one, recipe, budget=asked.bits, method=method)
    seeds = (2, 3)
    truths = {seed: draw(video.transformer, seed) for seed in seeds}
    rows: dict[str, Any] = {}
    for name, plan in plans.items():
        model = load_video_dit().transformer
        example = (initial_video_noise(2, 0), torch.full((2,), 500.0))
        kwargs = {"encoder_hidden_states": video.captions(label_n[:2]), "return_dict": False}
        report = vq.quantize_(model, (example[0],), {"timestep": example[1], **kwargs}, recipe=plan)
        drawn = {seed: draw(model, seed) for seed in seeds}
        losses = {"visual": judge.visual, "alignment": judge.alignment, "temporal": judge.temporal}
        losses["mse"] = relative_square
        rows[name] = {
            "sites": sum(site.outcome == "quantized" for site in report.sites),
            "groups": plan.provenance.get("mixed", {}).get("groups", {}),
            **{
                key: sum(loss(truths[s], drawn[s]) for s in seeds) / len(seeds)
                for key, loss in losses.items()
            },
        }
        print(
            name,
            {key: f"{value:.4g}" for key, value in rows[name].items() if isinstance(value, float)},
            flush=True,
        )
    result = {
        "commit": _commit(),
        "torch": torch.__version__,
        "bits": asked.bits,
        "videos": asked.videos * len(seeds),
        "steps": asked.steps,
        "units": len(table.units),
        "groups": {group: sum(unit.group == group for unit in table.units) for group in table.groups()},
        "errors": dict(table.errors),
        "plans": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
