"""The two trained models as `quality.py` sees them: how to draw from them, call them once, and judge what they drew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.stress import stress_
from viditq_fx.demo.metrics import class_accuracy, fd_digits, features
from viditq_fx.demo.model import load_classifier, load_digits_dit
from viditq_fx.demo.sampling import balanced_labels, initial_noise, sample
from viditq_fx.demo.video import VideoDiT, initial_video_noise, load_video_dit, sample_videos
from viditq_fx.demo.video_metrics import (
    BACKGROUND,
    INK,
    fd_digits_frames,
    fd_digits_video,
    frame_accuracy,
    video_judge,
)
from viditq_fx.quality import (
    Loss,
    displacement_error,
    frame_difference_deviation,
    psnr,
    sqnr_db,
    temporal_error,
)

Forward = Callable[..., Any]
"""The transformer, or it compiled."""


class Subject(Protocol):
    """A trained model under test. n samples a call; every call of the transformer has 2 n rows."""

    network: nn.Module
    images: int
    groups: Mapping[str, str]
    """Groups of units that the graph does not tell: name -> module paths."""

    def draw(self, forward: Forward, seed: int, steps: int) -> Tensor:
        """Samples [n, ...] in [-1, 1], the same noise for every model."""
        ...

    def step(self, forward: Forward, timestep: float) -> Tensor:
        """The velocity [2 n, ...] of one step on noise, of n digits asked for and n times none."""
        ...

    def judge(self, drawn: Tensor, reference: Tensor) -> dict[str, float]:
        """Figures of what one seed drew, against what fp32 drew from the same noise."""
        ...

    def distance(self, drawn: Tensor) -> float:
        """Fréchet distance of samples to real ones."""
        ...

    def metrics(self) -> Mapping[str, Loss]:
        """The loss of each group of units, for a metric-decoupled search."""
        ...


class Digits:
    """The digits DiT."""

    groups: Mapping[str, str] = {}

    def __init__(self, images: int, *, stressed: bool) -> None:
        self.images = images
        self.network = load_digits_dit()
        self._labels = balanced_labels(images)
        self._classifier = load_classifier()
        if stressed:
            stress_(self.network)

    def draw(self, forward: Forward, seed: int, steps: int) -> Tensor:
        return sample(forward, labels=self._labels, seed=seed, steps=steps, batch_size=self.images)

    def step(self, forward: Forward, timestep: float) -> Tensor:
        rows = 2 * self.images
        label = torch.cat([self._labels, torch.full_like(self._labels, 10)])
        time = torch.full((rows,), timestep)
        with torch.no_grad():
            return forward(
                initial_noise(rows, seed=99), timestep=time, class_labels=label, return_dict=False
            )[0]

    def judge(self, drawn: Tensor, reference: Tensor) -> dict[str, float]:
        return {
            "fd": self.distance(drawn),
            "accuracy": class_accuracy(drawn, self._labels, self._classifier),
            "psnr_db": psnr(reference, drawn),
            "sqnr_db": sqnr_db(reference, drawn),
        }

    def distance(self, drawn: Tensor) -> float:
        return fd_digits(drawn, self._classifier)

    def metrics(self) -> Mapping[str, Loss]:
        def visual(reference: Tensor, test: Tensor) -> float:
            wanted, found = features(self._classifier, reference), features(self._classifier, test)
            return ((found - wanted).square().sum() / wanted.square().sum()).item()

        return {"visual": visual}


class Videos:
    """The video DiT of moving digits."""

    groups: Mapping[str, str] = {"temporal": "temporal_transformer_blocks.*.attn*"}

    def __init__(self, images: int, *, stressed: bool) -> None:
        self.images = images
        self.model: VideoDiT = load_video_dit()
        self.network = self.model.transformer
        self._labels = balanced_labels(images)
        self._classifier = load_classifier()
        if stressed:
            stress_(self.network)

    def draw(self, forward: Forward, seed: int, steps: int) -> Tensor:
        return sample_videos(
            self.model,
            labels=self._labels,
            seed=seed,
            steps=steps,
            batch_size=self.images,
            transformer=forward,
        )

    def step(self, forward: Forward, timestep: float) -> Tensor:
        label = torch.cat([self._labels, torch.full_like(self._labels, 10)])
        noise, time = initial_video_noise(len(label), seed=99), torch.full((len(label),), timestep)
        with torch.no_grad():
            return forward(
                noise,
                timestep=time,
                encoder_hidden_states=self.model.captions(label),
                return_dict=False,
            )[0]

    def judge(self, drawn: Tensor, reference: Tensor) -> dict[str, float]:
        return {
            "fd": self.distance(drawn),
            "fd_frames": fd_digits_frames(drawn, self._classifier),
            "accuracy": frame_accuracy(drawn, self._labels, self._classifier),
            "psnr_db": psnr(reference, drawn),
            "sqnr_db": sqnr_db(reference, drawn),
            "temporal_error": temporal_error(reference, drawn),
            "frame_difference": frame_difference_deviation(reference, drawn),
            "displacement_px": displacement_error(reference, drawn, BACKGROUND, INK),
        }

    def distance(self, drawn: Tensor) -> float:
        return fd_digits_video(drawn, self._classifier)

    def metrics(self) -> Mapping[str, Loss]:
        return vars(video_judge(self._labels, self._classifier))


SUBJECTS: Mapping[str, Callable[..., Subject]] = {"digits": Digits, "video": Videos}
IMAGES = {"digits": 50, "video": 20}
"""Samples of a seed where the command line does not say."""
