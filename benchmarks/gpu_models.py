"""Time one step of whole models of published sizes on one CUDA GPU: compiled bf16 against ours, in rotation.

    PYTHONPATH=. python benchmarks/gpu_models.py [--only flux] [--minutes 4] [--again] [--dry-run]

Random weights, bf16, static shapes. Every variant compiles the repeated blocks of one and the same model (so packed
weights that two variants share exist once) and runs it as its user would: Python's time between kernels counts.
SQNR against compiled bf16 stands beside each time; below 15 dB a variant is recorded as wrong, and not timed. A model
whose result is in the file already is passed over, so a run that was cut off is taken up where it ended.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_checks import sqnr
from gpu_timing import environment, save
from torch import Tensor, nn

BASELINE = "bf16 Inductor"
MIN_SQNR = 15.0
_LEAST_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of diffusers at its published size, and one call of it."""

    cls: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...] | tuple[tuple[int, ...], ...]]
    """Argument -> shape of a random tensor in bf16, or of several in a tuple."""
    steps: tuple[str, ...] = ("timestep",)
    """Arguments that are times: one a sample, 500."""
    batch: int = 1
    others: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """The module with random weights in bf16, on the default device."""
        import diffusers

        torch.set_default_dtype(torch.bfloat16)
        try:
            return getattr(diffusers, self.cls)(**self.config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)

    def inputs(self) -> dict[str, Any]:
        """The arguments of one call, on the default device."""
        torch.manual_seed(0)
        made: dict[str, Any] = {}
        for name, shape in self.shapes.items():
            several = [size for size in shape if isinstance(size, tuple)]
            sizes = several or [tuple(size for size in shape if isinstance(size, int))]
            tensors = tuple(torch.randn(size, dtype=torch.bfloat16) for size in sizes)
            made[name] = tensors if several else tensors[0]
        made |= {name: torch.full((self.batch,), 500.0, dtype=torch.bfloat16) for name in self.steps}
        return {**made, **self.others, "return_dict": False}


_GUIDED = 2
"""Samples of a call under classifier-free guidance."""
MODELS = {
    "FLUX.1-dev, 1024 x 1024": Model(
        cls="FluxTransformer2DModel",
        config={"guidance_embeds": True},
        shapes={
            "hidden_states": (1, 4096, 64),
            "encoder_hidden_states": (1, 512, 4096),
            "pooled_projections": (1, 768),
            "img_ids": (4096, 3),
            "txt_ids": (512, 3),
        },
        steps=("timestep", "guidance"),
    ),
    "PixArt-Sigma, 1024 x 1024, guided": Model(
        cls="PixArtTransformer2DModel",
        config={
            "sample_size": 128,
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "norm_type": "ada_norm_single",
            "use_additional_conditions": False,
        },
        shapes={"hidden_states": (_GUIDED, 4, 128, 128), "encoder_hidden_states": (_GUIDED, 300, 4096)},
        batch=_GUIDED,
        others={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "Stable Diffusion 3.5 large, 1024 x 1024, guided": Model(
        cls="SD3Transformer2DModel",
        config={
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        shapes={
            "hidden_states": (_GUIDED, 16, 128, 128),
            "encoder_hidden_states": (_GUIDED, 333, 4096),
            "pooled_projections": (_GUIDED, 2048),
        },
        batch=_GUIDED,
    ),
    "CogVideoX-5B, 480p, 49 frames, guided": Model(
        cls="CogVideoXTransformer3DModel",
        config={
            "num_layers": 42,
            "num_attention_heads": 48,
            "use_rotary_positional_embeddings": True,
        },
        shapes={
            "hidden_states": (_GUIDED, 13, 16, 60, 90),
            "encoder_hidden_states": (_GUIDED, 226, 4096),
            "image_rotary_emb": ((17550, 64), (17550, 64)),
        },
        batch=_GUIDED,
    ),
    "Wan 2.1 14B, 480p, 81 frames": Model(
        cls="WanTransformer3DModel",
        config={},
        shapes={"hidden_states": (1, 16, 21, 60, 104), "encoder_hidden_states": (1, 512, 4096)},
    ),
}
VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    BASELINE: lambda block: block.compile(dynamic=False),
    "viditq w8a8": lambda block: _ours(block),
    "viditq w8a8, every site": lambda block: _ours(block, selection="always"),
    "viditq fp8": lambda block: _ours(block, scheme="fp8"),
    "viditq w8a8, int8 attention": lambda block: _ours(block, attention="int8"),
}


def _ours(block: nn.Module, **options: Any) -> None:
    block.compile(backend="viditq", dynamic=False, options=options)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every outermost list of at least four modules that hold linears."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) >= _LEAST_BLOCKS:
            found += [m for m in child if any(isinstance(part, nn.Linear) for part in m.modules())]
        else:
            found += repeated_blocks(child)
    return found


def time_model(model: Model, rounds: int) -> dict[str, Any]:
    """Every variant of one model; one that fails, or is wrong, is recorded with its error and not timed."""
    with torch.device("cuda"):
        module, inputs = model.make(), model.inputs()
    blocks = repeated_blocks(module)
    compiled: dict[str, list[Any]] = {}
    quality: dict[str, float] = {}
    errors: dict[str, str] = {}
    want: list[Tensor] = []

    def step(variant: str) -> Tensor:
        for block, call in zip(blocks, compiled[variant], strict=True):
            block._compiled_call_impl = call
        return module(**inputs)[0]

    for name, compile_block in VARIANTS.items():
        try:
            for block in blocks:
                compile_block(block)
            compiled[name] = [block._compiled_call_impl for block in blocks]
            got = step(name).float()
            want = want or [got]
            quality[name] = sqnr(want, [got])
            if not quality[name] >= MIN_SQNR:
                raise ArithmeticError(f"wrong: SQNR {quality[name]:.1f} dB against compiled bf16")
        except Exception as error:
            if name == BASELINE:
                raise
            errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
            compiled.pop(name, None)
            torch.cuda.synchronize()
    times = {name: summary(found) for name, found in rotate_steps(list(compiled), step, rounds).items()}
    for name, entry in times.items():
        entry |= {"sqnr_db": quality[name], "speedup": times[BASELINE]["p50"] / entry["p50"]}
    return {"blocks": len(blocks), "times": times, "errors": errors}


def rotate_steps(names: list[str], step: Callable[[str], Any], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, one of each variant a round."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            step(name)
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end))
    return samples


def summary(samples: list[float]) -> dict[str, Any]:
    """Median and range; the samples were taken after each variant had run once."""
    return {
        "p50": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "rounds": len(samples),
    }


def describe(name: str, model: Model) -> str:
    """What would be timed, for --dry-run: parameters and the sizes of the inputs, from the meta device."""
    with torch.device("meta"):
        module = model.make()
    parameters = sum(p.numel() for p in module.parameters())
    return f"{name}: {parameters / 1e9:.2f} B parameters, {len(repeated_blocks(module))} blocks, {dict(model.shapes)}"


def show(name: str, entry: Mapping[str, Any]) -> None:
    """One line a variant, fastest first."""
    print(name, flush=True)
    for variant, t in sorted(entry["times"].items(), key=lambda item: item[1]["p50"]):
        spread = f"{t['p50']:9.1f} ms ({t['min']:.1f} to {t['max']:.1f}) {t['speedup']:5.2f}x"
        print(f"  {spread}  SQNR {t['sqnr_db']:5.1f} dB  {variant}", flush=True)
    for variant, error in entry["errors"].items():
        print(f"  FAILED {variant}: {error}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression over model names, e.g. 'FLUX|Wan'")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant")
    parser.add_argument("--minutes", type=float, default=4, help="start no new model after this long")
    parser.add_argument("--again", action="store_true", help="also models whose result is in the file")
    parser.add_argument("--commit", help="commit hash, where the copy has no git history")
    parser.add_argument("--out", type=Path, help="result file; see benchmarks/README.md for the names")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; needs no GPU")
    return parser.parse_args()


def begun_record(out: Path, where: dict[str, Any], again: bool) -> dict[str, Any]:
    """The record to add to: that of the file, if it is of this commit, device and versions."""
    fresh: dict[str, Any] = {"environment": where, "models": {}}
    if again or not out.exists():
        return fresh
    known = json.loads(out.read_text(encoding="utf-8"))
    same = {k: v for k, v in known["environment"].items() if k != "date"}
    return known if same == {k: v for k, v in where.items() if k != "date"} else fresh


def main() -> int:
    """0: measured. 2: no device."""
    options, begun = arguments(), time.monotonic()
    models = {name: model for name, model in MODELS.items() if re.search(options.only, name)}
    where = environment(options.commit)
    if options.dry_run:
        print(json.dumps(where, indent=1), *(describe(n, m) for n, m in models.items()), *VARIANTS, sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu_models.py needs a CUDA device; --dry-run does not", file=sys.stderr)
        return 2
    torch._dynamo.config.recompile_limit = 64  # the variants share the blocks' code
    device = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    name = f"gpu-models-{device}-torch{torch.__version__.split('+')[0]}.json"
    out = options.out or Path(__file__).parent / "results" / name
    record = begun_record(out, where, options.again)
    for name, model in models.items():
        if "times" in record["models"].get(name, {}):
            print(f"{name}: in {out} already", flush=True)
            continue
        if time.monotonic() - begun > options.minutes * 60:
            print(f"out of time before {name}", flush=True)
            break
        try:
            with torch.no_grad():
                record["models"][name] = time_model(model, options.rounds)
            show(name, record["models"][name])
        except Exception as error:  # noqa: BLE001 - one failing model must not lose the rest
            record["models"][name] = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
            print(f"FAILED {name}: {record['models'][name]['error']}", flush=True)
        save(record, out)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
