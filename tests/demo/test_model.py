"""The demo's trained networks as shipped: they load, are small, and draw the digits they are asked for."""

import math
import sys

import pytest
import torch

from viditq_fx.demo.metrics import class_accuracy, features
from viditq_fx.demo.model import (
    CLASS_COUNT,
    CLASSIFIER_ASSET,
    DIT_ASSET,
    FEATURE_COUNT,
    STATISTICS_ASSET,
    asset_path,
    load_classifier,
    load_digits_dit,
    read_asset,
)
from viditq_fx.demo.sampling import balanced_labels, sample

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def model():
    return load_digits_dit()


def test_the_transformer_is_ready_for_inference(model):
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000


def test_weights_load_in_the_dtype_asked_for(model):
    half = load_digits_dit(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    name, weight = next(iter(half.named_parameters()))
    assert torch.equal(weight, model.get_parameter(name).to(torch.bfloat16))


def test_the_digits_drawn_are_those_asked_for(model):
    images = sample(model, labels=balanced_labels(10), seed=0, steps=8, batch_size=10)
    assert images.shape == (10, 1, 32, 32)
    assert images.min() >= -1.0
    assert images.max() <= 1.0
    assert class_accuracy(images, balanced_labels(10)) >= 0.9


def test_the_same_seed_gives_the_same_images_and_the_batch_size_does_not_matter(model):
    settings = {"labels": balanced_labels(3), "steps": 3}
    images = sample(model, seed=7, batch_size=3, **settings)
    assert torch.equal(sample(model, seed=7, batch_size=3, **settings), images)
    assert not torch.allclose(sample(model, seed=8, batch_size=3, **settings), images, atol=0.1)
    # Other shapes round differently, so the images agree closely, not to the bit.
    torch.testing.assert_close(sample(model, seed=7, batch_size=2, **settings), images, atol=1e-3, rtol=0)


def test_the_classifier_has_the_features_it_promises():
    classifier = load_classifier()
    images = torch.zeros(3, 1, 32, 32)
    assert not classifier.training
    assert classifier(images).shape == (3, CLASS_COUNT)
    assert features(classifier, images).shape == (3, FEATURE_COUNT)
    logits = classifier.head(torch.relu(features(classifier, images)))
    torch.testing.assert_close(classifier(images), logits)


@pytest.mark.parametrize(
    ("name", "largest_bytes"), [(DIT_ASSET, 6e6), (CLASSIFIER_ASSET, 3e5), (STATISTICS_ASSET, 1e5)]
)
def test_assets_are_small_and_finite(name, largest_bytes):
    with asset_path(name) as path:
        assert path.stat().st_size <= largest_bytes
    tensors, _ = read_asset(name)
    assert all(math.isfinite(tensor.double().sum()) for tensor in tensors.values())


def test_a_missing_asset_is_named():
    with pytest.raises(FileNotFoundError, match=r"no_such\.safetensors"):
        read_asset("no_such.safetensors")


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install viditq_fx\[diffusers\]"):
        load_digits_dit()
    with pytest.raises(ImportError, match=r"pip install viditq_fx\[diffusers\]"):
        sample(lambda *_, **__: None, labels=[1], seed=0)
