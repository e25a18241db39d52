"""How many kernels one block of a transformer launches: plain Inductor against this package, in bf16 for CUDA.

    PYTHONPATH=.:tests python benchmarks/kernels_per_block.py

Inductor writes its CUDA code for blocks of published sizes with no GPU (tests/nogpu); what `call` launches is
counted. Nothing runs, so this says nothing of time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from nogpu.fake_cuda import cuda_code
from torch import fx, nn

from viditq_fx.backend import viditq_backend
from viditq_fx.ops import ACTIVATION_QUANTIZE, NORM_MODULATE_QUANTIZE, QUANTIZE_PER_TOKEN
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.pipeline import after

FUSED = (ACTIVATION_QUANTIZE.overload, NORM_MODULATE_QUANTIZE.overload)
CAPABILITY = 90


@dataclass(frozen=True, kw_only=True)
class CountQuantizes(Pass):
    """Counts the quantize steps of a graph by whether something was folded into them."""

    name: ClassVar[str] = "count_quantizes"
    changes_numerics: ClassVar[bool] = False
    seen: Counter[bool] = field(default_factory=Counter)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        for node in gm.graph.nodes:
            if node.target in FUSED or node.target is QUANTIZE_PER_TOKEN.overload:
                self.seen[node.target in FUSED] += 1
        return ()


@dataclass(frozen=True, kw_only=True)
class Launches:
    """Kernels that one call of a compiled block launches, by kind."""

    gemms: int
    """Matrix products: cuBLAS calls and Triton templates."""
    attention: int
    generated: int
    """Inductor's own Triton kernels."""

    @property
    def total(self) -> int:
        return self.gemms + self.attention + self.generated


@dataclass(frozen=True, kw_only=True)
class BlockCount:
    """One block before and after."""

    name: str
    before: Launches
    after: Launches
    quantizes: int
    """Quantize steps in the rewritten graph."""
    unfused: int
    """Those of them that nothing could be folded into: each may cost a kernel."""


def launches(code: str) -> Launches:
    """Count the launches in the text of Inductor's `call`."""
    body = code[code.index("def call") :]
    triton = Counter(name.startswith("triton_tem") for name in re.findall(r"\b(triton_\w+)\.run\(", body))
    externs = len(re.findall(r"\bextern_kernels\.\w+\(", body))
    attention = len(re.findall(r"torch\.ops\.aten\._scaled_dot_product\w*\.default\(", body))
    return Launches(gemms=externs + triton[True], attention=attention, generated=triton[False])


def count(name: str, make: Callable[[], tuple[Any, ...]]) -> BlockCount:
    """Compile a block for CUDA twice; `make` returns (module, *inputs) and runs on the fake device."""
    counted = CountQuantizes()
    options = {"extra_passes": [after("fuse_shared_input", counted)], "selection": "always"}

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> None:
        viditq_backend(gm, inputs, options=options)

    plain = launches(cuda_code(make, cc=CAPABILITY).text)
    quantized = launches(cuda_code(make, cc=CAPABILITY, compiler=backend).text)
    quantizes = counted.seen
    return BlockCount(
        name=name,
        before=plain,
        after=quantized,
        quantizes=quantizes.total(),
        unfused=quantizes[False],
    )


class Called(nn.Module):
    """A block with how to call it on plain tensors."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.call = block, call

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the block returns."""
        return self.call(self.block, *inputs)


def on_device(
    make: Callable[[], nn.Module], call: Callable[..., Any], *shapes: tuple[int, ...]
) -> tuple[Any, ...]:
    """(module, *inputs) in bf16 on the device, random; `call` says how the block takes them."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            module = Called(make(), call).eval().requires_grad_(False)
            return module, *(torch.randn(shape) for shape in shapes)
    finally:
        torch.set_default_dtype(torch.float32)


def _flux(kind: str) -> tuple[Any, ...]:
    from diffusers.models.transformers import transformer_flux

    return on_device(
        lambda: getattr(transformer_flux, kind)(dim=3072, num_attention_heads=24, attention_head_dim=128),
        lambda block, x, y, temb, c, s: block(x, y, temb, (c, s)),
        *((1, 4096, 3072), (1, 512, 3072), (1, 3072), (4608, 128), (4608, 128)),
    )


def _pixart() -> tuple[Any, ...]:
    from diffusers.models.attention import BasicTransformerBlock

    options = {"attention_bias": True, "norm_type": "ada_norm_single", "norm_elementwise_affine": False}
    return on_device(
        lambda: BasicTransformerBlock(1152, 16, 72, cross_attention_dim=1152, norm_eps=1e-6, **options),
        lambda block, x, y, t: block(x, encoder_hidden_states=y, timestep=t),
        *((2, 4096, 1152), (2, 300, 1152), (2, 6 * 1152)),
    )


def wan(tokens: int) -> tuple[Any, ...]:
    """A block of Wan 2.1 14B over that many tokens of video."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    return on_device(
        lambda: WanTransformerBlock(5120, 13824, 40, qk_norm="rms_norm_across_heads", cross_attn_norm=True),
        lambda block, x, y, t, c, s: block(x, y, t, (c, s)),
        *((1, tokens, 5120), (1, 512, 5120), (1, 6, 5120), (1, tokens, 1, 128), (1, tokens, 1, 128)),
    )


BLOCKS = {
    "FLUX.1 double block, 4096 + 512 tokens": partial(_flux, "FluxTransformerBlock"),
    "FLUX.1 single block, 4096 + 512 tokens": partial(_flux, "FluxSingleTransformerBlock"),
    "PixArt-Σ block, 4096 tokens, batch 2": _pixart,
    "Wan 2.1 14B block, 32,760 tokens": partial(wan, 32760),
}


def table(counts: list[BlockCount]) -> list[str]:
    """A Markdown table, one row for each block."""
    lines = [
        "| block | plain Inductor | viditq | quantize steps, of them alone |",
        "| --- | --- | --- | --- |",
    ]
    for block in counts:
        cells = [block.name, _cell(block.before), _cell(block.after), f"{block.quantizes}, {block.unfused}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(kernels: Launches) -> str:
    parts = f"{kernels.gemms} GEMM, {kernels.attention} attention, {kernels.generated} generated"
    return f"{kernels.total} ({parts})"


if __name__ == "__main__":
    print("\n".join(table([count(name, make) for name, make in BLOCKS.items()])))
