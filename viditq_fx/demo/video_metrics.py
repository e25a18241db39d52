"""Figures for videos of moving digits: class accuracy, FD-digits over frames and over videos, and the losses.

The judge is the demo's digit classifier, which knows centred digits of 32 x 32 pixels: every frame is enlarged and
its digit moved to the middle first. Suffixes: n videos, m frames of all, f frames of one, h/w pixels, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from viditq_fx.demo.metrics import features
from viditq_fx.demo.model import (
    CLASS_COUNT,
    FEATURE_COUNT,
    IMAGE_SIZE,
    DigitClassifier,
    load_classifier,
    read_asset,
)
from viditq_fx.demo.video import FRAME_SIZE
from viditq_fx.quality import (
    Judge,
    QualityError,
    centre_of_mass,
    displacement,
    displacement_error,
    frechet_distance,
    gaussian_statistics,
    temporal_error,
)

VIDEO_STATISTICS_ASSET = "video_statistics.safetensors"
BACKGROUND = -1.0
INK = 0.3
"""A pixel is ink from this far above the background: what a sampler leaves of noise is not."""


def centred_digits(video_n1fhw: Tensor) -> Tensor:
    """Return every frame as the classifier wants digits: [n * f, 1, 32, 32], the centre of mass in the middle.

    Raises QualityError for anything but videos [n, 1, f, 16, 16].
    """
    _check(video_n1fhw)
    n, _, frames, _, _ = video_n1fhw.shape
    frame_m1hw = video_n1fhw.float().transpose(1, 2).reshape(n * frames, 1, FRAME_SIZE, FRAME_SIZE)
    # Background all round, so that a digit at the border is enlarged like one in the middle.
    border = FRAME_SIZE // 2
    padded_m1hw = F.pad(frame_m1hw, (border, border, border, border), value=BACKGROUND)
    large_m1hw = F.interpolate(padded_m1hw, scale_factor=2, mode="bilinear", align_corners=False)
    centre_m2 = centre_of_mass(large_m1hw[:, :, None], BACKGROUND, INK)[:, 0]
    # Whole pixels: a digit is moved, never blurred; a hair more than a half, so that rounding decides no tie.
    start_m2 = (centre_m2 - (IMAGE_SIZE - 1) / 2.0 + 0.501).floor().long()
    index = torch.arange(IMAGE_SIZE, device=large_m1hw.device)
    row_mh1 = (start_m2[:, :1] + index)[:, :, None]
    column_m1w = (start_m2[:, 1:] + index)[:, None, :]
    frame_m11 = torch.arange(n * frames, device=large_m1hw.device)[:, None, None]
    return large_m1hw[frame_m11, 0, row_mh1, column_m1w][:, None]


def frame_logits(video_n1fhw: Tensor, classifier: DigitClassifier | None = None) -> Tensor:
    """Return the classifier's logits [n, f, 10] of every frame.

    Raises QualityError for anything but videos [n, 1, f, 16, 16].
    """
    classifier = load_classifier() if classifier is None else classifier
    with torch.no_grad():
        logits_mk = torch.cat([classifier(part) for part in centred_digits(video_n1fhw).split(250)])
    return logits_mk.reshape(len(video_n1fhw), -1, CLASS_COUNT)


def frame_accuracy(video_n1fhw: Tensor, label_n: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Return the share, 0 to 1, of all frames in which the classifier sees the digit that was asked for.

    Raises QualityError when the shapes do not fit together.
    """
    _check_labels(video_n1fhw, label_n)
    seen_nf = frame_logits(video_n1fhw, classifier).argmax(dim=-1)
    return (seen_nf == label_n[:, None].to(seen_nf.device)).double().mean().item()


def class_loss(video_n1fhw: Tensor, label_n: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Return the mean cross entropy, in nats, of the digit asked for over all frames: accuracy, but smooth.

    Raises QualityError when the shapes do not fit together.
    """
    _check_labels(video_n1fhw, label_n)
    logits_nfk = frame_logits(video_n1fhw, classifier)
    label_nf = label_n[:, None].to(logits_nfk.device).expand(logits_nfk.shape[:2])
    return F.cross_entropy(logits_nfk.flatten(0, 1), label_nf.flatten()).item()


def frame_features(video_n1fhw: Tensor, classifier: DigitClassifier | None = None) -> Tensor:
    """Return the classifier's features of every frame: [n, f, 64].

    Raises QualityError for anything but videos [n, 1, f, 16, 16].
    """
    classifier = load_classifier() if classifier is None else classifier
    features_md = features(classifier, centred_digits(video_n1fhw))
    return features_md.reshape(len(video_n1fhw), -1, FEATURE_COUNT)


def video_features(video_n1fhw: Tensor, classifier: DigitClassifier | None = None) -> Tensor:
    """Return features pooled over time: [n, 132], the classifier's and those of motion.

    64 means over frames (what is seen), 64 means of the change between frames (a digit that flickers or becomes
    another), and the mean and the spread of rows and columns moved a frame, in pixels (how it flies).

    Raises QualityError for anything but videos [n, 1, f, 16, 16] with at least 2 frames.
    """
    features_nfd = frame_features(video_n1fhw, classifier)
    moved_nf2 = displacement(video_n1fhw, BACKGROUND, INK).abs().float()
    parts = [features_nfd.mean(dim=1), features_nfd.diff(dim=1).abs().mean(dim=1), moved_nf2.mean(dim=1)]
    return torch.cat([*parts, moved_nf2.std(dim=1, correction=0)], dim=1)


def fd_digits_frames(video_n1fhw: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Return FD-digits over frames: the Fréchet distance of all frames' features to those of real moving digits.

    The figure falls as n grows, so compare equal n only. It is no FID: its features come from the digit classifier.

    Raises QualityError for another shape.
    """
    features_md = frame_features(video_n1fhw, classifier).flatten(0, 1)
    return frechet_distance(*gaussian_statistics(features_md), *load_video_statistics("frame"))


def fd_digits_video(video_n1fhw: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Return FD-digits-video: the Fréchet distance of `video_features` to those of real moving digits.

    The figure falls as n grows, so compare equal n only. It is no FVD: its features come from the digit classifier.

    Raises QualityError for another shape or fewer than 2 videos.
    """
    statistics = gaussian_statistics(video_features(video_n1fhw, classifier))
    return frechet_distance(*statistics, *load_video_statistics("video"))


def load_video_statistics(kind: str) -> tuple[Tensor, Tensor]:
    """Return mean [d] and covariance [d, d], float64, of real features: `kind` is "frame" (64) or "video" (132)."""
    tensors, _ = read_asset(VIDEO_STATISTICS_ASSET)
    return tensors[f"{kind}_mean"].double(), tensors[f"{kind}_covariance"].double()


def video_judge(label_n: Tensor, classifier: DigitClassifier | None = None) -> Judge:
    """Return the losses of videos drawn for these labels [n], for a search that weighs kinds of layers apart.

    visual: mean squared distance of the frames' features to those of full precision, over the mean square of these.
    alignment: `class_loss` beyond that of full precision, at least 0.
    temporal: `temporal_error` plus `displacement_error` over the reference's mean speed.
    """
    classifier = load_classifier() if classifier is None else classifier

    def visual(reference_n1fhw: Tensor, test_n1fhw: Tensor) -> float:
        wanted_nfd = frame_features(reference_n1fhw, classifier)
        error_nfd = frame_features(test_n1fhw, classifier) - wanted_nfd
        return (error_nfd.square().sum() / wanted_nfd.square().sum()).item()

    def alignment(reference_n1fhw: Tensor, test_n1fhw: Tensor) -> float:
        wanted = class_loss(reference_n1fhw, label_n, classifier)
        return max(0.0, class_loss(test_n1fhw, label_n, classifier) - wanted)

    def temporal(reference_n1fhw: Tensor, test_n1fhw: Tensor) -> float:
        speed = displacement(reference_n1fhw, BACKGROUND, INK).norm(dim=-1).mean().item()
        moved_apart = displacement_error(reference_n1fhw, test_n1fhw, BACKGROUND, INK)
        return temporal_error(reference_n1fhw, test_n1fhw) + moved_apart / max(speed, 1e-6)

    return Judge(visual=visual, alignment=alignment, temporal=temporal)


def _check(video_n1fhw: Tensor) -> None:
    """Raise QualityError unless these are videos [n, 1, f, 16, 16], n and f above 0."""
    shape = tuple(video_n1fhw.shape)
    if len(shape) != 5 or 0 in shape or (shape[1], *shape[3:]) != (1, FRAME_SIZE, FRAME_SIZE):
        raise QualityError(
            f"videos of shape {shape} were given; give n > 0 videos [n, 1, f, {FRAME_SIZE}, {FRAME_SIZE}]"
        )


def _check_labels(video_n1fhw: Tensor, label_n: Tensor) -> None:
    """Raise QualityError unless there is one label a video."""
    if tuple(label_n.shape) != (len(video_n1fhw),):
        raise QualityError(
            f"{len(video_n1fhw)} videos and labels {tuple(label_n.shape)} were given; give one each"
        )
