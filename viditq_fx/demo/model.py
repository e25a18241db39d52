"""The demo's trained networks, loaded from the package: the digits transformer and the digit classifier."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel  # pyright: ignore[reportPrivateImportUsage]

IMAGE_SIZE = 32
"""Height and width of a digit image, in pixels."""
CLASS_COUNT = 10
"""Digits 0 to 9; label CLASS_COUNT is the null class of classifier-free guidance."""
NULL_CLASS = CLASS_COUNT
FEATURE_COUNT = 64
"""Width of the classifier's features, on which FD-digits is measured."""

DIT_ASSET = "digits_dit.safetensors"
CLASSIFIER_ASSET = "digit_classifier.safetensors"
STATISTICS_ASSET = "digit_statistics.safetensors"


class DigitClassifier(nn.Module):
    """A small convolutional network that names the digit of an image.

    It was trained on real digits with random shifts, turns and noise (training/train_digit_classifier.py).
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.embed = nn.Linear(64 * (IMAGE_SIZE // 8) ** 2, FEATURE_COUNT)
        self.head = nn.Linear(FEATURE_COUNT, CLASS_COUNT)

    def features(self, images_n1hw: Tensor) -> Tensor:
        """Return the features [n, 64], before the last ReLU, of images [n, 1, 32, 32] in [-1, 1]."""
        return self.embed(self.convolutions(images_n1hw).flatten(1))

    def forward(self, images_n1hw: Tensor) -> Tensor:
        """Return the class logits [n, 10] of images [n, 1, 32, 32] in [-1, 1]."""
        return self.head(torch.relu(self.features(images_n1hw)))


def load_digits_dit(dtype: torch.dtype = torch.float32) -> DiTTransformer2DModel:
    """Return the trained digits transformer on the CPU: in eval mode, without gradients, weights in `dtype`.

    It takes noisy images [n, 1, 32, 32], times [n] in 0..1000 and labels [n] in 0..10, of which 10 is the
    null class, and predicts the velocity noise - image [n, 1, 32, 32]. The weights are stored in float16.

    Raises ImportError when diffusers is not installed.
    """
    try:
        from diffusers import DiTTransformer2DModel  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise ImportError(
            "the demo's model is diffusers' DiTTransformer2DModel, and diffusers cannot be imported; "
            "run: pip install viditq_fx[diffusers]"
        ) from error
    weights, metadata = read_asset(DIT_ASSET)
    model = DiTTransformer2DModel(**json.loads(metadata["config"]))
    model.load_state_dict(weights)
    # Plain torch's `to`: that of diffusers warns about modules to keep in float32, of which this model has none.
    nn.Module.to(model, dtype)
    return model.eval().requires_grad_(False)


def load_classifier() -> DigitClassifier:
    """Return the trained digit classifier on the CPU in float32: in eval mode, without gradients."""
    weights, _ = read_asset(CLASSIFIER_ASSET)
    classifier = DigitClassifier()
    classifier.load_state_dict(weights)
    return classifier.eval().requires_grad_(False)


def load_real_statistics() -> tuple[Tensor, Tensor]:
    """Return the mean [64] and covariance [64, 64], float64, of the real digits' features."""
    tensors, _ = read_asset(STATISTICS_ASSET)
    return tensors["mean"].double(), tensors["covariance"].double()


def read_asset(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of the safetensors file `name` in the demo's assets.

    Raises FileNotFoundError when the installed package lacks the file.
    """
    with asset_path(name) as path, safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})


@contextmanager
def asset_path(name: str) -> Iterator[Path]:
    """Give a path of the asset `name` that is valid inside the `with` block, also from a zipped package.

    Raises FileNotFoundError when the installed package lacks the file.
    """
    with resources.as_file(resources.files("viditq_fx.demo") / "assets" / name) as path:
        if not path.is_file():
            raise FileNotFoundError(
                f"the demo's asset {name!r} is missing from the installed package; reinstall viditq_fx, "
                "or in a checkout train it again as training/README.md says"
            )
        yield path
