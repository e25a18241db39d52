"""Attention for CUDA with an int8 product of queries and keys: one pass over the keys, online softmax.

    S = (Qq Kq^T) * s_q * s_k * scale        int8 tensor cores, exact int32 sums
    O = softmax(S + mask) V                  fp32 softmax; P in V's dtype, e4m3 or int8, fp32 accumulation
    L = log sum exp (S + mask)               natural logarithm, for context parallelism

Meaning and quantization: `viditq_fx/ops/attention.py` (one scale for 128 queries or 64 keys; K less its mean), and of V
`viditq_fx/ops/attention_eight_bit.py`. Methods: SageAttention and SageAttention2 (arXiv 2410.02367, 2411.10958),
FlashAttention-2 (arXiv 2307.08691). Tensor cores that multiply e4m3 keep 22 bits or fewer while they add, so what they
made of each tile of keys is added to a sum in ordinary fp32 registers; int32 sums of a tile are exact.

Shapes: q [B, H, Lq, D] and k [B, Hkv, Lk, D] int8, contiguous; scales fp32 [B, H, blocks]; v [B, Hkv, Lk, Dv] with any
strides but a contiguous last axis, or 8 bits in [B, Hkv, Dv, keys] (see `columns`); mask broadcast by strides of 0; out
[B, H, Lq, Dv]; lse fp32 [B, H, Lq].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.ops.attention import BLOCK_K, BLOCK_Q, check, quantize_queries_and_keys
from viditq_fx.ops.attention_eight_bit import spread_of_values, token_scale, values_to_fp8, values_to_int8
from viditq_fx.ops.fp8 import LARGEST
from viditq_fx.triton_templates.attention_tiles import AttentionConfig

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_127 = tl.constexpr(6.988684686772166)
ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: a number of up to 2^22 that is added to it is rounded, and is its low bits."""
NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2
VALUES = {"16 bits": 0, "fp8": 1, "int8": 2}
"""What P and V are multiplied in -> the kernel's constant VALUES; "16 bits" is V's own dtype."""


@triton.jit
def _in_order_of_columns(p_MN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Put keys in the order of `columns`: a thread then holds as first operand what it has of the sums, unshuffled."""
    p = tl.permute(tl.reshape(p_MN, (BLOCK_M, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(p, (BLOCK_M, BLOCK_N))


@triton.jit
def _attend(
    q_MD,
    q_scale,
    top_M,
    sum_M,
    out_MD,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    token_ptr,
    mask_ptr,
    v_stride_row,
    mask_stride_q,
    mask_stride_k,
    first,
    rows,
    begin,
    end,
    LK,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_N: tl.constexpr,
    VALUES: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Take the keys [begin, end) into (top, sum, out); EDGE: some are past the end, or past a row's own position."""
    m_M = tl.arange(0, BLOCK_M)
    n_N = tl.arange(0, BLOCK_N)
    d_D = tl.arange(0, BLOCK_D)
    dv_D = tl.arange(0, BLOCK_DV)
    # Addresses: a 64-bit base that is one number and moves, and 32-bit offsets in the tile that stay.
    k_ptr += begin.to(tl.int64) * D
    v_ptr += begin.to(tl.int64) * v_stride_row if VALUES == 0 else begin
    mask_ptr += begin.to(tl.int64) * mask_stride_k
    for start in range(begin, end, BLOCK_N):
        left = LK - start
        k_at = k_ptr + n_N[None, :] * D + d_D[:, None]
        # Columns of V go on to a multiple of 16, where P is 0.
        last = left if VALUES == 0 else v_stride_row - start
        if VALUES == 0:
            v_at = v_ptr + n_N[:, None] * v_stride_row + dv_D[None, :]
        else:
            v_at = v_ptr + dv_D[None, :].to(tl.int64) * v_stride_row + n_N[:, None]
        if EDGE:
            k_DN = tl.load(k_at, mask=(n_N[None, :] < left) & (d_D[:, None] < D), other=0)
            v_ND = tl.load(v_at, mask=(n_N[:, None] < last) & (dv_D[None, :] < DV), other=0.0)
            k_scale_N = tl.load(k_scale_ptr + (start + n_N) // SCALE_N, mask=n_N < left, other=0.0)
        else:
            k_DN = tl.load(k_at) if D == BLOCK_D else tl.load(k_at, mask=d_D[:, None] < D, other=0)
            v_ND = tl.load(v_at) if DV == BLOCK_DV else tl.load(v_at, mask=dv_D[None, :] < DV, other=0.0)
            k_scale_N = tl.load(k_scale_ptr + (start + n_N) // SCALE_N)
        s_MN = tl.dot(q_MD, k_DN, out_dtype=tl.int32).to(tl.float32) * (q_scale * k_scale_N)[None, :]
        if VALUES == 2:
            # P times V's scale of each token, from here on; its inverse makes the sum of P of it.
            token_at = token_ptr + start + n_N
            s_MN += (tl.load(token_at, mask=n_N < left, other=0.0) if EDGE else tl.load(token_at))[None, :]
            inverse_at = token_at + LK
            inverse_N = tl.load(inverse_at, mask=n_N < left, other=0.0) if EDGE else tl.load(inverse_at)
        if MASK != 0:
            # A row past the end reads the last row's mask; it is never stored.
            mask_at = (
                mask_ptr + tl.minimum(m_M, rows - 1)[:, None] * mask_stride_q + n_N[None, :] * mask_stride_k
            )
            mask_MN = tl.load(mask_at, mask=n_N[None, :] < left, other=0) if EDGE else tl.load(mask_at)
            if MASK == 1:
                s_MN = tl.where(mask_MN != 0, s_MN, float("-inf"))
            else:
                s_MN += mask_MN.to(tl.float32) * LOG2_E
            mask_ptr += BLOCK_N * mask_stride_k
        if EDGE:
            s_MN = tl.where(n_N[None, :] < left, s_MN, float("-inf"))
            if CAUSAL:
                s_MN = tl.where(first + m_M[:, None] >= start + n_N[None, :], s_MN, float("-inf"))

        block_M = tl.max(s_MN, 1)
        next_M = tl.maximum(top_M, block_M)
        # A row that no key is open to yet keeps -inf: subtract 0 there, so that no NaN is made.
        safe_M = tl.where(next_M == float("-inf"), 0.0, next_M)
        shrink_M = tl.exp2(top_M - safe_M)
        if VALUES == 0:
            p_MN = tl.exp2(s_MN - safe_M[:, None])
            sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
            out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD * shrink_M[:, None], input_precision="ieee")
        elif VALUES == 1:
            p_MN = tl.exp2(s_MN - (safe_M - 8.0)[:, None])
            sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
            p_MN = _in_order_of_columns(p_MN.to(v_ND.dtype), BLOCK_M, BLOCK_N)
            # The limit keeps this product a sum of its own: without one it is folded into that of all tiles.
            out_MD = out_MD * shrink_M[:, None] + tl.dot(p_MN, v_ND, max_num_imprecise_acc=BLOCK_N)
        else:
            level_M = tl.where(block_M == float("-inf"), 0.0, block_M)
            p_MN = tl.exp2(s_MN - (level_M - LOG2_127)[:, None])
            weight_M = tl.exp2(block_M - safe_M)
            sum_M = sum_M * shrink_M + tl.sum(p_MN * inverse_N[None, :], 1) * weight_M  # pyright: ignore[reportPossiblyUnboundVariable]
            p_MN = (p_MN + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
            product_MD = tl.dot(_in_order_of_columns(p_MN, BLOCK_M, BLOCK_N), v_ND, out_dtype=tl.int32)
            out_MD = out_MD * shrink_M[:, None] + product_MD.to(tl.float32) * weight_M[:, None]
        top_M = next_M
        k_ptr += BLOCK_N * D
        v_ptr += BLOCK_N * v_stride_row if VALUES == 0 else BLOCK_N
    return top_M, sum_M, out_MD


@triton.jit
def attention_int8_kernel(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_scale_ptr,
    v_mean_ptr,
    token_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    scale,
    HEADS,
    GROUP,
    LQ,
    LK,
    v_stride_b,
    v_stride_h,
    v_stride_row,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    out_stride_b,
    out_stride_h,
    out_stride_l,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_M: tl.constexpr,
    SCALE_N: tl.constexpr,
    VALUES: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """out[m] = sum_n softmax_n(s_q s_k scale <q[m], k[n]> + mask[m, n]) v[n]; BLOCK_M rows of one head a program."""
    tile_m = tl.program_id(0)
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    kv_head = head // GROUP
    kv = batch * (HEADS // GROUP) + kv_head
    first = tile_m * BLOCK_M
    rows = LQ - first
    m_M = tl.arange(0, BLOCK_M)
    d_D = tl.arange(0, BLOCK_D)
    dv_D = tl.arange(0, BLOCK_DV)

    q_ptr += ((batch * HEADS + head) * LQ + first) * D
    k_ptr += kv * LK * D
    v_ptr += batch * v_stride_b + kv_head * v_stride_h
    k_scale_ptr += kv * tl.cdiv(LK, SCALE_N)
    token_ptr += kv * 2 * LK
    mask_ptr += batch * mask_stride_b + head * mask_stride_h + first.to(tl.int64) * mask_stride_q
    q_at = q_ptr + m_M[:, None] * D + d_D[None, :]
    q_MD = tl.load(q_at, mask=(m_M[:, None] < rows) & (d_D[None, :] < D), other=0)
    # A tile lies in one block of queries, so that its scale is one number. Base 2: exp2 is what the device has.
    q_block = (batch * HEADS + head) * tl.cdiv(LQ, SCALE_M) + first // SCALE_M
    # Inductor passes a float as fp64: without the cast all scores would be.
    q_scale = (tl.load(q_scale_ptr + q_block) * scale * LOG2_E).to(tl.float32)

    top_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    out_MD = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    end = LK
    if CAUSAL:
        end = tl.minimum(LK, first + BLOCK_M)
    # Whole tiles first, without a mask of their own: the last one, and those on the diagonal, come after.
    whole = tl.minimum(end, first if CAUSAL else LK) // BLOCK_N * BLOCK_N
    top_M, sum_M, out_MD = _attend(
        *(q_MD, q_scale, top_M, sum_M, out_MD, k_ptr, k_scale_ptr, v_ptr, token_ptr, mask_ptr),
        *(v_stride_row, mask_stride_q, mask_stride_k, first, rows, whole * 0, whole, LK),
        *(D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SCALE_N, VALUES, MASK, CAUSAL, False),  # pyright: ignore[reportArgumentType]
    )
    top_M, sum_M, out_MD = _attend(
        *(q_MD, q_scale, top_M, sum_M, out_MD, k_ptr, k_scale_ptr, v_ptr, token_ptr, mask_ptr),
        *(v_stride_row, mask_stride_q, mask_stride_k, first, rows, whole, end, LK),
        *(D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SCALE_N, VALUES, MASK, CAUSAL, True),  # pyright: ignore[reportArgumentType]
    )

    out_MD = out_MD / tl.where(sum_M == 0.0, 1.0, sum_M)[:, None]
    if VALUES != 0:
        scale_D = tl.load(v_scale_ptr + kv * DV + dv_D, mask=dv_D < DV, other=0.0)
        mean_D = tl.load(v_mean_ptr + kv * DV + dv_D, mask=dv_D < DV, other=0.0)
        out_MD = out_MD * scale_D[None, :] + tl.where(sum_M == 0.0, 0.0, 1.0)[:, None] * mean_D[None, :]
    if HAS_LSE:
        if VALUES == 1:
            top_M -= 8.0
        elif VALUES == 2:
            top_M -= LOG2_127
        lse_M = (top_M + tl.log2(sum_M)) / LOG2_E
        tl.store(lse_ptr + (batch * HEADS + head) * LQ + first + m_M, lse_M, mask=m_M < rows)
    out_ptr += batch * out_stride_b + head * out_stride_h + first.to(tl.int64) * out_stride_l
    out_at = out_ptr + m_M[:, None] * out_stride_l + dv_D[None, :]
    tl.store(out_at, out_MD.to(out_ptr.dtype.element_ty), mask=(m_M[:, None] < rows) & (dv_D[None, :] < DV))


def constants(
    config: AttentionConfig,
    head: int,
    value: int,
    mask: Tensor | None,
    causal: bool,
    values: str = "16 bits",
) -> dict[str, int]:
    """The kernel's compile-time constants but for HAS_LSE."""
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
    return {
        "D": head,
        "DV": value,
        # int8 tensor cores take 32 of K at a time, and tiles are powers of two.
        "BLOCK_D": max(32, triton.next_power_of_2(head)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SCALE_M": BLOCK_Q,
        "SCALE_N": BLOCK_K,
        "VALUES": VALUES[values],
        "MASK": kind,
        "CAUSAL": causal,
    }


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    config: AttentionConfig,
    values: str = "16 bits",
    return_lse: bool = False,
    run: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Quantize, then run the kernel: arguments and result as of `viditq::attention_int8`, and the log-sum-exp.

    `values` is what P V is computed in: "fp8" and "int8" as of `viditq::attention_int8_fp8` and `attention_int8_int8`.

    `run` wraps the kernel for a compiler that traces the call. Raises what the op's reference raises.
    """
    check(q, k, v, attn_mask, is_causal, enable_gqa)
    shape, lead = q.shape, q.shape[:-3]
    q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    (batch, heads, length, head), keys, value = q.shape, k.shape[-2], v.shape[-1]
    q_int, q_scale, k_int, k_scale = quantize_queries_and_keys(q, k)
    v_rows, *v_scales = rows_of_values(v, values)
    # Token-major in memory, as projections are: transposing back to [B, L, H * Dv] copies nothing.
    out = q.new_empty(batch, length, heads, value).transpose(1, 2)
    lse = q.new_empty(batch, heads, length, dtype=torch.float32) if return_lse else None
    mask, strides = _mask(attn_mask, (*lead, heads, length, keys), batch)
    factor = head**-0.5 if scale is None else scale
    arguments = (
        *(q_int.contiguous(), q_scale.contiguous(), k_int.contiguous(), k_scale.contiguous(), v_rows),
        *(q_scale if t is None else t for t in v_scales),
        *(q_int if mask is None else mask, out, q_scale if lse is None else lse),
        factor,
        *(heads, heads // k.shape[1], length, keys, *v_rows.stride()[:3], *strides, *out.stride()[:3]),
    )
    fixed: dict[str, Any] = constants(config, head, value, mask, is_causal, values) | {"HAS_LSE": return_lse}
    grid = (triton.cdiv(length, config.block_m), batch * heads)
    (run or (lambda kernel: kernel))(attention_int8_kernel)[grid](
        *arguments, **fixed, num_stages=config.num_stages, num_warps=config.num_warps
    )
    if lse is not None:
        # Every score of a row was less by <q, mean k>: nothing to the softmax, but parts of K have other means.
        mean_k = k.to(torch.float32).mean(dim=-2, keepdim=True).repeat_interleave(heads // k.shape[1], dim=1)
        lse = (lse + (q.to(torch.float32) * mean_k).sum(-1) * factor).reshape(shape[:-1])
    return out.reshape(*shape[:-1], value), lse


def rows_of_values(v: Tensor, values: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """v [B, Hkv, Lk, Dv] -> (what the kernel reads of it, scale and mean fp32 [B, Hkv, Dv], log2 and inverse of the
    scale of each token fp32 [B, Hkv, 2, Lk]); None for what `values` has not.
    """
    if values == "16 bits":
        return v if v.stride(-1) == 1 else v.contiguous(), None, None, None
    mean_D, far_D = spread_of_values(v)
    if values == "fp8":
        v_DN = values_to_fp8(columns(v), *(t.transpose(-1, -2) for t in (mean_D, far_D)))
        return v_DN.contiguous(), far_D.squeeze(-2) * (1.0 / LARGEST), mean_D.squeeze(-2), None
    token_N = token_scale(v, mean_D, far_D)
    across = (mean_D.transpose(-1, -2), far_D.transpose(-1, -2))
    v_DN = values_to_int8(columns(v), *across, columns(token_N, 1.0))
    tokens = torch.stack((token_N.squeeze(-1).log2(), 1.0 / token_N.squeeze(-1)), dim=-2)
    return v_DN.contiguous(), far_D.squeeze(-2) * (1.0 / 127), mean_D.squeeze(-2), tokens


def columns(v: Tensor, fill: float = 0.0) -> Tensor:
    """v [..., L, D] -> a view or copy [..., D, L] with L padded to a multiple of 16 and every 16 keys in another order.

    sm_90 multiplies 8-bit operands only with keys side by side; transposing them in the kernel takes it as long as the
    softmax. Key 8 h + 2 t + j of 16 comes to place 4 t + 2 h + j: see `_in_order_of_columns`.
    """
    length, groups = v.shape[-2], (v.shape[-2] + 15) // 16
    v = F.pad(v, (0, 0, 0, 16 * groups - length), value=fill)
    v = v.reshape(*v.shape[:-2], groups, 2, 4, 2, v.shape[-1]).movedim(-1, -5).transpose(-3, -2)
    return v.flatten(-4)


def _mask(mask: Tensor | None, full: tuple[int, ...], batch: int) -> tuple[Tensor | None, tuple[int, ...]]:
    """A mask as [B, H, Lq, Lk] with strides of 0 where it is broadcast; bool as bytes."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.expand(full)
    whole = mask if len(full) == 4 else mask.reshape(batch, *full[-3:])
    return whole, whole.stride()
