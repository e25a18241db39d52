"""Attention whose two products are both of 8 bits: int8 scores as in `attention_int8`, and P V in e4m3 or int8.

    m[d] = mean over keys of V[n, d]           subtracted, and added to the result: the rows of P / sum P sum to 1
    p[i, n] = exp(S[i, n] - max over n of S[i, n])                 S as of `attention_int8`

fp8     s[d] = max_n |V[n, d] - m[d]| / 448         V8 = e4m3((V - m) / s)       P8 = e4m3(256 p)
        O = s * (P8 V8) / (256 sum_n p) + m

int8    c[d] = max_n |V[n, d] - m[d]|               t[n] = max(max_d |V[n, d] - m[d]| / c[d], 1/64)
        V8 = round(127 (V - m) / (c t))             P8 = round(127 p t / w)      w = max over the key block of p t
        O = c * sum over key blocks of w (P8 V8) / (127^2 sum_n p) + m

sum_n p is that of the unrounded p. e4m3 has 3 bits of mantissa: P and V are off by 2.5% each, wherever the values lie.
int8 has 8 bits of the largest: each row of P has a scale for each block of keys, and V one for each channel and one for
each token, which rides on P, so that neither an outlier channel nor an outlier token costs the others their bits. Its
sums are exact. Methods: P and V in e4m3, SageAttention2 (arXiv 2411.10958); the int8 form is our own.

A NaN or an infinity in V makes NaN of its channel (fp8) or its head (int8), masked or not; else as `attention_int8`.

Shapes: q [..., H, Lq, D], k [..., Hkv, Lk, D], v [..., Hkv, Lk, Dv], result [..., H, Lq, Dv]; n is a key, d a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.attention import SCHEMA, attend, fake, samples
from viditq_fx.ops.base import QuantOp, Tolerance, register
from viditq_fx.ops.fp8 import E4M3, LARGEST
from viditq_fx.ops.quantize import EPS
from viditq_fx.scheme import largest_int

TOP_OF_P = 256.0
"""What p = 1 is in e4m3: a power of two, so that the kernel adds 8 to an exponent."""
LEAST_TOKEN = 1 / 64
"""Least t: p is found again from p t in fp32, which a token of nothing but its mean must not divide by 0."""
KEY_BLOCK = 128
"""Keys that share a scale of P in the reference: the widest tile of the kernels, so they are no less exact."""


def spread_of_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """v [..., L, Dv] -> (mean over keys, largest distance from it), fp32 [..., 1, Dv] each; L is 1 or more."""
    v_ND = v.to(torch.float32)
    # Divided first, so that no sum of finite numbers is infinite.
    mean_D = (v_ND * (1.0 / v.shape[-2])).sum(dim=-2, keepdim=True)
    above, below = v_ND.amax(dim=-2, keepdim=True) - mean_D, mean_D - v_ND.amin(dim=-2, keepdim=True)
    return mean_D, torch.maximum(above, below).clamp(min=EPS, max=torch.finfo(torch.float32).max)


def values_to_fp8(v: Tensor, mean_D: Tensor, far_D: Tensor) -> Tensor:
    """v [..., L, Dv] and what `spread_of_values` gave -> e4m3 [..., L, Dv]; the scale is far_D / 448."""
    scaled = (v.to(torch.float32) - mean_D) * (LARGEST / far_D)
    return scaled.clamp(-LARGEST, LARGEST).to(E4M3)


def token_scale(v: Tensor, mean_D: Tensor, far_D: Tensor) -> Tensor:
    """t fp32 [..., L, 1] of the int8 form: largest of a token's values, each as a share of its channel's; 1/64 to 1."""
    shares = (v.to(torch.float32) - mean_D).abs() * (1.0 / far_D)
    return shares.amax(dim=-1, keepdim=True).clamp(LEAST_TOKEN, 1.0)


def values_to_int8(v: Tensor, mean_D: Tensor, far_D: Tensor, token_N: Tensor) -> Tensor:
    """v [..., L, Dv] -> int8 [..., L, Dv]; the scale is far_D token_N / 127. NaN becomes 0: its scales are NaN."""
    qmax = largest_int(8)
    scaled = torch.round((v.to(torch.float32) - mean_D) * (qmax / far_D) * (1.0 / token_N))
    return torch.where(scaled == scaled, scaled, 0.0).clamp(-qmax, qmax).to(torch.int8)


def _weighting_fp8(v: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    mean_D, far_D = spread_of_values(v)
    v_ND = values_to_fp8(v, mean_D, far_D).to(torch.float32)
    scale_D = far_D * (1.0 / LARGEST)

    def weigh(p: Tensor, total: Tensor) -> Tensor:
        product = (p * TOP_OF_P).to(E4M3).to(torch.float32) @ v_ND
        return product / (total * TOP_OF_P) * scale_D + mean_D

    return weigh


def _weighting_int8(v: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    qmax = largest_int(8)
    mean_D, far_D = spread_of_values(v)
    token_N = token_scale(v, mean_D, far_D)
    v_ND = values_to_int8(v, mean_D, far_D, token_N).to(torch.float32)
    scale_D = far_D * (1.0 / (qmax * qmax))

    def weigh(p: Tensor, total: Tensor) -> Tensor:
        scaled, keys = p * token_N.transpose(-1, -2), p.shape[-1]
        blocks = F.pad(scaled, (0, -keys % KEY_BLOCK)).unflatten(-1, (-1, KEY_BLOCK))
        top = blocks.amax(dim=-1, keepdim=True)
        integers = torch.round(blocks * (qmax / top.clamp(min=EPS)))
        p_int = (integers * top).flatten(-2)[..., :keys]
        return p_int @ v_ND / total * scale_D + mean_D

    return weigh


def attention_int8_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The reference of the fp8 form, in fp32 arithmetic; arguments as in torch's SDPA.

    Raises ValueError for shapes that do not fit together, D > 256, or a mask beside `is_causal`.
    """
    return attend(q, k, v, attn_mask, is_causal, scale, enable_gqa, _weighting_fp8)


def attention_int8_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The reference of the int8 form; arguments as in torch's SDPA.

    Raises ValueError for shapes that do not fit together, D > 256, or a mask beside `is_causal`.
    """
    return attend(q, k, v, attn_mask, is_causal, scale, enable_gqa, _weighting_int8)


# P is rounded beside the largest of the keys so far, or of a tile: another maximum than the reference's, so single
# roundings differ, by a sixteenth of a probability in e4m3. Beside results of size 1 that is what is left of them.
def _op(name: str, reference: Callable[..., Tensor], atol: float) -> QuantOp:
    tolerance: dict[str, Any] = {"rtol": 3.2e-2, "atol": atol}
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return register(
        QuantOp(
            name=name,
            schema=SCHEMA,
            reference=reference,
            fake=fake,
            samples=samples,
            tolerances=dict.fromkeys(dtypes, Tolerance(**tolerance)),
        )
    )


ATTENTION_INT8_FP8 = _op("attention_int8_fp8", attention_int8_fp8, 6e-2)
ATTENTION_INT8_INT8 = _op("attention_int8_int8", attention_int8_int8, 3e-2)
