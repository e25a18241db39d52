"""The video transformer of moving digits: diffusers' Latte, trained on real digits that bounce, and its sampler.

It exists to measure what quantization does to a video model (spatial, temporal and cross-attention); the demo
itself draws images. Suffixes: n videos, 1 channel, f frames, h/w pixels; l tokens of a caption, c their channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from viditq_fx.demo.model import read_asset
from viditq_fx.demo.sampling import Progress, SamplingConfig, checked_labels, follow_flow

if TYPE_CHECKING:
    from diffusers import LatteTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]

FRAME_COUNT, FRAME_SIZE = 8, 16
"""Frames of a video, and the height and width of each, in pixels."""
VIDEO_ASSET = "video_dit.safetensors"
TIME_SHIFT = 2.0
"""The shift of times that the model was trained with: equal frames show through more noise than one does."""
GUIDANCE = 3.0
"""At 3 more frames show the digit that was asked for than at the 2 of the digits transformer (training/README.md)."""
_TRANSFORMER, _CAPTIONS = "transformer.", "captions"


@dataclass(frozen=True)
class VideoDiT:
    """The trained network and the learned captions that stand in for a text encoder."""

    transformer: LatteTransformer3DModel
    """Takes noisy videos [n, 1, 8, 16, 16], times [n] in 0..1000 and captions [n, 4, 32]; predicts noise - video."""
    caption_klc: Tensor
    """Four tokens of 32 channels for each digit, [11, 4, 32]; the last row is no digit at all."""

    def captions(self, label_n: Tensor) -> Tensor:
        """Return the captions [n, 4, 32] of labels 0 to 10, where 10 is the null class."""
        return self.caption_klc.to(label_n.device)[label_n]


def load_video_dit(dtype: torch.dtype = torch.float32) -> VideoDiT:
    """Return the trained video model on the CPU: in eval mode, without gradients, weights in `dtype`.

    The weights are stored in float16. Raises ImportError when diffusers is not installed.
    """
    try:
        from diffusers import LatteTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise ImportError(
            "the video model is diffusers' LatteTransformer3DModel, and diffusers cannot be imported; "
            "run: pip install viditq_fx[diffusers]"
        ) from error
    tensors, metadata = read_asset(VIDEO_ASSET)
    transformer = LatteTransformer3DModel(**json.loads(metadata["config"]))
    transformer.load_state_dict(
        {name[len(_TRANSFORMER) :]: t for name, t in tensors.items() if name.startswith(_TRANSFORMER)}
    )
    # Plain torch's `to`, as for the digits transformer.
    nn.Module.to(transformer, dtype)
    return VideoDiT(transformer.eval().requires_grad_(False), tensors[_CAPTIONS].to(dtype))


def initial_video_noise(count: int, seed: int) -> Tensor:
    """Return the standard normal noise [count, 1, 8, 16, 16] that sampling starts from, video after video."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((count, 1, FRAME_COUNT, FRAME_SIZE, FRAME_SIZE), generator=generator)


def sample_videos(
    model: VideoDiT,
    *,
    labels: Tensor | Sequence[int],
    seed: int,
    transformer: Callable[..., Any] | None = None,
    steps: int = SamplingConfig.steps,
    guidance: float = GUIDANCE,
    batch_size: int = 10,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return one video [n, 1, 8, 16, 16], float32 on the CPU in [-1, 1], for each of the n labels.

    transformer: what is called in place of the model's own, e.g. it compiled; with the same signature.
    The rest is that of `viditq_fx.demo.sampling.sample`: one seed draws the same noise for every model, and each
    call has 2 * batch_size videos, cond rows first.

    Raises ValueError for labels outside 0..9, no labels at all, or a setting that SamplingConfig refuses.
    Raises ImportError when diffusers, whose scheduler takes the steps, is not installed.
    """
    config = SamplingConfig(steps=steps, guidance=guidance, batch_size=batch_size, time_shift=TIME_SHIFT)
    label_n = checked_labels(labels)
    forward = model.transformer if transformer is None else transformer

    def velocity(video_b1fhw: Tensor, time_b: Tensor, label_b: Tensor) -> Tensor:
        return forward(
            video_b1fhw.to(dtype),
            timestep=time_b,
            encoder_hidden_states=model.captions(label_b).to(dtype),
            return_dict=False,
        )[0]

    return follow_flow(velocity, initial_video_noise(len(label_n), seed), label_n, config, progress, device)
