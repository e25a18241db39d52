"""The sampler: the same noise for every model, guidance, one constant batch shape, and refused settings."""

import pytest
import torch
import torch._dynamo.testing

from viditq_fx.demo.model import NULL_CLASS
from viditq_fx.demo.sampling import SamplingConfig, balanced_labels, initial_noise, sample

pytest.importorskip("diffusers")


class StraightPath:
    """The exact velocity of rectified flow towards one flat image per class, and a record of its calls.

    On the straight path x_t = (1 - t) * image + t * noise, noise - image is (x_t - image) / t.
    """

    def __init__(self, null_level=0.0):
        self.level = torch.cat([torch.linspace(-0.9, 0.9, 10), torch.tensor([null_level])])
        self.calls = []

    def __call__(self, hidden_states, timestep=None, class_labels=None, return_dict=True):
        assert not torch.is_grad_enabled()
        assert return_dict is False
        self.calls.append((hidden_states.clone(), timestep.clone(), class_labels.clone()))
        image = self.level[class_labels][:, None, None, None].to(hidden_states)
        return ((hidden_states - image) / (timestep / 1000.0)[:, None, None, None].to(hidden_states),)


def test_euler_follows_the_flow_to_the_image_asked_for():
    labels = torch.tensor([0, 3, 9])
    model = StraightPath()
    for steps in (1, 7, 20):
        images = sample(model, labels=labels, seed=1, steps=steps, guidance=1.0, batch_size=3)
        expected = model.level[labels][:, None, None, None].expand(3, 1, 32, 32)
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_guidance_goes_past_the_conditional_image_and_stays_in_range():
    model = StraightPath(null_level=0.1)
    # uncond + 2 * (cond - uncond), clamped: 0.1 + 2 * (0.3 - 0.1) = 0.5 and 0.1 + 2 * (0.9 - 0.1) -> 1.
    images = sample(model, labels=[6, 9], seed=0, guidance=2.0, batch_size=2)
    torch.testing.assert_close(images[0], torch.full((1, 32, 32), 0.5), atol=1e-5, rtol=0)
    assert torch.equal(images[1], torch.ones(1, 32, 32))


def test_times_run_from_1000_down_and_each_call_has_cond_then_null_rows():
    model = StraightPath()
    sample(model, labels=[4, 2], seed=0, steps=5, batch_size=2)
    assert len(model.calls) == 5
    times = [time[0].item() for _, time, _ in model.calls]
    assert times == pytest.approx([1000.0, 800.0, 600.0, 400.0, 200.0], rel=1e-5)
    for rows, time, label in model.calls:
        assert torch.equal(rows[:2], rows[2:])
        assert (time == time[0]).all()
        assert label.tolist() == [4, 2, NULL_CLASS, NULL_CLASS]
    assert torch.equal(model.calls[0][0][:2], initial_noise(2, seed=0))


def test_last_batch_is_padded_to_the_constant_shape_with_its_own_images():
    model = StraightPath()
    images = sample(model, labels=[1, 2, 3, 4, 5, 6, 7], seed=3, steps=2, batch_size=5)
    assert images.shape == (7, 1, 32, 32)
    assert images.dtype == torch.float32
    assert {tuple(rows.shape) for rows, _, _ in model.calls} == {(10, 1, 32, 32)}
    assert model.calls[-1][2][:5].tolist() == [6, 7, 6, 7, 6]


def test_a_compiled_model_is_compiled_once():
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter)
    def shrink(hidden_states, timestep=None, class_labels=None, return_dict=True):
        return (hidden_states * (timestep / 1000.0 + class_labels)[:, None, None, None],)

    for seed, count in ((0, 7), (1, 4), (2, 1)):
        sample(shrink, labels=[1] * count, seed=seed, steps=3, batch_size=4)
    assert counter.frame_count == 1


def test_progress_counts_every_model_call():
    heard = []
    sample(
        StraightPath(),
        labels=[0] * 5,
        seed=0,
        steps=3,
        batch_size=2,
        progress=lambda *done: heard.append(done),
    )
    assert heard == [(done, 9) for done in range(1, 10)]


def test_noise_of_an_image_depends_on_the_seed_and_its_place_alone():
    assert torch.equal(initial_noise(3, seed=5), initial_noise(8, seed=5)[:3])
    assert not torch.equal(initial_noise(3, seed=5), initial_noise(3, seed=6))
    # The global generator is neither read nor moved.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(StraightPath(), labels=[0], seed=5, steps=1, batch_size=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_model_is_called_in_the_dtype_asked_for():
    model = StraightPath()
    images = sample(model, labels=[0], seed=0, steps=1, batch_size=1, dtype=torch.bfloat16)
    assert model.calls[0][0].dtype == torch.bfloat16
    assert model.calls[0][1].dtype == torch.float32
    assert images.dtype == torch.float32


@pytest.mark.parametrize("labels", [[], [10], [-1], [[1, 2]], [0.5], torch.tensor([True])], ids=str)
def test_labels_that_are_no_digits_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        sample(StraightPath(), labels=labels, seed=0)


@pytest.mark.parametrize(
    "setting",
    [{"steps": 0}, {"guidance": -1.0}, {"guidance": float("nan")}, {"batch_size": 0}],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SamplingConfig(**setting)
    with pytest.raises(ValueError, match=next(iter(setting))):
        sample(StraightPath(), labels=[1], seed=0, **setting)


def test_balanced_labels_run_through_the_digits():
    assert balanced_labels(12).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    with pytest.raises(ValueError, match="at least 1"):
        balanced_labels(0)
