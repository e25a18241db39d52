"""Our own words - roles, schemes, outcomes - in those of a reader who knows diffusion transformers and not us."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LETTERS = {"q": "query", "k": "key", "v": "value"}
_ROLES = {
    "attn.out": "output projection of attention",
    "ffn.up": "feed-forward, in (gates too)",
    "ffn.down": "feed-forward, out",
    "attention": "softmax(QKᵀ)V itself",
    "cond": "timestep, class or pooled embedding, adaLN modulation",
    "stem": "embeds latents or text",
    "head": "final projection",
    "other": "none of these",
}
_SCHEME = re.compile(r"w(\d+)a(\d+)(?:-g(\d+))?")
_OPS = {
    "linear_w8a8": "an int8 GEMM with scales and bias; several names in one box are one wide GEMM",
    "linear_w8a7": "a GEMM of 8-bit weights and 7-bit activations; several names in one box are one wide GEMM",
    "linear_w8a8_fp8": "a GEMM in 8-bit floating point (e4m3) with scales and bias",
    "linear_w4a8": "a GEMM of 4-bit weights, widened in registers, and 8-bit activations",
    "linear_w4a8_block": "a GEMM of 4-bit weights and 8-bit activations with a scale for each 128 channels of a token",
    "linear_w4a4": "the same of 4-bit activations, two to a byte; the products are of int8",
    "quantize_per_block": "finds a scale for each 128 channels of a token and rounds",
    "quantize_per_token": "finds a scale for each token and rounds",
    "norm_modulate_quantize": "LayerNorm or RMSNorm, adaLN scale and shift, and that rounding, in one op",
    "activation_quantize": "GELU, SiLU or their like, a gate, and that rounding, in one op",
    "attention_int8": "attention with quantized queries and keys",
    "attention_int8_fp8": "the same, with probabilities and values in 8-bit floating point (e4m3)",
    "attention_int8_int8": "the same, with probabilities and values in int8 too",
}
OUTCOMES = {
    "quantized": "runs in integers",
    "simulated": "rounded, but computed in floating point",
    "kept": "in full precision on purpose",
    "refused": "was to be quantized and could not be",
}


def role_in_words(role: str) -> str:
    """What a role is: "attn.kv" -> "key and value projection"; "" for one that has no words."""
    if role in _ROLES:
        return _ROLES[role]
    if "+" in role:
        return "one linear for both: " + ", ".join(role_in_words(part) for part in role.split("+"))
    letters = [_LETTERS[x] for x in role.removeprefix("attn.") if x in _LETTERS]
    return " and ".join(letters) + " projection" if role.startswith("attn.") and letters else ""


def ops_in_words(ops: Iterable[str]) -> dict[str, str]:
    """Those of our ops that are among these -> what they do."""
    there = set(ops)
    return {name: words for name, words in _OPS.items() if name in there}


def scheme_in_words(scheme: str) -> str:
    """ "w8a7" -> "8-bit weights, 7-bit activations"."""
    match = _SCHEME.fullmatch(scheme)
    if scheme == "fp8":
        return "8-bit floating point (e4m3) for weights and activations"
    if match is None:
        return scheme
    weights, inputs, group = match.groups()
    groups = f" with a scale for each {group} input channels" if group else ""
    return f"{weights}-bit weights{groups}, {inputs}-bit activations"
