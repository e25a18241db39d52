"""Interrupted and resumed is uninterrupted; two ranks find what one process finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import viditq_fx as vq
from tests.calibration.test_calibrate import calls, state
from tests.small_models import tiny_dit
from viditq_fx.calibration.run import collect

ROOT = Path(__file__).parents[2]


def four(model):
    """Four samples of different timesteps and sizes."""
    return [
        calls(model, steps, tokens)
        for steps, tokens in (((900.0, 10.0), 40), ((900.0,), 56), ((10.0,), 24), ((400.0,), 40))
    ]


def statistics(found):
    """Every tensor of what was found."""
    return {
        (group.sites, record.key, bucket.low, branch): [value for _, value in part.tensors()]
        for group in found.groups
        for record in group.inputs
        for (bucket, branch), part in record.parts.items()
    } | {
        group.sites: [group.reservoir().rows_RK, torch.tensor(group.reservoir().keys)]
        for group in found.groups
    }


def same(a, b):
    """Whether two are equal to the bit."""
    return a.keys() == b.keys() and all(
        all(torch.equal(x, y) for x, y in zip(a[key], b[key], strict=True)) for key in a
    )


def test_interrupted_and_resumed_is_uninterrupted(tmp_path):
    model = tiny_dit(layers=1)
    whole = collect(model, four(model))

    def interrupt():
        calls(model, (900.0,))()
        raise KeyboardInterrupt

    samples = four(model)
    with pytest.raises(KeyboardInterrupt):
        collect(model, [*samples[:2], interrupt, samples[3]], resume=tmp_path)
    ran = []
    counted = [lambda i=i, sample=sample: (ran.append(i), sample()) for i, sample in enumerate(samples)]
    resumed = collect(model, counted, resume=tmp_path)
    assert ran == [2, 3]
    assert same(statistics(whole), statistics(resumed))
    assert (whole.samples, whole.calls, whole.shapes) == (resumed.samples, resumed.calls, resumed.shapes)

    again = collect(model, counted, resume=tmp_path)  # nothing is left to run
    assert ran == [2, 3]
    assert same(statistics(whole), statistics(again))


def test_a_folder_of_another_calibration_is_refused(tmp_path):
    model = tiny_dit(layers=1)
    collect(model, four(model), resume=tmp_path)
    with pytest.raises(vq.RecipeError, match=r"was begun with seed 0, now 1 is asked for"):
        collect(model, four(model), resume=tmp_path, seed=1)
    with pytest.raises(vq.RecipeError, match="was begun with model"):
        collect(tiny_dit(layers=1, seed=5), four(model), resume=tmp_path)
    with pytest.raises(vq.RecipeError, match="was begun with samples_given 4, now 1"):
        collect(model, four(model)[:1], resume=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for damaged in (
        content[:100],
        content[:-1],
        b"",
        content.replace(b'\\"depth\\": 64', b'\\"depth\\": -4'),
    ):
        file.write_bytes(damaged)
        with pytest.raises(vq.RecipeError, match="or damaged"):
            collect(model, four(model), resume=tmp_path)
    with pytest.raises(vq.RecipeError, match="resume="):
        collect(model, four(model), resume=file)


RANK = """
import sys
import torch
import viditq_fx as vq
from tests.calibration.test_resume_and_ranks import four
from tests.small_models import tiny_dit

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = tiny_dit(layers=1)
try:
    vq.calibrate(model, four(model)[:1])
except vq.RecipeError as error:
    assert "ranks 1 of 2 never called the model" in str(error), error
else:
    raise SystemExit("one sample for two ranks is an error")
for scheme in ("w4a8", "w8a8-timestep"):
    vq.calibrate(model, four(model), scheme=scheme, rotation="on").save(f"{out}/{rank}-{scheme}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_find_the_recipe_of_one_process(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), str(tmp_path)],
            cwd=ROOT,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = tiny_dit(layers=1)
        for scheme in ("w4a8", "w8a8-timestep"):
            alone = vq.calibrate(model, four(model), scheme=scheme, rotation="on")
            alone.save(tmp_path / "alone")
            for rank in (0, 1):
                for name in ("recipe.json", "recipe.safetensors"):
                    assert (tmp_path / f"{rank}-{scheme}" / name).read_bytes() == (
                        tmp_path / "alone" / name
                    ).read_bytes()
            assert state(alone)["blocks.0.q"][1] == 64
    finally:
        torch.set_num_threads(threads)
