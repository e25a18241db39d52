"""benchmarks/gpu_models.py: its models take the call that it makes, and a run that was cut off is taken up again."""

import json
from dataclasses import replace

import pytest
import torch

from tests.small_models import tiny_dit

NAMES = ["FLUX", "PixArt", "Stable", "CogVideoX", "Wan"]


@pytest.fixture
def gpu_models():
    pytest.importorskip("triton")
    pytest.importorskip("diffusers")
    import gpu_models

    return gpu_models


@pytest.mark.slow
@pytest.mark.parametrize("start", NAMES)
def test_a_model_takes_the_call(gpu_models, start):
    """On the meta device and four blocks deep: shapes are computed, values are not."""
    (model,) = (m for name, m in gpu_models.MODELS.items() if name.startswith(start))
    layers = {"num_layers": 4, **({"num_single_layers": 4} if start == "FLUX" else {})}
    model = replace(model, config={**model.config, **layers})
    with torch.device("meta"):
        module, inputs = model.make(), model.inputs()
        result = module(**inputs)[0]
    assert result.dtype == torch.bfloat16
    wanted = inputs["hidden_states"].shape
    assert result.shape[0] == wanted[0]
    assert result.shape[-2:] == wanted[-2:]
    assert len(gpu_models.repeated_blocks(module)) == (8 if start == "FLUX" else 4)


def test_every_model_is_tried(gpu_models):
    assert [name.split()[0].split("-")[0].rstrip(",.1") for name in gpu_models.MODELS] == NAMES


def test_repeated_blocks_are_found_by_structure(gpu_models):
    model = tiny_dit(5)
    assert gpu_models.repeated_blocks(model) == list(model.blocks)
    assert gpu_models.repeated_blocks(tiny_dit(3)) == []  # too few to be worth compiling apart


def test_a_run_is_taken_up_where_it_ended_but_not_on_other_code(gpu_models, tmp_path):
    out, where = tmp_path / "models.json", {"device": "d", "commit": "c", "date": "1"}
    assert gpu_models.begun_record(out, where, again=False) == {"environment": where, "models": {}}
    out.write_text(json.dumps({"environment": where, "models": {"a": {"times": {}}}}))
    assert gpu_models.begun_record(out, {**where, "date": "2"}, again=False)["models"] == {"a": {"times": {}}}
    assert gpu_models.begun_record(out, where, again=True)["models"] == {}
    assert gpu_models.begun_record(out, {**where, "commit": "other"}, again=False)["models"] == {}
