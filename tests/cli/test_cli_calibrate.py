"""viditq calibrate: what it writes and says, and one clear line for every user's mistake."""

import pytest

from tests.command_line import assert_one_line_error
from viditq_fx.recipe import Recipe


def test_calibrate_writes_a_recipe_and_says_what_it_decided(run, targets, tmp_path):
    code, out, err = run(
        "calibrate", "viditq_targets:samples", "--out", tmp_path / "r", "--scheme", "w8a8", "--rows", "8"
    )
    assert code == 0, err
    assert "2 sites: " in out
    assert "3 samples, 3 calls of the model" in out
    recipe = Recipe.load(tmp_path / "r")
    assert set(recipe.sites) == {"1.up", "1.down"}
    assert "output error" in recipe.sites["1.up"].reason
    given = ("--balance", "0.5", "--rotation", "on", "--rows", "0")
    code, _, err = run("calibrate", "viditq_targets:three", "--out", tmp_path / "one", *given)
    assert code == 0, err
    assert Recipe.load(tmp_path / "one").sites["1.up"].rotation == 64


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--balance", "half"), "balance='half'"),
        (("--scheme", "w9a9"), "w9a9"),
        (("--rows", "0"), "rows=0 keeps no rows"),
        (("--scheme", "w8a8-timestep"), "has no argument timestep"),
    ],
)
def test_calibrate_tells_mistakes_in_one_line(run, targets, tmp_path, arguments, part):
    assert_one_line_error(
        run("calibrate", "viditq_targets:samples", "--out", tmp_path / "r", *arguments), part
    )
    assert not (tmp_path / "r").exists()
