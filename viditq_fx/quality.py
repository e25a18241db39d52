"""How good generated images or videos are, and how far they lie from those of full precision.

Everything here is a plain function of tensors. A `Judge` is what a search over bit widths asks: three losses,
each a function of (reference, test), so that visual quality, alignment with what was asked for and motion can be
weighed apart, as the metric-decoupled search of ViDiT-Q does (arXiv 2406.02540, section 4.3).

Suffixes: n samples, c channels, f frames, h rows, w columns, d features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from viditq_fx.errors import ViditqError


class QualityError(ViditqError):
    """Samples, features or statistics that a figure cannot be computed from."""


Loss = Callable[[Tensor, Tensor], float]
"""(what full precision drew, what the quantized model drew from the same noise) -> a loss, lower is better."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Three losses of generated samples, of which a metric-decoupled search asks one for each kind of layer."""

    visual: Loss
    """How the samples look: for self-attention and feed-forward layers."""
    alignment: Loss
    """Whether they show what was asked for: for cross-attention."""
    temporal: Loss
    """Whether they move alike: for temporal attention. Images have none; give a function that returns 0."""


def psnr(reference: Tensor, test: Tensor, data_range: float = 2.0) -> float:
    """Return the peak signal-to-noise ratio, in dB, of two tensors of pixels that span `data_range`.

    The squared error is averaged over all pixels of all samples. Equal tensors give infinity.

    Raises QualityError when the shapes differ.
    """
    error = _mean_square(reference, test)
    return math.inf if error == 0.0 else 10.0 * math.log10(data_range**2 / error)


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB: 10 log10(sum ref^2 / sum (ref - test)^2).

    Equal tensors give infinity, also when both are zero; a zero reference otherwise gives minus infinity.

    Raises QualityError when the shapes differ.
    """
    error = _mean_square(reference, test)
    signal = reference.double().square().mean().item()
    if error == 0.0:
        return math.inf
    return -math.inf if signal == 0.0 else 10.0 * math.log10(signal / error)


def gaussian_statistics(features_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [d] and the covariance [d, d] (divided by n - 1), float64, of features [n, d].

    Raises QualityError for fewer than 2 rows.
    """
    if features_nd.ndim != 2 or len(features_nd) < 2:
        raise QualityError(
            f"features of shape {tuple(features_nd.shape)} were given; give at least 2 rows [n, d]"
        )
    features_nd = features_nd.double()
    return features_nd.mean(dim=0), torch.cov(features_nd.T).reshape(features_nd.shape[1], -1)


def frechet_distance(mean1_d: Tensor, cov1_dd: Tensor, mean2_d: Tensor, cov2_dd: Tensor) -> float:
    """Return the squared Fréchet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Means are [d] and covariances [d, d], symmetric and positive semidefinite; the sum is in float64. The
    trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), which needs only symmetric
    eigenvalue problems and stays accurate for covariances of low rank.

    Raises QualityError when the shapes do not fit together.
    """
    d = mean1_d.numel()
    shapes = [tuple(tensor.shape) for tensor in (mean1_d, cov1_dd, mean2_d, cov2_dd)]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise QualityError(
            f"statistics of shapes {shapes} were given; give two means [d] and covariances [d, d]"
        )
    mean1_d, cov1_dd, mean2_d, cov2_dd = (t.double() for t in (mean1_d, cov1_dd, mean2_d, cov2_dd))
    roots_d = torch.linalg.svdvals(_symmetric_root(cov1_dd) @ _symmetric_root(cov2_dd))
    distance = (mean1_d - mean2_d).square().sum() + cov1_dd.trace() + cov2_dd.trace() - 2.0 * roots_d.sum()
    return max(0.0, distance.item())


def frame_difference(video_ncfhw: Tensor) -> float:
    """Return the mean of |x[t + 1] - x[t]| over the pixels of videos [n, c, f, h, w]: motion and flicker.

    Raises QualityError for another rank or fewer than 2 frames.
    """
    _check_videos(video_ncfhw)
    return video_ncfhw.double().diff(dim=2).abs().mean().item()


def frame_difference_deviation(reference_ncfhw: Tensor, test_ncfhw: Tensor) -> float:
    """Return frame_difference(test) / frame_difference(reference) - 1: above 0 flickers, below 0 freezes.

    Raises QualityError when the shapes differ, or when nothing moves in the reference.
    """
    _check_same(reference_ncfhw, test_ncfhw)
    moved = frame_difference(reference_ncfhw)
    if moved == 0.0:
        raise QualityError("nothing moves in the reference videos: give videos whose frames differ")
    return frame_difference(test_ncfhw) / moved - 1.0


def temporal_error(reference_ncfhw: Tensor, test_ncfhw: Tensor) -> float:
    """Return the relative error of the frame differences: sum of |dx - dr| over sum of |dr|, d of frame and next.

    Unlike the deviation of their mean, motion at other places is an error too. 0 is equal motion.

    Raises QualityError when the shapes differ, or when nothing moves in the reference.
    """
    _check_same(reference_ncfhw, test_ncfhw)
    moved = frame_difference(reference_ncfhw)
    if moved == 0.0:
        raise QualityError("nothing moves in the reference videos: give videos whose frames differ")
    return frame_difference(test_ncfhw.double() - reference_ncfhw.double()) / moved


def centre_of_mass(video_ncfhw: Tensor, background: float, threshold: float = 0.0) -> Tensor:
    """Return the centre of mass (row, column), in pixels, of every frame: [n, f, 2] float64.

    background: the value of an empty pixel; a pixel weighs what it lies above background + threshold, summed over
        channels. A frame with nothing above it has its centre in the middle.

    Raises QualityError for another rank.
    """
    _check_videos(video_ncfhw, fewest_frames=1)
    mass_nfhw = (video_ncfhw.double() - (background + threshold)).clamp_min(0.0).sum(dim=1)
    _, _, height, width = mass_nfhw.shape
    total_nf = mass_nfhw.sum(dim=(-2, -1))
    # An empty frame weighs the same everywhere.
    mass_nfhw = torch.where(total_nf[..., None, None] > 0.0, mass_nfhw, 1.0)
    total_nf = mass_nfhw.sum(dim=(-2, -1))
    row_h = torch.arange(height, dtype=torch.float64, device=video_ncfhw.device)
    column_w = torch.arange(width, dtype=torch.float64, device=video_ncfhw.device)
    row_nf = (mass_nfhw.sum(dim=-1) * row_h).sum(dim=-1) / total_nf
    column_nf = (mass_nfhw.sum(dim=-2) * column_w).sum(dim=-1) / total_nf
    return torch.stack([row_nf, column_nf], dim=-1)


def displacement(video_ncfhw: Tensor, background: float, threshold: float = 0.0) -> Tensor:
    """Return how far the centre of mass moves from each frame to the next, in pixels: [n, f - 1, 2] float64.

    Raises QualityError for another rank or fewer than 2 frames.
    """
    _check_videos(video_ncfhw)
    return centre_of_mass(video_ncfhw, background, threshold).diff(dim=1)


def displacement_error(
    reference_ncfhw: Tensor, test_ncfhw: Tensor, background: float, threshold: float = 0.0
) -> float:
    """Return the mean distance, in pixels a frame, of two videos' displacements; 0 is equal motion.

    Raises QualityError when the shapes differ.
    """
    _check_same(reference_ncfhw, test_ncfhw)
    moved_nf2 = displacement(reference_ncfhw, background, threshold)
    return (displacement(test_ncfhw, background, threshold) - moved_nf2).norm(dim=-1).mean().item()


def _mean_square(a: Tensor, b: Tensor) -> float:
    """Return the mean of (a - b)^2 in float64."""
    _check_same(a, b)
    return (a.double() - b.double()).square().mean().item()


def _symmetric_root(cov_dd: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix, rounding errors below 0 cut off."""
    values_d, vectors_dd = torch.linalg.eigh((cov_dd + cov_dd.T) / 2.0)
    return (vectors_dd * values_d.clamp_min(0.0).sqrt()) @ vectors_dd.T


def _check_same(a: Tensor, b: Tensor) -> None:
    """Raise QualityError unless two tensors have one shape and are not empty."""
    if a.shape != b.shape or a.numel() == 0:
        raise QualityError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} were given; give two of one shape, not empty"
        )


def _check_videos(video_ncfhw: Tensor, fewest_frames: int = 2) -> None:
    """Raise QualityError unless these are videos [n, c, f, h, w], none of the sizes 0, of enough frames."""
    shape = tuple(video_ncfhw.shape)
    if len(shape) != 5 or 0 in shape or shape[2] < fewest_frames:
        raise QualityError(
            f"videos of shape {shape} were given; give [n, c, f, h, w] with n > 0 and at least "
            f"{fewest_frames} frame(s)"
        )
