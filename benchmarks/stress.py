"""A stress test for quantization: the same function, spelled with outlier channels, offsets and drifting ranges.

A small trained model has tame activations, and every method looks good on it. `stress_` rewrites its weights so
that full precision computes the same outputs (up to rounding), while what the quantized linears read has the ills of
large diffusion transformers: a few channels 10 to 50 times the others, offsets, ranges that change with the timestep.

    y = W (n * (1 + scale) + shift) + b        what a linear reads after adaLN, n normalized
      = (W / c) (n * c (1 + scale) + c shift + d) + (b - (W / c) d)
    y = O (P v) + b                            values, P the softmax; its rows sum to 1
      = (O / c) (P (c v + d)) + (b - (O / c) d)
    softmax(q k^T) = softmax((q / c) (c k + d)^T)      a constant added to every key adds one number to a row
    LayerNorm(x) = LayerNorm(x + m)                    the same m in every channel

c and d [K] are constants, yet the ranges drift: outliers are put where the modulation changes most over the
timesteps. GELU does not commute with c, so the input of a feed-forward's second linear stays as it is.
This knows the two classes that it rewrites by name: it is a fixture, no part of the compiler.

Suffixes: K channels that a linear reads, N those that it writes, C those of the conditioning, T timesteps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiTTransformer2DModel,  # pyright: ignore[reportPrivateImportUsage]
    LatteTransformer3DModel,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor, nn

NULL_CLASS = 10
TIMESTEPS_T = torch.linspace(0.0, 1000.0, 21)
"""Over which the drift of a channel's range is measured."""


class Half(NamedTuple):
    """Which sixth of an adaLN linear's outputs shifts a norm and which scales it; sixths 2 and 5 are gates."""

    shift: int
    scale: int


ATTENTION, FEED_FORWARD = Half(0, 1), Half(3, 4)


class AdaLN(NamedTuple):
    """A modulation linear with 6 K outputs, and what it is given at every timestep."""

    linear: nn.Linear
    condition_TC: Tensor

    @property
    def channels(self) -> int:
        """K."""
        return self.linear.out_features // 6

    def rows(self, sixth: int) -> slice:
        """The outputs of one sixth."""
        return slice(sixth * self.channels, (sixth + 1) * self.channels)


class Readers(NamedTuple):
    """Linears that read one modulated norm, and the block's table [6, K] added to its modulation, if there is one."""

    table: Tensor | None
    linears: list[nn.Linear]


@dataclass(frozen=True, kw_only=True)
class StressConfig:
    """How bad the activations become."""

    seed: int = 0
    outliers: int = 6
    """Outlier channels of each linear's input."""
    smallest: float = 10.0
    largest: float = 50.0
    """Factors of outlier channels lie between these, log-uniform."""
    spread: float = 0.3
    """Standard deviation of the log of every other channel's factor."""
    offset: float = 1.0
    """Standard deviation of the offsets d, in units of a channel's factor c."""
    residual_offset: float = 10.0
    """m, which cross-attention's queries read; LayerNorms do not see it."""

    def __post_init__(self) -> None:
        if self.outliers < 0 or not 0.0 < self.smallest <= self.largest:
            raise ValueError(
                f"outliers={self.outliers}, smallest={self.smallest}, largest={self.largest} were asked for; "
                "choose a number of channels from 0 up, and factors with 0 < smallest <= largest"
            )


@torch.no_grad()
def stress_(model: nn.Module, config: StressConfig | None = None) -> dict[str, Tensor]:
    """Rewrite a trained model in place, in float32, and return the factors c [K] of each site by its path.

    model: diffusers' DiTTransformer2DModel (adaLN-zero) or LatteTransformer3DModel (adaLN-single). What it computes
        changes by rounding alone.

    Raises ValueError for another class, or for weights that are not float32.
    """
    config = StressConfig() if config is None else config
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("stress_ was given weights that are not float32; rewrite first, then convert")
    stress = _Stress(config)
    if isinstance(model, DiTTransformer2DModel):
        _stress_image_model(model, stress)
    elif isinstance(model, LatteTransformer3DModel):
        _stress_video_model(model, stress)
    else:
        raise ValueError(
            f"stress_ was given a {type(model).__name__}; it knows DiTTransformer2DModel and LatteTransformer3DModel"
        )
    return stress.factors


class _Stress:
    """The random factors of one run, and the rewrites that both models share."""

    def __init__(self, config: StressConfig) -> None:
        self.config = config
        self.factors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(config.seed)

    def factors_for(self, path: str, channels: int, drift_K: Tensor | None = None) -> Tensor:
        """Draw c [K]: outliers in the channels of the largest drift, or anywhere where none is given."""
        config = self.config
        if drift_K is None:
            drift_K = torch.rand(channels, generator=self._generator)
        c_K = torch.exp(config.spread * torch.randn(channels, generator=self._generator))
        ratio = torch.rand(config.outliers, generator=self._generator)
        c_K[drift_K.topk(config.outliers).indices] = (
            config.smallest * (config.largest / config.smallest) ** ratio
        )
        self.factors[path] = c_K
        return c_K

    def offsets_for(self, c_K: Tensor) -> Tensor:
        """Draw d [K], which is larger where the factor is."""
        return self.config.offset * c_K * torch.randn(c_K.shape, generator=self._generator)

    def modulated(self, path: str, adaln: AdaLN, half: Half, readers: list[Readers]) -> None:
        """Rewrite what adaLN makes of a norm, and all linears that read it: those of one block, or of all blocks."""
        shift, scale = adaln.rows(half.shift), adaln.rows(half.scale)
        c_K = self.factors_for(path, adaln.channels, drift(adaln, half, [r.table for r in readers]))
        weight, bias = adaln.linear.weight, bias_of(adaln.linear)
        for rows in (shift, scale):
            weight[rows] *= c_K[:, None]
            bias[rows] *= c_K
        # 1 + scale has to become c (1 + scale), and the 1 is not in the linear.
        bias[scale] += c_K - 1.0
        for reader in readers:
            d_K = self.offsets_for(c_K)
            if reader.table is None:
                bias[shift] += d_K
            else:
                reader.table[half.shift] *= c_K
                reader.table[half.scale] *= c_K
                reader.table[half.shift] += d_K
            for linear in reader.linears:
                linear.weight /= c_K
                subtract_offset(linear, d_K)

    def attention(self, path: str, attention: Any) -> None:
        """Rewrite values and keys of one attention, with the output projection and the queries that meet them."""
        queries, keys, values, output = attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]
        c_K = self.factors_for(f"{path}.to_out.0", values.out_features)
        d_K = self.offsets_for(c_K)
        scale_outputs(values, c_K)
        bias_of(values).add_(d_K)
        output.weight /= c_K
        subtract_offset(output, d_K)
        k_N = self.factors_for(f"{path}.to_k", keys.out_features)
        scale_outputs(keys, k_N)
        scale_outputs(queries, 1.0 / k_N)
        bias_of(keys).add_(self.offsets_for(k_N))

    def context(self, path: str, writer: nn.Linear, readers: list[nn.Linear]) -> None:
        """Rewrite what one linear writes and others read, with nothing between."""
        c_K = self.factors_for(path, writer.out_features)
        d_K = self.offsets_for(c_K)
        scale_outputs(writer, c_K)
        bias_of(writer).add_(d_K)
        for linear in readers:
            linear.weight /= c_K
            subtract_offset(linear, d_K)


def _stress_image_model(model: Any, stress: _Stress) -> None:
    """adaLN-zero: each block has a modulation linear of its own, hence factors of its own."""
    for index, block in enumerate(model.transformer_blocks):
        path, norm, attention = f"transformer_blocks.{index}", block.norm1, block.attn1
        label_T = torch.full_like(TIMESTEPS_T, NULL_CLASS, dtype=torch.long)
        adaln = AdaLN(norm.linear, norm.silu(norm.emb(TIMESTEPS_T, label_T, hidden_dtype=torch.float32)))
        projections = Readers(None, [attention.to_q, attention.to_k, attention.to_v])
        stress.modulated(f"{path}.attn1", adaln, ATTENTION, [projections])
        stress.modulated(f"{path}.ff", adaln, FEED_FORWARD, [Readers(None, [block.ff.net[0].proj])])
        stress.attention(f"{path}.attn1", attention)


def _stress_video_model(model: Any, stress: _Stress) -> None:
    """adaLN-single: one modulation linear for all blocks, hence one c for all; offsets are each block's own."""
    blocks = {f"transformer_blocks.{i}": block for i, block in enumerate(model.transformer_blocks)}
    blocks |= {f"temporal_{path}": model.temporal_transformer_blocks[i] for i, path in enumerate(blocks)}
    single = model.adaln_single
    count, size = len(TIMESTEPS_T), {"resolution": None, "aspect_ratio": None}
    embedded_TC = single.emb(TIMESTEPS_T, **size, batch_size=count, hidden_dtype=torch.float32)
    adaln = AdaLN(single.linear, single.silu(embedded_TC))
    attentions = [
        Readers(b.scale_shift_table, [b.attn1.to_q, b.attn1.to_k, b.attn1.to_v]) for b in blocks.values()
    ]
    stress.modulated("attn1", adaln, ATTENTION, attentions)
    ups = [Readers(b.scale_shift_table, [b.ff.net[0].proj]) for b in blocks.values()]
    stress.modulated("ff", adaln, FEED_FORWARD, ups)
    crossing = {path: block.attn2 for path, block in blocks.items() if block.attn2 is not None}
    readers = [linear for attention in crossing.values() for linear in (attention.to_k, attention.to_v)]
    stress.context("caption_projection", model.caption_projection.linear_2, readers)
    # Only cross-attention reads the residual stream without a norm.
    offset = stress.config.residual_offset
    model.pos_embed.proj.bias += offset
    for attention in crossing.values():
        subtract_offset(attention.to_q, torch.full((attention.to_q.in_features,), offset))
    for path, block in blocks.items():
        stress.attention(f"{path}.attn1", block.attn1)
        if block.attn2 is not None:
            stress.attention(f"{path}.attn2", block.attn2)


def drift(adaln: AdaLN, half: Half, tables: list[Tensor | None]) -> Tensor:
    """Return by how much the range of each channel changes over the timesteps [K]: largest over smallest.

    The range of a normalized channel is taken as |1 + scale| + |shift|; over several tables the mean is taken.
    """
    modulation_TM = adaln.linear(adaln.condition_TC)
    shift_TK, scale_TK = modulation_TM[:, adaln.rows(half.shift)], modulation_TM[:, adaln.rows(half.scale)]
    changes = []
    for table in tables:
        shift, scale = (0.0, 0.0) if table is None else (table[half.shift], table[half.scale])
        range_TK = (1.0 + scale_TK + scale).abs() + (shift_TK + shift).abs()
        changes.append(range_TK.amax(dim=0) / range_TK.amin(dim=0).clamp_min(1e-3))
    return torch.stack(changes).mean(dim=0)


def scale_outputs(linear: nn.Linear, c_N: Tensor) -> None:
    """Make a linear write c times what it wrote."""
    linear.weight *= c_N[:, None]
    bias_of(linear).mul_(c_N)


def subtract_offset(linear: nn.Linear, d_K: Tensor) -> None:
    """Make a linear give for x + d what it gave for x."""
    bias_of(linear).sub_(linear.weight @ d_K)


def bias_of(linear: nn.Linear) -> Tensor:
    """Return the bias of a linear. Raises ValueError where it has none: an offset then has no place to go."""
    if linear.bias is None:
        raise ValueError(
            f"stress_ needs a bias in every linear that it rewrites, and one of {linear.in_features} to "
            f"{linear.out_features} channels has none; build the model with attention_bias=True"
        )
    return linear.bias
