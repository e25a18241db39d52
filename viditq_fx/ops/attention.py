"""Attention with an int8 product of queries and keys; probabilities and values stay floating point.

    K~ = K - mean over keys of K                       (softmax does not see what all keys share)
    S  = (Qq Kq^T) * s_q * s_k * scale                 int8 with one fp32 scale a block of tokens, exact sums
    O  = softmax(S + mask) V                           fp32 softmax, P in V's dtype, fp32 accumulation

Method: SageAttention (arXiv 2410.02367, section 4). A row whose every key is masked gives zeros, as
torch's SDPA does. NaN or infinity in a block of Q or K makes NaN where that block takes part.

Shapes: q [..., H, Lq, D], k [..., Hkv, Lk, D], v [..., Hkv, Lk, Dv]; mask bool (True takes part) or additive,
broadcast to [..., H, Lq, Lk]; result [..., H, Lq, Dv] in q's dtype. D <= 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.base import QuantOp, Sample, Tolerance, register
from viditq_fx.ops.quantize import EPS
from viditq_fx.scheme import largest_int

BLOCK_Q, BLOCK_K = 128, 64
"""Tokens that share one scale: the tiles of the kernels."""
SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float? scale, bool enable_gqa) -> Tensor"
MAX_HEAD = 256
"""Widest head: 127 * 127 * 256 is below 2^24, so an fp32 product of the integers is exact."""


def quantize_per_block(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """x [..., L, D] -> (int8 [..., L, D], scale fp32 [..., ceil(L / block)]); NaN becomes 0 and its scale NaN."""
    length, qmax = x.shape[-2], largest_int(8)
    amax_L = x.to(torch.float32).abs().amax(dim=-1)
    amax_B = F.pad(amax_L, (0, -length % block)).unflatten(-1, (-1, block)).amax(dim=-1).clamp(min=EPS)
    scaled = torch.round(x.to(torch.float32) * (qmax / spread(amax_B, block, length)))
    finite = torch.where(scaled == scaled, scaled, torch.zeros_like(scaled))
    return finite.clamp(-qmax, qmax).to(torch.int8), amax_B * (1.0 / qmax)


def spread(scale_B: Tensor, block: int, length: int) -> Tensor:
    """One scale a block [..., ceil(L / block)] -> one a token [..., L, 1]."""
    return scale_B.repeat_interleave(block, dim=-1)[..., :length].unsqueeze(-1)


def quantize_queries_and_keys(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k [..., L, D] -> (Qq, s_q, Kq, s_k): K less its mean over keys, one scale a block of tokens."""
    k = k.to(torch.float32)
    smooth_k = k - k.mean(dim=-2, keepdim=True)
    return (*quantize_per_block(q, BLOCK_Q), *quantize_per_block(smooth_k, BLOCK_K))


def attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """The reference (see the module's formula), a block of queries at a time; arguments as in torch's SDPA.

    Raises ValueError for shapes that do not fit together, D > 256, or a mask beside `is_causal`.
    """
    return attend(q, k, v, attn_mask, is_causal, scale, enable_gqa, _weighting)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    weighting: Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]],
) -> Tensor:
    """Attention with int8 scores. `weighting(v)` gives a function of p = exp(S - max S) [..., rows, Lk] and of its sums
    [..., rows, 1], which makes p V / sum p of them.

    Raises ValueError as `attention_int8` does.
    """
    check(q, k, v, attn_mask, is_causal, enable_gqa)
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], dim=-3) for t in (k, v))
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    if 0 in (q.shape[-2], k.shape[-2], out.numel()):
        return out
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        q_int, s_q, k_int, s_k = quantize_queries_and_keys(q, k)
        q_scale, k_scale = spread(s_q, BLOCK_Q, q.shape[-2]), spread(s_k, BLOCK_K, k.shape[-2])
        q_int, k_int = q_int.to(torch.float32), k_int.to(torch.float32)
        weigh = weighting(v)
        for start in range(0, q.shape[-2], BLOCK_Q):
            rows = slice(start, start + BLOCK_Q)
            scores = (q_int[..., rows, :] @ k_int.transpose(-1, -2)) * q_scale[..., rows, :]
            scores = scores * k_scale.transpose(-1, -2) * factor
            scores = _masked(scores, attn_mask, is_causal, start)
            out[..., rows, :] = _weighted(scores, weigh).to(q.dtype)
    return out


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool, start: int) -> Tensor:
    rows, keys = scores.shape[-2:]
    if is_causal:
        index = torch.arange(start, start + rows, device=scores.device).unsqueeze(-1)
        allowed = torch.arange(keys, device=scores.device) <= index
        return scores.masked_fill(~allowed, float("-inf"))
    if mask is None:
        return scores
    part = mask if mask.shape[-2] == 1 else mask[..., start : start + rows, :]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~part, float("-inf"))
    return scores + part.to(torch.float32)


def _weighting(v: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, total: p.to(v.dtype).to(torch.float32) @ v.to(torch.float32) / total


def _weighted(scores: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    top = scores.amax(dim=-1, keepdim=True)
    blank = top == float("-inf")
    p = torch.exp(scores - torch.where(blank, torch.zeros_like(top), top))
    total = p.sum(dim=-1, keepdim=True)
    value = weigh(p, torch.where(blank, torch.ones_like(total), total))
    return torch.where(blank, torch.zeros_like(value), value)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> None:
    """Raises ValueError for operands that are no attention; see the module for what fits."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if min(q.dim(), k.dim(), v.dim()) < 3 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"attention_int8: {shapes}; expected [..., H, L, D] with one D of q and k, one L of k and v"
        )
    if q.shape[-1] > MAX_HEAD:
        raise ValueError(f"attention_int8: head width {q.shape[-1]}; at most {MAX_HEAD}")
    heads, groups = q.shape[-3], k.shape[-3]
    if (groups == 0 or heads % groups) if enable_gqa else heads != groups:
        raise ValueError(f"attention_int8: {shapes}; the heads differ, which needs enable_gqa and a multiple")
    if mask is not None and is_causal:
        raise ValueError("attention_int8: give a mask or is_causal, not both")


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def samples(device: torch.device) -> Iterator[Sample]:
    gen = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device).to(dtype)

    q, k, v = (draw(2, 3, 40, 32) for _ in range(3))
    yield Sample(label="self", args=(q, k, v, None, False, None, False))
    yield Sample(label="causal-scale", args=(q, k, v, None, True, 0.1, False))
    keep = torch.rand(2, 1, 1, 40, generator=gen, device=device) > 0.3
    yield Sample(label="bool-mask", args=(q, k, v, keep, False, None, False))
    yield Sample(label="additive-mask", args=(q, k, v, draw(2, 1, 40, 40), False, None, False))
    half = [
        draw(1, 4, 130, 72, dtype=torch.bfloat16),
        *(draw(1, 2, 77, 72, dtype=torch.bfloat16) for _ in "kv"),
    ]
    yield Sample(label="cross-gqa-bf16-d72", args=(*half, None, False, None, True))


ATTENTION_INT8 = register(
    QuantOp(
        name="attention_int8",
        schema=SCHEMA,
        reference=attention_int8,
        fake=fake,
        samples=samples,
        # Kernels run the softmax online and over other tiles; P is rounded to V's dtype in either.
        tolerances={
            torch.float32: Tolerance(rtol=1e-4, atol=1e-5),
            torch.float16: Tolerance(rtol=4e-3, atol=1e-3),
            torch.bfloat16: Tolerance(rtol=3.2e-2, atol=4e-3),
        },
    )
)
