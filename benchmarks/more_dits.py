"""Diffusion transformers of diffusers beyond those of `tests.models.tiny_dits`, tiny, for the coverage page.

    dit = MORE_DITS["auraflow"]
    model = dit.build(layers=2)
    output = dit.run(model, dit.make_inputs(size=4))

They show what the passes do with models that the test suite does not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_2d_rotary_pos_embed_lumina,
    get_3d_rotary_pos_embed_allegro,
)

from tests.models.tiny_dits import HEAD_DIM, HEADS, WIDTH, Draw, TinyDit, grid_positions

_TEXT = 64
_CHANNELS = 4
_HEADS: dict[str, Any] = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
_ROPE = (8, 12, 12)
_ALLEGRO_HEAD = 48
"""Allegro splits a head into three equal parts of even width."""
_FACE_DIM, _FACE_TOKENS, _FACE_SCALES = 64, 16, 5

Config = Callable[[int], dict[str, Any]]
Inputs = Callable[[Draw], dict[str, Any]]


def _image(draw: Draw, channels: int = _CHANNELS) -> torch.Tensor:
    return draw.normal(draw.batch, channels, draw.height, draw.width)


def _video(draw: Draw, channels: int = _CHANNELS) -> torch.Tensor:
    return draw.normal(draw.batch, channels, 2, draw.height, draw.width)


def _text(draw: Draw, tokens: int | None = None) -> torch.Tensor:
    return draw.normal(draw.batch, tokens or draw.text, _TEXT)


def _basic(draw: Draw, latents: torch.Tensor, scale: float = 1000.0) -> dict[str, Any]:
    """Latents, text and time: what nearly every class takes."""
    time = draw.time(scale, torch.float32)
    return {"hidden_states": latents, "encoder_hidden_states": _text(draw), "timestep": time}


def _auraflow(layers: int) -> dict[str, Any]:
    config = {"sample_size": 32, "in_channels": _CHANNELS, "out_channels": _CHANNELS}
    config |= {"num_mmdit_layers": layers, "num_single_dit_layers": layers, "pos_embed_max_size": 1024}
    return _HEADS | config | {"joint_attention_dim": _TEXT, "caption_projection_dim": WIDTH}


def _cogview(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "out_channels": _CHANNELS, "num_layers": layers}
    config |= {"text_embed_dim": _TEXT, "time_embed_dim": 64, "condition_dim": 32}
    return _HEADS | config | {"pos_embed_max_size": 32, "sample_size": 16}


def _cogview_inputs(draw: Draw) -> dict[str, Any]:
    size, corner = torch.tensor([[1024.0, 1024.0]] * draw.batch), torch.zeros(draw.batch, 2)
    sizes = {"original_size": size, "target_size": size.clone(), "crop_coords": corner}
    return _basic(draw, _image(draw)) | sizes


def _allegro(layers: int) -> dict[str, Any]:
    config = {"num_attention_heads": HEADS, "attention_head_dim": _ALLEGRO_HEAD, "num_layers": layers}
    config |= {"cross_attention_dim": HEADS * _ALLEGRO_HEAD, "caption_channels": _TEXT}
    return config | {"sample_height": 32, "sample_width": 32, "sample_frames": 2}


def _allegro_inputs(draw: Draw) -> dict[str, Any]:
    height, width = draw.height // 2, draw.width // 2
    *freqs, _, _, _ = get_3d_rotary_pos_embed_allegro(
        _ALLEGRO_HEAD, ((0, 0), (height, width)), (height, width), 2
    )
    positions = grid_positions(2, height, width).long().T[:, None]
    tables = tuple(freqs), tuple(positions)
    mask = torch.ones(draw.batch, 2, draw.height, draw.width)
    text_mask = draw.mask(draw.text, torch.float32)
    masks = {"attention_mask": mask, "encoder_attention_mask": text_mask}
    return _basic(draw, _video(draw)) | masks | {"image_rotary_emb": tables}


def _chroma(layers: int) -> dict[str, Any]:
    config = {"in_channels": 16, "num_layers": layers, "num_single_layers": layers}
    config |= {"joint_attention_dim": _TEXT, "axes_dims_rope": _ROPE, "approximator_layers": 2}
    return _HEADS | config | {"approximator_num_channels": 64, "approximator_hidden_dim": WIDTH}


def _packed(draw: Draw, axes: int = 3) -> dict[str, Any]:
    """Flux and its kin: a sequence of patches, and a position for each token."""
    height, width = draw.height // 2, draw.width // 2
    positions = grid_positions(1, height, width)
    pad = torch.zeros(height * width, axes - 3)
    latents = draw.normal(draw.batch, height * width, 16)
    ids = {"img_ids": torch.cat([positions, pad], 1), "txt_ids": torch.zeros(draw.text, axes)}
    return _basic(draw, latents, 1.0) | ids


def _flux2(layers: int) -> dict[str, Any]:
    config = {"in_channels": 16, "num_layers": layers, "num_single_layers": layers}
    config |= {"joint_attention_dim": _TEXT, "timestep_guidance_channels": 64}
    return _HEADS | config | {"axes_dims_rope": (8, 8, 8, 8)}


def _flux2_inputs(draw: Draw) -> dict[str, Any]:
    return _packed(draw, axes=4) | {"guidance": torch.full((draw.batch,), 3.5)}


def _flux_like(layers: int, **more: Any) -> dict[str, Any]:
    config = {"in_channels": 16, "num_layers": layers, "num_single_layers": layers}
    return _HEADS | config | {"joint_attention_dim": _TEXT, "axes_dims_rope": list(_ROPE)} | more


def _bria_inputs(draw: Draw) -> dict[str, Any]:
    return _packed(draw) | {"pooled_projections": None}


def _wan_like(layers: int, **more: Any) -> dict[str, Any]:
    config = {"patch_size": (1, 2, 2), "in_channels": _CHANNELS, "out_channels": _CHANNELS}
    config |= {"text_dim": _TEXT, "freq_dim": 64, "ffn_dim": 256, "num_layers": layers}
    return _HEADS | config | {"rope_max_seq_len": 32} | more


def _wan_vace(layers: int) -> dict[str, Any]:
    # As published: what the last control block adds, another block reads.
    return _wan_like(layers, vace_layers=list(range(layers - 1)) or [0], vace_in_channels=8)


def _wan_vace_inputs(draw: Draw) -> dict[str, Any]:
    return _basic(draw, _video(draw)) | {"control_hidden_states": _video(draw, 8)}


def _easyanimate(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "out_channels": _CHANNELS, "patch_size": 2, "num_layers": layers}
    config |= {"sample_width": 32, "sample_height": 32, "mmdit_layers": layers}
    return _HEADS | config | {"time_embed_dim": 64, "text_embed_dim": _TEXT}


def _lumina_next(layers: int) -> dict[str, Any]:
    config = {"sample_size": 16, "in_channels": _CHANNELS, "hidden_size": WIDTH, "num_layers": layers}
    config |= {"num_attention_heads": HEADS, "num_kv_heads": 2, "multiple_of": 32}
    return config | {"cross_attention_dim": _TEXT}


def _lumina_next_inputs(draw: Draw) -> dict[str, Any]:
    return _basic(draw, _image(draw), 1.0) | {
        "encoder_mask": draw.mask(draw.text),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD_DIM, 64, 64),
        "cross_attention_kwargs": {},
    }


def _kandinsky5(layers: int) -> dict[str, Any]:
    config = {"in_visual_dim": _CHANNELS, "in_text_dim": _TEXT, "in_text_dim2": 48, "time_dim": 64}
    config |= {"out_visual_dim": _CHANNELS, "model_dim": WIDTH, "ff_dim": 4 * WIDTH, "num_text_blocks": 1}
    return config | {"num_visual_blocks": layers, "axes_dims": _ROPE}


def _kandinsky5_inputs(draw: Draw) -> dict[str, Any]:
    latents = draw.normal(draw.batch, 2, draw.height, draw.width, _CHANNELS)
    positions = [torch.arange(n) for n in (2, draw.height // 2, draw.width // 2)]
    return _basic(draw, latents) | {
        "pooled_projections": draw.normal(draw.batch, 48),
        "visual_rope_pos": positions,
        "text_rope_pos": torch.arange(draw.text),
    }


def _prx(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "context_in_dim": _TEXT, "hidden_size": WIDTH, "num_heads": HEADS}
    return config | {"depth": layers, "axes_dim": [16, 16]}


def _prx_inputs(draw: Draw) -> dict[str, Any]:
    return _basic(draw, _image(draw), 1.0) | {"attention_mask": draw.mask(draw.text)}


def _ernie(layers: int) -> dict[str, Any]:
    config = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": layers, "patch_size": 2}
    config |= {"ffn_hidden_size": 4 * WIDTH, "in_channels": _CHANNELS, "out_channels": _CHANNELS}
    return config | {"text_in_dim": _TEXT, "rope_axes_dim": _ROPE}


def _ernie_inputs(draw: Draw) -> dict[str, Any]:
    inputs = _basic(draw, _image(draw))
    inputs["text_bth"] = inputs.pop("encoder_hidden_states")
    return inputs | {"text_lens": torch.full((draw.batch,), draw.text - 3)}


def _ace_step(layers: int) -> dict[str, Any]:
    config = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": layers}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": HEAD_DIM}
    config |= {"in_channels": 24, "audio_acoustic_hidden_dim": 8, "sliding_window": 16}
    return config | {"encoder_hidden_size": _TEXT}


def _ace_step_inputs(draw: Draw) -> dict[str, Any]:
    tokens = 16 * draw.height
    inputs = _basic(draw, draw.normal(draw.batch, tokens, 8), 1.0)
    context = draw.normal(draw.batch, tokens, 16)
    return inputs | {"timestep_r": inputs["timestep"].clone(), "context_latents": context}


def _sana_video(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "out_channels": _CHANNELS, "num_layers": layers}
    config |= {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD_DIM}
    return _HEADS | config | {"cross_attention_dim": WIDTH, "caption_channels": _TEXT, "sample_size": 16}


def _hunyuan15(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "out_channels": _CHANNELS, "num_layers": layers}
    config |= {"num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": _TEXT, "text_embed_2_dim": _TEXT}
    # Its second text projection is 2048 wide in every configuration: blocks of width 128 would be dwarfed by it.
    return _HEADS | {"num_attention_heads": 32} | config | {"image_embed_dim": 48, "rope_axes_dim": _ROPE}


def _hunyuan15_inputs(draw: Draw) -> dict[str, Any]:
    mask = draw.mask(draw.text)
    return _basic(draw, _video(draw)) | {
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": _text(draw, 20),
        "encoder_attention_mask_2": draw.mask(20),
        "image_embeds": draw.normal(draw.batch, 17, 48),
    }


def _hunyuan_image(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "out_channels": _CHANNELS, "num_layers": layers}
    config |= {"num_single_layers": layers, "num_refiner_layers": 1, "patch_size": (2, 2)}
    return _HEADS | config | {"text_embed_dim": _TEXT, "rope_axes_dim": (16, 16)}


def _hunyuan_image_inputs(draw: Draw) -> dict[str, Any]:
    return _basic(draw, _image(draw)) | {"encoder_attention_mask": draw.mask(draw.text)}


def _joyimage(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    return config | {"text_dim": _TEXT, "num_layers": layers, "rope_dim_list": list(_ROPE)}


def _stable_audio3(layers: int) -> dict[str, Any]:
    config = {"io_channels": 8, "embed_dim": WIDTH, "depth": layers, "num_heads": HEADS}
    config |= {"cond_token_dim": _TEXT, "global_cond_dim": 48, "local_add_cond_dim": 8}
    return config | {"timestep_features_dim": 64, "num_memory_tokens": 4}


def _stable_audio3_inputs(draw: Draw) -> dict[str, Any]:
    inputs = _basic(draw, draw.normal(draw.batch, 8, 16 * draw.height), 1.0)
    return inputs | {"global_hidden_states": draw.normal(draw.batch, 48)}


def _omnigen(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "hidden_size": WIDTH, "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": HEADS, "intermediate_size": 4 * WIDTH, "num_layers": layers}
    config |= {"pad_token_id": 0, "vocab_size": 100, "time_step_dim": 64}
    # A rope table for each of the pairs of a head's channels.
    pairs = [1.0] * (HEAD_DIM // 2)
    return config | {"rope_scaling": {"long_factor": pairs, "short_factor": pairs, "type": "su"}}


def _omnigen_inputs(draw: Draw) -> dict[str, Any]:
    tokens = draw.text + 1 + (draw.height // 2) * (draw.width // 2)
    inputs = _basic(draw, _image(draw), 1.0)
    del inputs["encoder_hidden_states"]
    return inputs | {
        "input_ids": torch.randint(1, 100, (draw.batch, draw.text), generator=draw.generator),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(draw.batch, tokens, tokens),
        "position_ids": torch.arange(tokens)[None].repeat(draw.batch, 1),
    }


def _consisid(layers: int) -> dict[str, Any]:
    config = {"in_channels": _CHANNELS, "out_channels": _CHANNELS, "time_embed_dim": 64}
    config |= {"text_embed_dim": _TEXT, "num_layers": layers, "sample_width": 8, "sample_height": 8}
    config |= {"sample_frames": 9, "max_text_seq_length": 34, "use_rotary_positional_embeddings": True}
    config |= {"is_train_face": True, "cross_attn_dim_head": HEAD_DIM, "cross_attn_num_heads": HEADS}
    config |= {"LFE_id_dim": _FACE_DIM, "LFE_vit_dim": _FACE_DIM, "LFE_depth": _FACE_SCALES}
    config |= {"LFE_dim_head": HEAD_DIM, "LFE_num_heads": HEADS, "LFE_num_querie": 32}
    # The faces' width is two thirds of the model's.
    config |= {"num_attention_heads": 3, "attention_head_dim": HEAD_DIM, "LFE_output_dim": 2 * HEAD_DIM}
    return config | {"LFE_num_scale": _FACE_SCALES}


def _consisid_inputs(draw: Draw) -> dict[str, Any]:
    tokens = 2 * (draw.height // 2) * (draw.width // 2)
    latents = draw.normal(draw.batch, 2, _CHANNELS, draw.height, draw.width)
    angles = get_1d_rotary_pos_embed(HEAD_DIM, tokens, use_real=True)
    faces = [draw.normal(draw.batch, _FACE_TOKENS, _FACE_DIM) for _ in range(_FACE_SCALES)]
    return _basic(draw, latents) | {
        "image_rotary_emb": tuple(x.float() for x in angles),
        "id_cond": draw.normal(draw.batch, _FACE_DIM),
        "id_vit_hidden": faces,
    }


def _prior(layers: int) -> dict[str, Any]:
    return _HEADS | {"num_layers": layers, "embedding_dim": _TEXT, "num_embeddings": 77}


def _prior_inputs(draw: Draw) -> dict[str, Any]:
    inputs = _basic(draw, draw.normal(draw.batch, _TEXT))
    inputs["encoder_hidden_states"] = _text(draw, 77)
    return inputs | {"proj_embedding": draw.normal(draw.batch, _TEXT), "attention_mask": draw.mask(77)}


def _entry(name: str, class_name: str, config: Config, inputs: Inputs) -> TinyDit:
    return TinyDit(name=name, class_name=class_name, config=config, inputs=inputs, roles=lambda layers: {})


_ENTRIES = (
    _entry("auraflow", "AuraFlowTransformer2DModel", _auraflow, lambda d: _basic(d, _image(d), 1.0)),
    _entry("cogview3plus", "CogView3PlusTransformer2DModel", _cogview, _cogview_inputs),
    _entry(
        "cogview4",
        "CogView4Transformer2DModel",
        lambda n: _cogview(n) | {"rope_axes_dim": (64, 64)},
        _cogview_inputs,
    ),
    _entry("allegro", "AllegroTransformer3DModel", _allegro, _allegro_inputs),
    _entry("chroma", "ChromaTransformer2DModel", _chroma, _packed),
    _entry("flux2", "Flux2Transformer2DModel", _flux2, _flux2_inputs),
    _entry("skyreels_v2", "SkyReelsV2Transformer3DModel", _wan_like, lambda d: _basic(d, _video(d))),
    _entry("wan_vace", "WanVACETransformer3DModel", _wan_vace, _wan_vace_inputs),
    _entry("chronoedit", "ChronoEditTransformer3DModel", _wan_like, lambda d: _basic(d, _video(d))),
    _entry("easyanimate", "EasyAnimateTransformer3DModel", _easyanimate, lambda d: _basic(d, _video(d))),
    _entry("lumina_next", "LuminaNextDiT2DModel", _lumina_next, _lumina_next_inputs),
    _entry("bria", "BriaTransformer2DModel", _flux_like, _bria_inputs),
    _entry("ovis_image", "OvisImageTransformer2DModel", partial(_flux_like, out_channels=16), _packed),
    _entry(
        "longcat_image",
        "LongCatImageTransformer2DModel",
        partial(_flux_like, pooled_projection_dim=_TEXT),
        _packed,
    ),
    _entry("kandinsky5", "Kandinsky5Transformer3DModel", _kandinsky5, _kandinsky5_inputs),
    _entry("prx", "PRXTransformer2DModel", _prx, _prx_inputs),
    _entry("ernie_image", "ErnieImageTransformer2DModel", _ernie, _ernie_inputs),
    _entry("ace_step", "AceStepTransformer1DModel", _ace_step, _ace_step_inputs),
    _entry("sana_video", "SanaVideoTransformer3DModel", _sana_video, lambda d: _basic(d, _video(d))),
    _entry("hunyuanvideo15", "HunyuanVideo15Transformer3DModel", _hunyuan15, _hunyuan15_inputs),
    _entry("hunyuanimage", "HunyuanImageTransformer2DModel", _hunyuan_image, _hunyuan_image_inputs),
    _entry("joyimage", "JoyImageEditTransformer3DModel", _joyimage, lambda d: _basic(d, _video(d))),
    _entry("stable_audio3", "StableAudio3DiTModel", _stable_audio3, _stable_audio3_inputs),
    _entry("omnigen", "OmniGenTransformer2DModel", _omnigen, _omnigen_inputs),
    _entry("consisid", "ConsisIDTransformer3DModel", _consisid, _consisid_inputs),
    _entry("prior", "PriorTransformer", _prior, _prior_inputs),
)

MORE_DITS = {entry.name: entry for entry in _ENTRIES}
