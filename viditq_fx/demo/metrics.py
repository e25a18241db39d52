"""Figures for generated digits: class accuracy, FD-digits, and how far two sets of images differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from viditq_fx.demo.model import IMAGE_SIZE, DigitClassifier, load_classifier, load_real_statistics

DATA_RANGE = 2.0
"""Images lie in [-1, 1]."""


def features(classifier: DigitClassifier, images_n1hw: Tensor, batch_size: int = 250) -> Tensor:
    """Return the classifier's penultimate features [n, 64], float32, of images [n, 1, 32, 32] in [-1, 1].

    Raises ValueError for another shape.
    """
    _check_images(images_n1hw)
    with torch.no_grad():
        return torch.cat(
            [classifier.features(part_b1hw.float()) for part_b1hw in images_n1hw.split(batch_size)]
        )


def gaussian_statistics(features_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [d] and the covariance [d, d] (divided by n - 1), float64, of features [n, d].

    Raises ValueError for fewer than 2 rows.
    """
    if features_nd.ndim != 2 or len(features_nd) < 2:
        raise ValueError(
            f"features of shape {tuple(features_nd.shape)} were given; give at least 2 rows [n, d]"
        )
    features_nd = features_nd.double()
    return features_nd.mean(dim=0), torch.cov(features_nd.T).reshape(features_nd.shape[1], -1)


def frechet_distance(mean1_d: Tensor, cov1_dd: Tensor, mean2_d: Tensor, cov2_dd: Tensor) -> float:
    """Return the squared Fréchet distance of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Means are [d] and covariances [d, d], symmetric and positive semidefinite; the sum is in float64. The
    trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), which needs only symmetric
    eigenvalue problems and stays accurate for covariances of low rank.

    Raises ValueError when the shapes do not fit together.
    """
    d = mean1_d.numel()
    shapes = [tuple(tensor.shape) for tensor in (mean1_d, cov1_dd, mean2_d, cov2_dd)]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise ValueError(
            f"statistics of shapes {shapes} were given; give two means [d] and covariances [d, d]"
        )
    mean1_d, cov1_dd, mean2_d, cov2_dd = (t.double() for t in (mean1_d, cov1_dd, mean2_d, cov2_dd))
    roots_d = torch.linalg.svdvals(_symmetric_root(cov1_dd) @ _symmetric_root(cov2_dd))
    distance = (mean1_d - mean2_d).square().sum() + cov1_dd.trace() + cov2_dd.trace() - 2.0 * roots_d.sum()
    return max(0.0, distance.item())


def fd_digits(images_n1hw: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Return FD-digits: the Fréchet distance of the images' features to those of the 5,000 real digits.

    images_n1hw: [n, 1, 32, 32] in [-1, 1]. The figure falls as n grows, so compare equal n only, and it is no
        FID: its features come from the demo's own digit classifier.
    classifier: the demo's classifier, to spare loading it again.

    Raises ValueError for another shape or fewer than 2 images.
    """
    classifier = load_classifier() if classifier is None else classifier
    statistics = gaussian_statistics(features(classifier, images_n1hw))
    return frechet_distance(*statistics, *load_real_statistics())


def class_accuracy(images_n1hw: Tensor, labels_n: Tensor, classifier: DigitClassifier | None = None) -> float:
    """Return the share, 0 to 1, of images in which the classifier sees the digit that was asked for.

    images_n1hw: [n, 1, 32, 32] in [-1, 1]; labels_n: the n digits asked for.

    Raises ValueError when the shapes do not fit together.
    """
    _check_images(images_n1hw)
    if tuple(labels_n.shape) != (len(images_n1hw),):
        raise ValueError(
            f"{len(images_n1hw)} images and labels {tuple(labels_n.shape)} were given; give one each"
        )
    classifier = load_classifier() if classifier is None else classifier
    with torch.no_grad():
        seen_n = torch.cat(
            [classifier(part_b1hw.float()).argmax(dim=1) for part_b1hw in images_n1hw.split(250)]
        )
    return (seen_n == labels_n.to(seen_n.device)).double().mean().item()


def psnr(images1: Tensor, images2: Tensor) -> float:
    """Return the peak signal-to-noise ratio, in dB, of two tensors of images in [-1, 1] (data range 2).

    The squared error is averaged over all pixels of all images. Equal images give infinity.

    Raises ValueError when the shapes differ.
    """
    error = _mean_square(images1, images2)
    return math.inf if error == 0.0 else 10.0 * math.log10(DATA_RANGE**2 / error)


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB: 10 log10(sum ref^2 / sum (ref - test)^2).

    Equal tensors give infinity, also when both are zero; a zero reference otherwise gives minus infinity.

    Raises ValueError when the shapes differ.
    """
    error = _mean_square(reference, test)
    signal = reference.double().square().mean().item()
    if error == 0.0:
        return math.inf
    return -math.inf if signal == 0.0 else 10.0 * math.log10(signal / error)


def _mean_square(a: Tensor, b: Tensor) -> float:
    """Return the mean of (a - b)^2 in float64."""
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} were given; give two of one shape, not empty"
        )
    return (a.double() - b.double()).square().mean().item()


def _symmetric_root(cov_dd: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix, rounding errors below 0 cut off."""
    values_d, vectors_dd = torch.linalg.eigh((cov_dd + cov_dd.T) / 2.0)
    return (vectors_dd * values_d.clamp_min(0.0).sqrt()) @ vectors_dd.T


def _check_images(images_n1hw: Tensor) -> None:
    """Raise ValueError unless the images are [n, 1, 32, 32] with n > 0."""
    shape = tuple(images_n1hw.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"images of shape {shape} were given; give n > 0 digits [n, 1, {IMAGE_SIZE}, {IMAGE_SIZE}]"
        )
