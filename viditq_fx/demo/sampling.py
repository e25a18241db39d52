"""Class-conditional sampling by rectified flow with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from viditq_fx.demo.model import CLASS_COUNT, IMAGE_SIZE, NULL_CLASS

Progress = Callable[[int, int], None]
"""Called after every model call with the number of calls done and their total."""

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(samples [b, ...], times [b] in 0..1000, labels [b]) -> the velocity noise - sample [b, ...]."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are drawn; the same config, labels and seed give the same noise to every model."""

    steps: int = 20
    """Euler steps from noise to image, each one model call on cond and uncond halves together."""
    guidance: float = 2.0
    """Weight w of velocity = uncond + w * (cond - uncond); 1 is plain conditional sampling."""
    batch_size: int = 50
    """Images per model call; the model sees twice as many rows, always the same number."""
    time_shift: float = 1.0
    """s: equal steps of t go to s t / (1 + (s - 1) t), which above 1 spends more of them near the noise."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} was asked for; sampling needs at least 1 step")
        if not 0.0 <= self.guidance < float("inf"):
            raise ValueError(
                f"guidance={self.guidance} was asked for; choose a number from 0 up, usually 1 to 4"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} was asked for; a batch needs at least 1 image")
        if not 0.0 < self.time_shift < float("inf"):
            raise ValueError(
                f"time_shift={self.time_shift} was asked for; choose a number above 0, usually 1 to 5"
            )


def balanced_labels(count: int) -> Tensor:
    """Return `count` labels [count] int64 that run through the digits: 0, 1, ..., 9, 0, 1, ..."""
    if count < 1:
        raise ValueError(f"{count} labels were asked for; ask for at least 1")
    return torch.arange(count) % CLASS_COUNT


def initial_noise(count: int, seed: int) -> Tensor:
    """Return the standard normal noise [count, 1, 32, 32] that sampling starts from, image after image."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((count, 1, IMAGE_SIZE, IMAGE_SIZE), generator=generator)


def sample(
    model: Callable[..., Any],
    *,
    labels: Tensor | Sequence[int],
    seed: int,
    steps: int = SamplingConfig.steps,
    guidance: float = SamplingConfig.guidance,
    batch_size: int = SamplingConfig.batch_size,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return one image [n, 1, 32, 32], float32 on the CPU in [-1, 1], for each of the n labels.

    model: any callable with the signature of diffusers' DiTTransformer2DModel, compiled or not, that
        predicts the velocity noise - image; it is called on `device` with images in `dtype`.
    labels: n digits, each 0 to 9.
    seed: of the one CPU generator that draws all the noise, so that image i starts from the same noise for
        every model, device and batch size.
    batch_size: images per call. Every call has 2 * batch_size rows (cond, then uncond), the last one
        padded by repeating its images, so that a compiled model is compiled for one shape only.

    Raises ValueError for labels outside 0..9, no labels at all, or a setting that SamplingConfig refuses.
    Raises ImportError when diffusers, whose scheduler takes the steps, is not installed.
    """
    config = SamplingConfig(steps=steps, guidance=guidance, batch_size=batch_size)
    label_n = checked_labels(labels)

    def velocity(image_b1hw: Tensor, time_b: Tensor, label_b: Tensor) -> Tensor:
        return model(image_b1hw.to(dtype), timestep=time_b, class_labels=label_b, return_dict=False)[0]

    return follow_flow(velocity, initial_noise(len(label_n), seed), label_n, config, progress, device)


def follow_flow(
    velocity: Velocity,
    noise: Tensor,
    label_n: Tensor,
    config: SamplingConfig,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return what the flow makes of noise [n, ...], in [-1, 1], float32 on the CPU.

    velocity: called with rows [2 * batch_size, ...] on `device`, cond then uncond, their times [2 * batch_size] in
        0..1000 and labels, of which NULL_CLASS is uncond. Every call has the same number of rows: the last batch
        is padded by repeating its own.
    """
    batch_count = -(-len(label_n) // config.batch_size)
    batches = []
    for batch in range(batch_count):
        # Row i of the last batch repeats image i mod (images left): same shape, same statistics.
        start = batch * config.batch_size
        row_b = start + torch.arange(config.batch_size) % min(config.batch_size, len(label_n) - start)

        def report(done_steps: int, calls_before: int = batch * config.steps) -> None:
            if progress is not None:
                progress(calls_before + done_steps, batch_count * config.steps)

        drawn = _follow_batch(velocity, noise[row_b].to(device), label_n[row_b].to(device), config, report)
        batches.append(drawn.cpu())
    return torch.cat(batches)[: len(label_n)].clamp(-1.0, 1.0)


@torch.no_grad()
def _follow_batch(
    velocity: Velocity,
    sample_b: Tensor,
    label_b: Tensor,
    config: SamplingConfig,
    report: Callable[[int], None],
) -> Tensor:
    """Return what the flow makes of one batch of noise, in float32; `report` hears the steps done."""
    scheduler = _scheduler(config, sample_b.device)
    # Cond rows first, then uncond rows: one model call does both.
    label_2b = torch.cat([label_b, torch.full_like(label_b, NULL_CLASS)])
    for done, time in enumerate(scheduler.timesteps, start=1):
        time_2b = time.expand(len(label_2b)).contiguous()
        velocity_2b = velocity(torch.cat([sample_b, sample_b]), time_2b, label_2b).float()
        cond_b, uncond_b = velocity_2b.chunk(2)
        guided_b = uncond_b + config.guidance * (cond_b - uncond_b)
        sample_b = scheduler.step(guided_b, time, sample_b, return_dict=False)[0]
        report(done)
    return sample_b


def _scheduler(config: SamplingConfig, device: torch.device) -> Any:
    """Return diffusers' Euler scheduler, set to the config's steps from time 1 (noise) to time 0 (image)."""
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise ImportError(
            "the demo samples with a scheduler of diffusers, and diffusers cannot be imported; "
            "run: pip install viditq_fx[diffusers]"
        ) from error
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.time_shift)
    sigmas = [1.0 - step / config.steps for step in range(config.steps)]
    scheduler.set_timesteps(sigmas=sigmas, device=device)
    return scheduler


def checked_labels(labels: Tensor | Sequence[int]) -> Tensor:
    """Return the labels as [n] int64 on the CPU, or raise ValueError for what is no list of digits."""
    label_n = torch.as_tensor(labels).cpu()
    if label_n.ndim != 1 or len(label_n) == 0:
        raise ValueError(
            f"labels of shape {tuple(label_n.shape)} were given; give a list of at least one digit"
        )
    if label_n.is_floating_point() or label_n.is_complex() or label_n.dtype == torch.bool:
        raise ValueError(
            f"labels of type {label_n.dtype} were given; give whole numbers 0 to {CLASS_COUNT - 1}"
        )
    if bool((label_n < 0).any()) or bool((label_n >= CLASS_COUNT).any()):
        wrong = sorted({int(label) for label in label_n} - set(range(CLASS_COUNT)))
        raise ValueError(
            f"labels {wrong[:5]} were asked for; the model draws the digits 0 to {CLASS_COUNT - 1}"
        )
    return label_n.to(torch.int64)
