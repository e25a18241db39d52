"""Figures for generated digits: class accuracy and FD-digits."""

from __future__ import annotations

import torch
from torch import Tensor

from viditq_fx.demo.model import IMAGE_SIZE, DigitClassifier, load_classifier, load_real_statistics
from viditq_fx.quality import frechet_distance, gaussian_statistics


def features(classifier: DigitClassifier, images_n1hw: Tensor, batch_size: int = 250) -> Tensor:
    """Return the classifier's penultimate features [n, 64], float32, of images [n, 1, 32, 32] in [-1, 1].

    Raises ValueError for another shape.
    """
    _check_images(images_n1hw)
    with torch.no_grad():
        return torch.cat(
            [classifier.features(part_b1hw.float()) for part_b1hw in images_n1hw.split(batch_size)]
        )


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


def _check_images(images_n1hw: Tensor) -> None:
    """Raise ValueError unless the images are [n, 1, 32, 32] with n > 0."""
    shape = tuple(images_n1hw.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"images of shape {shape} were given; give n > 0 digits [n, 1, {IMAGE_SIZE}, {IMAGE_SIZE}]"
        )
