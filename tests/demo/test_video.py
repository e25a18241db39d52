"""The video model as shipped, its sampler, and the figures of moving digits on videos that are known."""

import pytest
import torch

from viditq_fx.demo.model import NULL_CLASS, asset_path, load_classifier, read_asset
from viditq_fx.demo.video import (
    TIME_SHIFT,
    VIDEO_ASSET,
    VideoDiT,
    initial_video_noise,
    load_video_dit,
    sample_videos,
)
from viditq_fx.demo.video_metrics import (
    VIDEO_STATISTICS_ASSET,
    centred_digits,
    class_loss,
    fd_digits_frames,
    fd_digits_video,
    frame_accuracy,
    frame_logits,
    load_video_statistics,
    video_features,
    video_judge,
)

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def model():
    return load_video_dit()


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


def flying(digit, step=(1, 1), frames=4, start=(0, 0)):
    """Return a video [1, 1, frames, 16, 16] of a one (a bar) or a zero (a ring), 8 pixels high."""
    tile = torch.full((8, 6), -1.0)
    if digit == 1:
        tile[:, 2:4] = 1.0
    else:
        tile[:, [0, 5]] = tile[[0, 7]] = 1.0
        tile[[0, 0, -1, -1], [0, -1, 0, -1]] = -1.0
    video = torch.full((1, 1, frames, 16, 16), -1.0)
    for frame in range(frames):
        row, column = start[0] + frame * step[0], start[1] + frame * step[1]
        video[0, 0, frame, row : row + 8, column : column + 6] = tile
    return video


def test_the_weights_load_and_are_small(model):
    transformer = model.transformer
    assert not transformer.training
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.float32}
    assert len(transformer.transformer_blocks) + len(transformer.temporal_transformer_blocks) == 6
    for name, largest_bytes in ((VIDEO_ASSET, 6e6), (VIDEO_STATISTICS_ASSET, 1e5)):
        with asset_path(name) as path:
            assert path.stat().st_size <= largest_bytes
        assert all(tensor.isfinite().all() for tensor in read_asset(name)[0].values())


def test_weights_load_in_the_dtype_asked_for(model):
    half = load_video_dit(torch.bfloat16)
    assert {parameter.dtype for parameter in half.transformer.parameters()} == {torch.bfloat16}
    assert torch.equal(half.captions(torch.tensor([4])), model.captions(torch.tensor([4])).bfloat16())


def test_one_step_gives_the_numbers_it_gave_when_it_was_trained(model):
    captions = model.captions(torch.tensor([3, NULL_CLASS]))
    with torch.no_grad():
        velocity = model.transformer(
            initial_video_noise(2, seed=0),
            timestep=torch.tensor([500.0, 900.0]),
            encoder_hidden_states=captions,
        ).sample
    # fp32 sums in another order on another machine: equal to four digits, not to the bit.
    near = {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(velocity.mean((1, 2, 3, 4)), torch.tensor([0.42953, 0.80699]), **near)
    torch.testing.assert_close(velocity.std((1, 2, 3, 4)), torch.tensor([1.47108, 1.07247]), **near)
    wanted = torch.tensor([[0.28712, 0.78852], [2.36402, -0.54342]])
    torch.testing.assert_close(velocity[:, 0, [0, 7], 8, 8], wanted, **near)


def test_the_model_tells_noise_from_a_video_that_it_never_saw(model):
    clean, noise = flying(1, frames=8, start=(2, 2), step=(0, 1)), initial_video_noise(1, seed=0)
    with torch.no_grad():
        velocity = model.transformer(
            (clean + noise) / 2,
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=model.captions(torch.tensor([1])),
        ).sample
    error = (velocity - (noise - clean)).square().mean() / (noise - clean).square().mean()
    assert error < 0.12


class StraightPath:
    """The exact velocity towards a grey level that the caption says, and a record of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, hidden_states, timestep, encoder_hidden_states, return_dict=True):
        assert return_dict is False
        self.calls.append((hidden_states, timestep, encoder_hidden_states))
        target = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None, None]
        return ((hidden_states - target) / (timestep / 1000.0)[:, None, None, None, None],)


def test_the_sampler_follows_the_flow_of_the_captions():
    levels = torch.linspace(-0.8, 0.8, NULL_CLASS + 1)[:, None, None].expand(-1, 4, 32)
    path = StraightPath()
    videos = sample_videos(
        VideoDiT(None, levels), transformer=path, labels=[2, 7], seed=0, steps=4, guidance=1.0, batch_size=2
    )
    assert videos.shape == (2, 1, 8, 16, 16)
    torch.testing.assert_close(videos[:, 0, 0, 0, 0], levels[[2, 7], 0, 0], atol=1e-5, rtol=0)
    noisy, _, captions = path.calls[0]
    assert torch.equal(noisy, initial_video_noise(2, seed=0).repeat(2, 1, 1, 1, 1))
    assert torch.equal(captions[:, 0, 0], levels[[2, 7, NULL_CLASS, NULL_CLASS], 0, 0])
    shifted = [1000 * TIME_SHIFT * t / (1 + (TIME_SHIFT - 1) * t) for t in (1.0, 0.75, 0.5, 0.25)]
    assert [time[0].item() for _, time, _ in path.calls] == pytest.approx(shifted, rel=1e-5)


def test_where_a_digit_is_does_not_matter_to_the_judge():
    here, there = centred_digits(flying(0)), centred_digits(flying(0, start=(3, 5), step=(1, -1)))
    assert here.shape == (4, 1, 32, 32)
    torch.testing.assert_close(here, there)
    torch.testing.assert_close(here[0], here[3])
    assert here[0, 0, 15:17, 15:17].max() < 0.0 < here.max()  # the ring's hole is in the middle


def test_frames_are_named_one_by_one(classifier):
    both = torch.cat([flying(1), flying(0)])
    labels = torch.tensor([1, 0])
    assert frame_accuracy(both, labels, classifier) == 1.0
    assert frame_accuracy(both, labels.flip(0), classifier) == 0.0
    turning = torch.cat([flying(1, frames=3), flying(0, frames=1)], dim=2)
    assert frame_accuracy(turning, torch.tensor([1]), classifier) == 0.75
    assert class_loss(both, labels, classifier) < 1.0 < class_loss(both, labels.flip(0), classifier)
    assert frame_logits(both, classifier).shape == (2, 4, 10)


def test_features_of_a_video_tell_what_moves_and_how(classifier):
    features = video_features(torch.cat([flying(1, step=(1, 1)), flying(1, step=(0, 2))]), classifier)
    assert features.shape == (2, 132)
    # The same digit in every frame: features change by nothing, whole pixels a frame, no spread.
    torch.testing.assert_close(features[:, 64:128], torch.zeros(2, 64), atol=1e-3, rtol=0)
    torch.testing.assert_close(features[:, 128:130], torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    torch.testing.assert_close(features[:, 130:], torch.zeros(2, 2), atol=1e-5, rtol=0)


def test_noise_is_far_from_real_videos_and_flicker_further_over_time(classifier):
    # Ones and zeros are no sample of all digits, but frames that jump from digit to digit are further yet.
    steady = torch.cat([flying(digit, start=(s, 0), step=(0, 1)) for s in range(6) for digit in (0, 1)])
    flicker = steady.clone()
    flicker[::2, :, 1::2], flicker[1::2, :, 1::2] = steady[1::2, :, 1::2], steady[::2, :, 1::2]
    noise = torch.randn(12, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert fd_digits_frames(flicker, classifier) == pytest.approx(fd_digits_frames(steady, classifier))
    assert fd_digits_video(flicker, classifier) > 1.2 * fd_digits_video(steady, classifier)
    assert fd_digits_frames(noise, classifier) > fd_digits_frames(steady, classifier)


@pytest.mark.parametrize(("kind", "width"), [("frame", 64), ("video", 132)])
def test_stored_statistics_are_a_covariance(kind, width):
    mean, covariance = load_video_statistics(kind)
    assert mean.shape == (width,)
    torch.testing.assert_close(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance).min() > -1e-6 * covariance.trace()


def test_each_loss_sees_its_own_kind_of_error(classifier):
    labels = torch.tensor([1, 0])
    reference = torch.cat([flying(1), flying(0)])
    judge = video_judge(labels, classifier)
    assert [loss(reference, reference) for loss in (judge.visual, judge.alignment, judge.temporal)] == [
        0.0
    ] * 3
    wrong_digit = torch.cat([flying(1), flying(1)])
    assert judge.alignment(reference, wrong_digit) > 1.0
    wrong_way = torch.cat([flying(1, step=(1, 0)), flying(0, step=(1, 0))])
    assert judge.visual(reference, wrong_way) == pytest.approx(0.0, abs=1e-6)
    assert judge.alignment(reference, wrong_way) == pytest.approx(0.0, abs=1e-4)
    assert judge.temporal(reference, wrong_way) > 0.5
    assert judge.visual(reference, reference.roll(1, dims=0)) > 0.2


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 2, 4, 16, 16), (1, 1, 4, 32, 32), (0, 1, 4, 16, 16)])
def test_videos_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="n > 0 videos"):
        centred_digits(torch.zeros(shape))
    with pytest.raises(ValueError, match="one each"):
        frame_accuracy(flying(1), torch.tensor([1, 2]))
