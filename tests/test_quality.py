"""Figures of generated samples: Fréchet distance against closed forms, PSNR, SQNR, motion that is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from viditq_fx.quality import (
    centre_of_mass,
    displacement,
    displacement_error,
    frame_difference,
    frame_difference_deviation,
    frechet_distance,
    gaussian_statistics,
    psnr,
    sqnr_db,
    temporal_error,
)

seeds = st.integers(min_value=0, max_value=2**31)
sizes = st.integers(min_value=1, max_value=12)


def random_gaussian(seed, d, rank=None):
    """Return a mean [d] and a covariance [d, d] of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, d if rank is None else rank, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), factor @ factor.T


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


def moving_dot(step, frames=4, start=(2, 1), size=(8, 9)):
    """Return a video [1, 1, frames, h, w] of one bright pixel on a background of -1 that moves by `step` a frame."""
    video = torch.full((1, 1, frames, *size), -1.0)
    for frame in range(frames):
        video[0, 0, frame, start[0] + frame * step[0], start[1] + frame * step[1]] = 1.0
    return video


def test_frame_difference_of_a_moving_dot():
    # Two of 72 pixels change by 2 between any two frames.
    assert frame_difference(moving_dot((1, 2))) == pytest.approx(2 * 2 / 72)
    assert frame_difference(moving_dot((0, 0))) == 0.0


def test_a_video_of_double_contrast_differs_by_the_double():
    video = moving_dot((1, 2))
    assert frame_difference_deviation(video, video * 2) == pytest.approx(1.0)
    assert frame_difference_deviation(video, moving_dot((0, 0))) == pytest.approx(-1.0)
    assert temporal_error(video, video * 2) == pytest.approx(1.0)
    assert temporal_error(video, video + 0.3) == pytest.approx(0.0, abs=1e-6)


def test_motion_at_another_place_is_no_deviation_but_an_error():
    there, elsewhere = moving_dot((1, 2)), moving_dot((1, 2), start=(3, 1))
    assert frame_difference_deviation(there, elsewhere) == pytest.approx(0.0)
    assert temporal_error(there, elsewhere) == pytest.approx(2.0)


def test_centre_and_displacement_of_a_moving_dot():
    video = moving_dot((1, 2))
    centre = centre_of_mass(video, background=-1.0)
    assert centre[0].tolist() == [[2.0, 1.0], [3.0, 3.0], [4.0, 5.0], [5.0, 7.0]]
    assert displacement(video, background=-1.0)[0].tolist() == [[1.0, 2.0]] * 3
    # (1, 2) against (-1, 2) a frame is 2 pixels; a faint veil below the threshold moves nothing.
    other = moving_dot((-1, 2), start=(5, 1)) + 0.05
    assert displacement_error(video, other, background=-1.0, threshold=0.1) == pytest.approx(2.0)


def test_a_mass_of_two_pixels_balances_and_an_empty_frame_is_centred():
    video = torch.full((1, 1, 2, 4, 4), -1.0)
    video[0, 0, 0, 0, 0], video[0, 0, 0, 0, 3] = 0.0, 1.0
    assert centre_of_mass(video, background=-1.0)[0].tolist() == [[0.0, 2.0], [1.5, 1.5]]


@pytest.mark.parametrize("figure", [frame_difference_deviation, temporal_error])
def test_motion_against_a_still_reference_is_refused(figure):
    with pytest.raises(ValueError, match="nothing moves"):
        figure(moving_dot((0, 0)), moving_dot((1, 1)))


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 1, 8, 8), (0, 1, 4, 8, 8)])
def test_videos_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="n, c, f, h, w"):
        frame_difference(torch.zeros(shape))
