"""A table of losses is saved, resumed, refused where it is damaged or another's, and drawn."""

import json

import pytest

import viditq_fx as vq
from tests.calibration.film import measured, run


def plain(table):
    """All of a table that can be compared."""
    return table.units, dict(table.losses), dict(table.errors), table.schemes, table.metrics


def test_interrupted_and_resumed_is_uninterrupted(table, tmp_path):
    file, runs = tmp_path / "new" / "table.json", []

    def interrupted(model):
        runs.append(0)
        if len(runs) == 10:
            raise KeyboardInterrupt
        return run(model)

    with pytest.raises(KeyboardInterrupt):
        measured(draw=interrupted, resume=file)
    assert len(json.loads(file.read_text())["units"]) == 9
    runs += [0] * 100
    resumed = measured(draw=interrupted, resume=file)
    assert len(runs) == 10 + 100 + 2 + 2 * (9 - 2)  # two units were done
    assert plain(resumed) == plain(table) == plain(vq.SensitivityTable.load(file))


def test_the_file_of_another_measurement_is_refused(table, tmp_path, traced_once):
    file = table.save(tmp_path / "table.json")
    with pytest.raises(vq.RecipeError, match=r"was begun with seed 0, now 1"):
        measured(resume=file, seed=1)
    with pytest.raises(vq.RecipeError, match="was begun with samples"):
        measured(draw=lambda model: 2 * run(model), resume=file)
    with pytest.raises(vq.RecipeError, match="was begun with units others"):
        measured(resume=file, groups={"visual": "c.*"})


def test_damaged_tables_are_refused(table, tmp_path):
    file = table.save(tmp_path / "table.json")
    text = file.read_text()
    for old, new in (
        ('"version": 1', '"version": 2'),
        ('"sites"', '"site"'),
        ('"group": "visual"', '"group": 3'),
        ("{", "["),
        (text[-200:], ""),
        ('"visual": ', '"visual": NaN, "_": '),
        ('"b.out"', '"b.q"'),
    ):
        assert old in text
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(vq.RecipeError, match=r"table\.json"):
            vq.SensitivityTable.load(file)
    with pytest.raises(vq.RecipeError, match="cannot be read"):
        vq.SensitivityTable.load(tmp_path)


def test_the_heat_map_is_a_png(table, tmp_path):
    pytest.importorskip("matplotlib")
    assert table.plot(tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert table.plot(tmp_path / "b.png", "w8a8").read_bytes() != (tmp_path / "a.png").read_bytes()
    with pytest.raises(vq.RecipeError, match="'w6a6' was not measured"):
        table.plot(tmp_path / "c.png", "w6a6")
