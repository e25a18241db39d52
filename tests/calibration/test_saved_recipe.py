"""A recipe that is saved, loaded and applied in a new process gives this process's output, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import viditq_fx as vq
from tests.calibration.test_calibrate import calls
from tests.small_models import tiny_dit, tiny_inputs

ROOT = Path(__file__).parents[2]
STEPS = (900.0, 400.0, 10.0)
APPLY = """
import sys
import torch
from safetensors.torch import save_file
import viditq_fx as vq
from tests.calibration.test_saved_recipe import drawn
from tests.small_models import tiny_dit

torch.set_num_threads(1)
folder = sys.argv[1]
vq.Recipe.load(folder).check(tiny_dit(layers=1))
save_file(drawn(folder), f"{folder}/drawn.safetensors")
"""


@torch.no_grad()
def drawn(recipe):
    """What the compiled model gives at each step."""
    torch._dynamo.reset()
    run = torch.compile(
        tiny_dit(layers=1), backend="viditq", options={"recipe": recipe, "strict": True}, fullgraph=True
    )
    x, _ = tiny_inputs()
    return {str(t): run(x, timestep=torch.full((2,), t)) for t in STEPS}


@pytest.mark.slow
def test_saved_loaded_and_applied_in_a_new_process_to_the_bit(tmp_path):
    model = tiny_dit(layers=1)
    recipe = vq.calibrate(model, calls(model, STEPS), scheme="w4a8-timestep", balance=0.5, rotation="on")
    for plan in recipe.sites.values():
        assert plan.multiplier is not None
        assert plan.rotation > 1
        assert plan.input_scale.shape == (3,)
    recipe.save(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = drawn(recipe)
    finally:
        torch.set_num_threads(threads)
    # A cache of its own: the new process compiles for itself.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(
        [sys.executable, "-c", APPLY, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "drawn.safetensors")
    assert there.keys() == here.keys()
    assert all(torch.equal(there[t], here[t]) for t in here)
    assert not torch.equal(here[str(STEPS[0])], here[str(STEPS[-1])])
