"""The entries of `tiny_dits`: configuration, inputs and expected linears of each of the 17 models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_2d_rotary_pos_embed

from tests.models.tiny_dits import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Counts,
    Draw,
    TinyDit,
    grid_positions,
    without_torchvision,
)

_TEXT = 64
_HEADS: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
_ROPE = (8, 12, 12)
_FIXED_TEXT = 20


def _counts(
    *, qkv: int, out: int, up: int, down: int, cond: int, stem: int, head: int = 1, **others: int
) -> Counts:
    """Linears by role, without those that do not occur; `kv`, `both` (single blocks) and `other` are rare."""
    names = {"kv": "attn.kv", "both": "attn.out+ffn.down", "other": "other"}
    counts = {f"attn.{letter}": qkv for letter in "qkv"} | {"attn.out": out, "ffn.up": up, "ffn.down": down}
    counts |= {"cond": cond, "stem": stem, "head": head} | {names[key]: n for key, n in others.items()}
    return {role: count for role, count in counts.items() if count}


def _image(draw: Draw, channels: int = 4) -> torch.Tensor:
    return draw.normal(draw.batch, channels, draw.height, draw.width)


def _square(draw: Draw, channels: int = 4) -> torch.Tensor:
    return draw.normal(draw.batch, channels, draw.height, draw.height)


def _video(draw: Draw, channels: int = 4) -> torch.Tensor:
    return draw.normal(draw.batch, channels, 2, draw.height, draw.width)


def _text(draw: Draw) -> torch.Tensor:
    return draw.normal(draw.batch, draw.text, _TEXT)


def _dit(layers: int) -> dict[str, Any]:
    config = {"in_channels": 4, "out_channels": 8, "num_layers": layers, "sample_size": 16, "patch_size": 2}
    return _HEADS | config | {"num_embeds_ada_norm": 1000, "norm_num_groups": 4}


def _dit_inputs(draw: Draw) -> dict[str, Any]:
    return {"hidden_states": _square(draw), "timestep": draw.time(), "class_labels": draw.classes(1000)}


def _pixart(layers: int) -> dict[str, Any]:
    config = {"in_channels": 4, "out_channels": 8, "num_layers": layers, "sample_size": 8, "patch_size": 2}
    config |= {"cross_attention_dim": WIDTH, "caption_channels": _TEXT, "num_embeds_ada_norm": 1000}
    return _HEADS | config | {"use_additional_conditions": False}


def _pixart_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _image(draw),
        "encoder_hidden_states": _text(draw),
        "timestep": draw.time(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": draw.mask(draw.text, torch.float32),
    }


def _latte(layers: int) -> dict[str, Any]:
    config = {"cross_attention_dim": WIDTH, "caption_channels": _TEXT, "video_length": 4}
    config |= {"in_channels": 4, "out_channels": 8, "num_layers": layers, "sample_size": 8, "patch_size": 2}
    config |= {"attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single"}
    return _HEADS | config | {"norm_elementwise_affine": False, "norm_eps": 1e-6, "num_embeds_ada_norm": 1000}


def _latte_inputs(draw: Draw) -> dict[str, Any]:
    frames = draw.normal(draw.batch, 4, 4, draw.height, draw.height)
    return {"hidden_states": frames, "timestep": draw.time(), "encoder_hidden_states": _text(draw)}


def _hunyuandit(layers: int) -> dict[str, Any]:
    # Its second half joins the first by long skips: layers come in pairs.
    config = {"in_channels": 4, "patch_size": 2, "sample_size": 16, "hidden_size": WIDTH}
    config |= {"num_layers": 2 * layers, "cross_attention_dim": _TEXT, "cross_attention_dim_t5": _TEXT}
    return (
        _HEADS | config | {"pooled_projection_dim": 32, "text_len": _FIXED_TEXT, "text_len_t5": _FIXED_TEXT}
    )


def _hunyuandit_inputs(draw: Draw) -> dict[str, Any]:
    grid = draw.height // 2, draw.width // 2
    rotary = get_2d_rotary_pos_embed(HEAD_DIM, ((0, 0), grid), grid)
    meta = torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * draw.batch)
    mask = draw.mask(_FIXED_TEXT, torch.float32)
    return {
        "hidden_states": _image(draw),
        "timestep": draw.time(dtype=torch.float32),
        "encoder_hidden_states": draw.normal(draw.batch, _FIXED_TEXT, _TEXT),
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": draw.normal(draw.batch, _FIXED_TEXT, _TEXT),
        "text_embedding_mask_t5": mask.clone(),
        "image_meta_size": meta,
        "style": torch.zeros(draw.batch, dtype=torch.long),
        "image_rotary_emb": tuple(torch.as_tensor(x).float() for x in rotary),
    }


def _sd3(layers: int) -> dict[str, Any]:
    config = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": layers}
    config |= {"joint_attention_dim": _TEXT, "caption_projection_dim": WIDTH, "pooled_projection_dim": 96}
    return _HEADS | config | {"pos_embed_max_size": 24}


def _sd3_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _image(draw),
        "encoder_hidden_states": _text(draw),
        "pooled_projections": draw.normal(draw.batch, 96),
        "timestep": draw.time(dtype=torch.float32),
    }


def _qwenimage(layers: int) -> dict[str, Any]:
    config = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": layers}
    return _HEADS | config | {"joint_attention_dim": _TEXT, "axes_dims_rope": _ROPE}


def _qwenimage_inputs(draw: Draw) -> dict[str, Any]:
    height, width = draw.height // 2, draw.width // 2
    return {
        "hidden_states": draw.normal(draw.batch, height * width, 16),
        "encoder_hidden_states": _text(draw),
        "encoder_hidden_states_mask": draw.mask(draw.text, torch.long),
        "timestep": draw.time(1.0, torch.float32),
        "img_shapes": [[(1, height, width)]] * draw.batch,
    }


def _cogvideox(layers: int) -> dict[str, Any]:
    # Rotary embeddings, the form that takes any resolution: they are written into slices of q and k.
    config = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 64, "text_embed_dim": _TEXT}
    config |= {"num_layers": layers, "sample_width": 8, "sample_height": 8, "sample_frames": 9}
    config |= {"patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 34}
    return _HEADS | config | {"use_rotary_positional_embeddings": True}


def _cogvideox_inputs(draw: Draw) -> dict[str, Any]:
    tokens = 2 * (draw.height // 2) * (draw.width // 2)
    angles = get_1d_rotary_pos_embed(HEAD_DIM, tokens, use_real=True)
    return {
        "hidden_states": draw.normal(draw.batch, 2, 4, draw.height, draw.width),
        "encoder_hidden_states": _text(draw),
        "timestep": draw.time(),
        "image_rotary_emb": tuple(x.float() for x in angles),
    }


def _mochi(layers: int) -> dict[str, Any]:
    config = {"patch_size": 2, "num_layers": layers, "pooled_projection_dim": 64, "in_channels": 4}
    config |= {"qk_norm": "rms_norm", "text_embed_dim": _TEXT, "time_embed_dim": 32}
    return _HEADS | config | {"max_sequence_length": 64}


def _masked_video_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _video(draw),
        "encoder_hidden_states": _text(draw),
        "timestep": draw.time(),
        "encoder_attention_mask": draw.mask(draw.text),
    }


def _hunyuanvideo(layers: int) -> dict[str, Any]:
    config = {"in_channels": 4, "out_channels": 4, "num_layers": layers, "num_single_layers": layers}
    config |= {"num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "text_embed_dim": _TEXT}
    return _HEADS | config | {"pooled_projection_dim": 32, "rope_axes_dim": _ROPE, "guidance_embeds": True}


def _hunyuanvideo_inputs(draw: Draw) -> dict[str, Any]:
    pooled, guidance = draw.normal(draw.batch, 32), torch.full((draw.batch,), 6000.0)
    return _masked_video_inputs(draw) | {"pooled_projections": pooled, "guidance": guidance}


def _flux(layers: int) -> dict[str, Any]:
    config = {"patch_size": 1, "in_channels": 16, "num_layers": layers, "num_single_layers": layers}
    config |= {"joint_attention_dim": _TEXT, "pooled_projection_dim": 48, "axes_dims_rope": _ROPE}
    return _HEADS | config | {"guidance_embeds": True}


def _flux_inputs(draw: Draw) -> dict[str, Any]:
    height, width = draw.height // 2, draw.width // 2
    return {
        "hidden_states": draw.normal(draw.batch, height * width, 16),
        "encoder_hidden_states": _text(draw),
        "pooled_projections": draw.normal(draw.batch, 48),
        "timestep": draw.time(1.0, torch.float32),
        "guidance": torch.full((draw.batch,), 3.5),
        "img_ids": grid_positions(1, height, width),
        "txt_ids": torch.zeros(draw.text, 3),
    }


def _wan(layers: int) -> dict[str, Any]:
    config = {"patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": _TEXT}
    config |= {"freq_dim": 64, "ffn_dim": 256, "num_layers": layers, "cross_attn_norm": True}
    return _HEADS | config | {"qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32}


def _wan_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _video(draw),
        "timestep": draw.time(),
        "encoder_hidden_states": _text(draw),
    }


def _ltx(layers: int) -> dict[str, Any]:
    config = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "num_layers": layers}
    return _HEADS | config | {"caption_channels": _TEXT}


def _ltx_inputs(draw: Draw) -> dict[str, Any]:
    height, width = draw.height // 2, draw.width // 2
    return {
        "hidden_states": draw.normal(draw.batch, 2 * height * width, 8),
        "encoder_hidden_states": _text(draw),
        "timestep": draw.time(),
        "encoder_attention_mask": draw.mask(draw.text, torch.float32),
        "num_frames": 2,
        "height": height,
        "width": width,
    }


def _cosmos(layers: int) -> dict[str, Any]:
    config = {"in_channels": 4, "out_channels": 4, "num_layers": layers, "mlp_ratio": 4.0}
    config |= {"text_embed_dim": _TEXT, "adaln_lora_dim": 32, "max_size": (4, 64, 64)}
    config |= {"patch_size": (1, 2, 2), "concat_padding_mask": True, "extra_pos_embed_type": "learnable"}
    return _HEADS | config


def _cosmos_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _video(draw),
        "timestep": draw.time(),
        "encoder_hidden_states": _text(draw),
        "attention_mask": draw.mask(draw.text, torch.float32, padded=0),
        "fps": 24,
        "padding_mask": torch.zeros(1, 1, draw.height, draw.width),
    }


def _sana(layers: int) -> dict[str, Any]:
    config = {"in_channels": 4, "out_channels": 4, "num_layers": layers, "cross_attention_dim": WIDTH}
    config |= {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM}
    return _HEADS | config | {"caption_channels": _TEXT, "sample_size": 8, "patch_size": 1}


def _sana_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": _image(draw),
        "encoder_hidden_states": _text(draw),
        "timestep": draw.time(),
        "encoder_attention_mask": draw.mask(draw.text),
    }


def _lumina2(layers: int) -> dict[str, Any]:
    config = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": WIDTH}
    config |= {"num_layers": layers, "num_refiner_layers": 1, "num_attention_heads": HEADS}
    config |= {"num_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5, "axes_dim_rope": _ROPE}
    return config | {"axes_lens": (128, 64, 64), "cap_feat_dim": _TEXT}


def _lumina2_inputs(draw: Draw) -> dict[str, Any]:
    mask = draw.mask(draw.text)
    mask[0, draw.text - 6 :] = False  # ragged
    return {
        "hidden_states": _image(draw),
        "timestep": 1 - draw.time(1.0, torch.float32),
        "encoder_hidden_states": _text(draw),
        "encoder_attention_mask": mask,
    }


def _zimage(layers: int) -> dict[str, Any]:
    config = {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": WIDTH}
    config |= {"n_layers": layers, "n_refiner_layers": 1, "n_heads": HEADS, "n_kv_heads": HEADS}
    config |= {"qk_norm": True, "cap_feat_dim": _TEXT, "axes_dims": list(_ROPE)}
    return config | {"axes_lens": [512, 64, 64]}


def _zimage_inputs(draw: Draw) -> dict[str, Any]:
    return {
        "x": [draw.normal(4, 1, draw.height, draw.width) for _ in range(draw.batch)],
        "t": 1 - draw.time(1.0, torch.float32),
        "cap_feats": [draw.normal(draw.text, _TEXT) for _ in range(draw.batch)],
    }


def _stable_audio(layers: int) -> dict[str, Any]:
    config = {"sample_size": 32, "in_channels": 8, "out_channels": 8, "num_layers": layers}
    config |= {"num_key_value_attention_heads": 2, "cross_attention_dim": _TEXT, "time_proj_dim": 32}
    return _HEADS | config | {"global_states_input_dim": 48, "cross_attention_input_dim": _TEXT}


def _stable_audio_inputs(draw: Draw) -> dict[str, Any]:
    tokens = draw.height * 4
    return {
        "hidden_states": draw.normal(draw.batch, 8, tokens),
        "timestep": draw.time(1.0, torch.float32),
        "encoder_hidden_states": _text(draw),
        "global_hidden_states": draw.normal(draw.batch, 1, 48),
        "rotary_embedding": get_1d_rotary_pos_embed(
            HEAD_DIM // 2, tokens + 1, use_real=True, repeat_interleave_real=False
        ),
    }


_ROLES: dict[str, Callable[[int], Counts]] = {
    "dit": lambda n: _counts(qkv=n, out=n, up=n, down=n, cond=3 * n + 1, stem=0),
    "pixart_sigma": lambda n: _counts(qkv=2 * n, out=2 * n, up=n, down=n, cond=3, stem=2),
    "latte": lambda n: _counts(qkv=3 * n, out=3 * n, up=2 * n, down=2 * n, cond=3, stem=2),
    "hunyuandit": lambda n: _counts(
        qkv=4 * n, out=4 * n, up=2 * n, down=2 * n, cond=2 * n + 5, stem=2, other=n
    ),
    "sd3": lambda n: _counts(qkv=2 * n, out=2 * n - 1, up=2 * n - 1, down=2 * n - 1, cond=2 * n + 5, stem=1),
    "qwenimage": lambda n: _counts(
        qkv=2 * n, out=2 * n - 1, up=2 * n - 1, down=2 * n - 1, cond=2 * n + 3, stem=2
    ),
    "cogvideox": lambda n: _counts(qkv=n, out=n, up=n, down=n, cond=2 * n + 3, stem=1),
    "mochi": lambda n: _counts(
        qkv=2 * n, out=2 * n - 1, up=2 * n - 1, down=2 * n - 1, cond=2 * n + 5, stem=1, kv=1
    ),
    "hunyuanvideo": lambda n: _counts(
        qkv=3 * n + 1, out=2 * n + 1, up=3 * n + 1, down=2 * n + 1, cond=3 * n + 12, stem=1, both=n
    ),
    "flux_dev": lambda n: _counts(qkv=3 * n, out=2 * n, up=3 * n, down=2 * n, cond=3 * n + 7, stem=2, both=n),
    "wan": lambda n: _counts(qkv=2 * n, out=2 * n, up=n, down=n, cond=3, stem=2),
    "ltx": lambda n: _counts(qkv=2 * n, out=2 * n, up=n, down=n, cond=3, stem=3),
    "cosmos": lambda n: _counts(qkv=2 * n, out=2 * n, up=n, down=n, cond=6 * n + 4, stem=1),
    "sana": lambda n: _counts(qkv=n, out=2 * n, up=n, down=n, cond=3, stem=3, other=3 * n),
    "lumina2": lambda n: _counts(qkv=n + 2, out=n + 2, up=2 * n + 4, down=n + 2, cond=n + 3, stem=2),
    "zimage": lambda n: _counts(qkv=n + 2, out=n + 2, up=2 * n + 4, down=n + 2, cond=n + 4, stem=2),
    "stable_audio": lambda n: _counts(qkv=2 * n, out=2 * n, up=n, down=n, cond=4, stem=4, head=2),
}
"""Layers -> linears by role."""


def _entry(
    name: str,
    class_name: str,
    config: Callable[[int], dict[str, Any]],
    inputs: Callable[[Draw], dict[str, Any]],
    **options: Any,
) -> TinyDit:
    return TinyDit(
        name=name, class_name=class_name, config=config, inputs=inputs, roles=_ROLES[name], **options
    )


ENTRIES = (
    _entry("dit", "DiTTransformer2DModel", _dit, _dit_inputs),
    _entry("pixart_sigma", "PixArtTransformer2DModel", _pixart, _pixart_inputs),
    _entry("latte", "LatteTransformer3DModel", _latte, _latte_inputs),
    _entry("hunyuandit", "HunyuanDiT2DModel", _hunyuandit, _hunyuandit_inputs),
    _entry("sd3", "SD3Transformer2DModel", _sd3, _sd3_inputs),
    _entry("qwenimage", "QwenImageTransformer2DModel", _qwenimage, _qwenimage_inputs),
    _entry("cogvideox", "CogVideoXTransformer3DModel", _cogvideox, _cogvideox_inputs),
    _entry("mochi", "MochiTransformer3DModel", _mochi, _masked_video_inputs),
    _entry("hunyuanvideo", "HunyuanVideoTransformer3DModel", _hunyuanvideo, _hunyuanvideo_inputs),
    _entry("flux_dev", "FluxTransformer2DModel", _flux, _flux_inputs),
    _entry("wan", "WanTransformer3DModel", _wan, _wan_inputs),
    _entry("ltx", "LTXVideoTransformer3DModel", _ltx, _ltx_inputs),
    _entry("cosmos", "CosmosTransformer3DModel", _cosmos, _cosmos_inputs, prepare=without_torchvision),
    _entry("sana", "SanaTransformer2DModel", _sana, _sana_inputs),
    _entry("lumina2", "Lumina2Transformer2DModel", _lumina2, _lumina2_inputs),
    _entry("zimage", "ZImageTransformer2DModel", _zimage, _zimage_inputs),
    _entry("stable_audio", "StableAudioDiTModel", _stable_audio, _stable_audio_inputs),
)
