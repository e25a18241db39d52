"""benchmarks/roofline.py draws the GEMMs of a result, and only those."""

import json
import struct

import pytest

pytest.importorskip("matplotlib")


@pytest.fixture
def roofline():
    import roofline

    return roofline


def result(capability="sm_90", **times):
    shape = {"model": "flux", "rows": 4608, "depth": 3072, "width": 3072}
    methods = {name.replace("_", " "): {"p50": us} for name, us in times.items()}
    shapes = [{**shape, "times": methods}, {**shape, "error": "out of memory"}]
    return {"environment": {"device": "made up", "capability": capability}, "shapes": shapes}


MADE = result(
    bf16_cuBLAS=116.0, int8_GEMM_only__viditq=87.0, int8_quantize=99.0, sweep_128=80.0, tune_linear=70.0
)


def test_points_are_the_gemms_alone(roofline):
    by_kind = {p.kind: p for p in roofline.points(MADE)}
    assert set(by_kind) == {"bf16", "int8"}
    flops = 2 * 4608 * 3072 * 3072
    assert by_kind["bf16"].tflops == pytest.approx(flops / 116.0 / 1e6)
    assert by_kind["bf16"].intensity == pytest.approx(flops / (2 * (2 * 4608 * 3072 + 3072 * 3072)))
    assert by_kind["int8"].intensity > by_kind["bf16"].intensity


def test_the_picture_is_written(roofline, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.json").write_text(json.dumps(MADE))
    monkeypatch.setattr("sys.argv", ["roofline.py", str(tmp_path / "r.json")])
    assert roofline.main() == 0
    assert "2 points" in capsys.readouterr().out
    head = (tmp_path / "r.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (1350, 900)


@pytest.mark.parametrize(
    ("made", "message"),
    [(result("sm_70", bf16=1.0), "no rates for sm_70"), (result(), "holds no timed GEMM")],
)
def test_what_cannot_be_drawn_is_told(roofline, tmp_path, monkeypatch, capsys, made, message):
    (tmp_path / "r.json").write_text(json.dumps(made))
    monkeypatch.setattr("sys.argv", ["roofline.py", str(tmp_path / "r.json")])
    assert roofline.main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.png").exists()
