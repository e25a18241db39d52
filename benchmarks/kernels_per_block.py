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
    options = {"extra_passes": [after("fuse_shared_input", counted)]}

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


def _on_device(module: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> tuple[Any, ...]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return module().eval().requires_grad_(False), *(torch.empty(shape) for shape in shapes)
    finally:
        torch.set_default_dtype(torch.float32)


def _flux_double() -> tuple[Any, ...]:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    block, image, text, condition, cos, sin = _on_device(
        lambda: FluxTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128),
        *((1, 4096, 3072), (1, 512, 3072), (1, 3072), (4608, 128), (4608, 128)),
    )
    return lambda x, y, temb, c, s: block(x, y, temb, (c, s)), image, text, condition, cos, sin


def _flux_single() -> tuple[Any, ...]:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    block, image, text, condition, cos, sin = _on_device(
        lambda: FluxSingleTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128),
        *((1, 4096, 3072), (1, 512, 3072), (1, 3072), (4608, 128), (4608, 128)),
    )
    return lambda x, y, temb, c, s: block(x, y, temb, (c, s)), image, text, condition, cos, sin


def _pixart() -> tuple[Any, ...]:
    from diffusers.models.attention import BasicTransformerBlock

    block, image, text, condition = _on_device(
        lambda: BasicTransformerBlock(
            1152,
            16,
            72,
            cross_attention_dim=1152,
            attention_bias=True,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        ),
        *((2, 4096, 1152), (2, 300, 1152), (2, 6 * 1152)),
    )
    return lambda x, y, t: block(x, encoder_hidden_states=y, timestep=t), image, text, condition


def _wan() -> tuple[Any, ...]:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    block, video, text, condition, cos, sin = _on_device(
        lambda: WanTransformerBlock(5120, 13824, 40, qk_norm="rms_norm_across_heads", cross_attn_norm=True),
        *((1, 32760, 5120), (1, 512, 5120), (1, 6, 5120), (1, 32760, 1, 128), (1, 32760, 1, 128)),
    )
    return lambda x, y, t, c, s: block(x, y, t, (c, s)), video, text, condition, cos, sin


BLOCKS = {
    "FLUX.1 double block, 4096 + 512 tokens": _flux_double,
    "FLUX.1 single block, 4096 + 512 tokens": _flux_single,
    "PixArt-Σ block, 4096 tokens, batch 2": _pixart,
    "Wan 2.1 14B block, 32,760 tokens": _wan,
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
