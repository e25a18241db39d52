"""Error of one step of the trained models, as they are and stressed (`stress.py`), in compiled int8.

    PYTHONPATH=. python benchmarks/stress_error.py [--samples 4] [--schemes w8a8,w4a8] [--out FILE]

The digits DiT and the video DiT, with torch.compile(backend="viditq") and no calibration, at five timesteps; SQNR in dB
of the velocity against the plain model's fp32, higher is better. The stressed model's own fp32 is there too: it is
the plain model's up to rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cpu import _commit  # the script beside this one
from torch import Tensor, nn

from benchmarks.stress import StressConfig, stress_
from viditq_fx.demo.model import load_digits_dit
from viditq_fx.demo.sampling import initial_noise
from viditq_fx.demo.video import initial_video_noise, load_video_dit
from viditq_fx.quality import sqnr_db

TIMESTEPS = (50.0, 250.0, 500.0, 750.0, 950.0)
Step = Callable[[Callable[..., Any], float], Tensor]
"""(the model or it compiled, timestep) -> velocity."""


def digits(samples: int) -> tuple[nn.Module, Step]:
    """The digits DiT, and one step of it."""
    noise, label = initial_noise(samples, seed=0), torch.arange(samples) % 10

    def step(model: Callable[..., Any], timestep: float) -> Tensor:
        return model(noise, timestep=torch.full((samples,), timestep), class_labels=label).sample

    return load_digits_dit(), step


def video(samples: int) -> tuple[nn.Module, Step]:
    """The video DiT, and one step of it."""
    model = load_video_dit()
    noise, caption = initial_video_noise(samples, seed=0), model.captions(torch.arange(samples) % 10)

    def step(model: Callable[..., Any], timestep: float) -> Tensor:
        return model(noise, timestep=torch.full((samples,), timestep), encoder_hidden_states=caption).sample

    return model.transformer, step


MODELS = {"digits DiT": digits, "video DiT": video}


def measure(name: str, samples: int, schemes: list[str], config: StressConfig) -> list[dict[str, Any]]:
    """Return a row for each variant of one model: SQNR at every timestep."""
    rows, want = [], []
    for weights in ("plain", "stressed"):
        for scheme in ("fp32", *schemes):
            model, step = MODELS[name](samples)
            if weights == "stressed":
                stress_(model, config)
            if scheme == "fp32":
                got = [step(model, timestep) for timestep in TIMESTEPS]
                want = want or got
            else:
                torch._dynamo.reset()
                compiled = torch.compile(model, backend="viditq", options={"scheme": scheme})
                got = [step(compiled, timestep) for timestep in TIMESTEPS]
            errors = [sqnr_db(w, g) for w, g in zip(want, got, strict=True)]
            mean = sum(errors) / len(errors)
            # Equal tensors have an infinite SQNR, which JSON lacks.
            finite = [round(error, 2) for error in errors] if mean < float("inf") else None
            rows.append({"model": name, "weights": weights, "scheme": scheme, "sqnr_db": finite})
            print(f"{name:12} {weights:9} {scheme:6} mean {mean:6.1f} dB  {finite}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--schemes", default="w8a8,w4a8")
    parser.add_argument("--seed", type=int, default=StressConfig.seed)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stress-error.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    config = StressConfig(seed=options.seed)
    rows = []
    with torch.no_grad():
        for name in MODELS:
            rows += measure(name, options.samples, options.schemes.split(","), config)
    record = {
        "command": f"python benchmarks/stress_error.py --samples {options.samples} --schemes {options.schemes}",
        "stress": asdict(config),
        "timesteps": TIMESTEPS,
        "torch": torch.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
