"""Time whole transformer blocks of published sizes on one CUDA GPU: compiled bf16 against int8, ours and peers'.

    PYTHONPATH=.:tests python benchmarks/gpu_blocks.py [--only flux] [--minutes 7] [--commit HASH] [--dry-run]

Random weights, bf16, static shapes. The baseline is Inductor's own bf16 (with the SDPA backend that torch chooses).
Every variant's output is compared with the eager bf16 block first: SQNR stands beside its time, and one below 20 dB is
recorded as wrong and not timed. Variants run in rotation, each as a CUDA graph; the file is rewritten after each block.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_checks import sqnr
from gpu_timing import environment, graph_of, rotate, save
from kernels_per_block import BLOCKS, on_device, wan
from torch import Tensor, nn

BASELINE = "bf16 Inductor"
MIN_SQNR = 20.0


def _hunyuan_video(tokens: int) -> tuple[Any, ...]:
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformerBlock

    return on_device(
        lambda: HunyuanVideoTransformerBlock(24, 128, mlp_ratio=4.0),
        lambda block, x, y, temb, c, s: block(x, y, temb, None, (c, s)),
        *((1, tokens, 3072), (1, 256, 3072), (1, 3072), (tokens, 128), (tokens, 128)),
    )


MAKERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    **BLOCKS,
    "Wan 2.1 14B block, 75,600 tokens": partial(wan, 75600),
    "HunyuanVideo double block, 118,800 + 256 tokens": partial(_hunyuan_video, 118800),
}


def _ours(**options: Any) -> Callable[[nn.Module], Any]:
    return lambda module: torch.compile(module, backend="viditq", dynamic=False, options=options)


def _torchao(config: str, **options: Any) -> Callable[[nn.Module], Any]:
    def make(module: nn.Module) -> Any:
        import torchao.quantization as quantization

        if "granularity" in options:
            options["granularity"] = quantization.PerRow()
        quantization.quantize_(module, getattr(quantization, config)(**options))
        return torch.compile(module, dynamic=False)

    return make


VARIANTS: dict[str, Callable[[nn.Module], Any]] = {
    BASELINE: lambda module: torch.compile(module, dynamic=False),
    "viditq w8a8": _ours(),
    "viditq w8a8, autotuned": _ours(max_autotune=True),
    "viditq w8a8, int8 attention": _ours(attention="int8"),
    "torchao int8 dynamic, compiled": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8 row-wise, compiled": _torchao("Float8DynamicActivationFloat8WeightConfig", granularity=None),
}


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output for t in _tensors(part)] if isinstance(output, tuple | list) else []


def time_block(make: Callable[[], tuple[Any, ...]], rounds: int) -> dict[str, Any]:
    """Every variant of one block; one that fails, or is wrong, is recorded with its error and not timed."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    errors: dict[str, str] = {}
    quality: dict[str, float] = {}
    pool = torch.cuda.graph_pool_handle()
    torch.manual_seed(0)
    module, *inputs = make()
    state, want = {k: v.clone() for k, v in module.state_dict().items()}, _tensors(module(*inputs))
    runs = []
    for name, variant in VARIANTS.items():
        torch._dynamo.reset()
        try:
            copy = make()[0]
            copy.load_state_dict(state)
            run = variant(copy)
            quality[name] = sqnr(want, _tensors(run(*inputs)))
            if not quality[name] >= MIN_SQNR:
                raise ArithmeticError(f"wrong: SQNR {quality[name]:.1f} dB against the eager block")
            graphs[name] = graph_of(lambda _, run=run: lambda: run(*inputs), 1, 1, pool)
            runs.append(run)  # its memory is what the graph reads
        except Exception as error:  # noqa: BLE001 - one variant's failure must not lose the others
            errors[name] = f"{type(error).__name__}: {str(error)[:300]}"
            torch.cuda.synchronize()
    times = rotate(graphs, 1, rounds)
    for name, entry in times.items():
        entry["sqnr_db"] = quality[name]
        if BASELINE in times:
            entry["speedup"] = times[BASELINE]["p50"] / entry["p50"]
    return {"times": times, "errors": errors}


def show(name: str, entry: dict[str, Any]) -> None:
    """One line a variant, fastest first."""
    print(name, flush=True)
    for variant, t in sorted(entry["times"].items(), key=lambda item: item[1]["p50"]):
        spread = f"{t['p20']:9.1f} {t['p50']:9.1f} {t['p80']:9.1f} us {t.get('speedup', 0):5.2f}x"
        print(f"  {spread}  SQNR {t['sqnr_db']:5.1f} dB  {variant}", flush=True)
    for variant, error in entry["errors"].items():
        print(f"  FAILED {variant}: {error}", flush=True)


def main() -> int:
    """0: measured. 2: no device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression over block names, e.g. 'FLUX|Wan'")
    parser.add_argument("--rounds", type=int, default=15, help="timed replays of each variant")
    parser.add_argument("--minutes", type=float, default=7, help="start no new block after this long")
    parser.add_argument("--commit", help="commit hash, where the copy has no git history")
    parser.add_argument("--out", type=Path, help="result file; see benchmarks/README.md for the names")
    parser.add_argument("--dry-run", action="store_true", help="say what would run; needs no GPU")
    options, begun = parser.parse_args(), time.monotonic()
    makers = {name: make for name, make in MAKERS.items() if re.search(options.only, name)}
    if options.dry_run:
        print(json.dumps(environment(options.commit), indent=1), *makers, *VARIANTS, sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/gpu_blocks.py needs a CUDA device; --dry-run does not", file=sys.stderr)
        return 2
    record: dict[str, Any] = {"environment": environment(options.commit), "blocks": {}}
    device = re.sub(r"[^a-z0-9]+", "-", record["environment"]["device"].lower()).strip("-")
    name = f"gpu-blocks-{device}-torch{torch.__version__.split('+')[0]}.json"
    out = options.out or Path(__file__).parent / "results" / name
    with torch.no_grad():
        for block, make in makers.items():
            if time.monotonic() - begun > options.minutes * 60:
                print(f"out of time before {block}", flush=True)
                break
            try:
                record["blocks"][block] = time_block(make, options.rounds)
                show(block, record["blocks"][block])
            except Exception as error:  # noqa: BLE001 - one failing block must not lose the rest
                record["blocks"][block] = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
                print(f"FAILED {block}: {record['blocks'][block]['error']}", flush=True)
            save(record, out)
            torch.cuda.empty_cache()
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
