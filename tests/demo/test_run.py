"""The demo end to end with a tiny random model, and its report from figures made up for the purpose."""

import io
import json
import re

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

import numpy as np
from diffusers import DiTTransformer2DModel
from matplotlib.image import imread

from viditq_fx.demo.config import DemoConfig
from viditq_fx.demo.grid import choose_gain, draw_grid
from viditq_fx.demo.report import render_html, render_json, site_rows
from viditq_fx.demo.result import DemoResult, VariantFigures, notes, signed, speed_in_words
from viditq_fx.demo.run import run_demo
from viditq_fx.demo.table import COLUMNS, cells

VARIANT_KEYS = {
    "name",
    "scheme",
    "compile_seconds",
    "step_ms",
    "step_ms_quartiles",
    "speed",
    "speed_quartiles",
    "linear_bytes",
    "model_bytes",
    "accuracy",
    "fd_by_seed",
    "fd_all",
    "fd_mean",
    "sqnr_db",
    "psnr_db",
    "quantized",
    "kept",
    "refused",
    "kernels",
    "sites",
    "verdict",
}


def tiny_dit(dtype=torch.float32):
    """Return a random two-block model of the demo's class."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        norm_num_groups=32,
        attention_bias=True,
        sample_size=32,
        patch_size=4,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    )
    return torch.nn.Module.to(model, dtype)


def figures(name, speed, fd, **changes):
    settings = {
        "scheme": None if name == "fp32" else name,
        "compile_seconds": 10.0,
        "step_ms": 100.0 / speed,
        "step_ms_quartiles": (90.0 / speed, 120.0 / speed),
        "speed": speed,
        "speed_quartiles": (0.97 * speed, 1.03 * speed),
        "linear_bytes": 4_000_000,
        "model_bytes": 8_000_000,
        "accuracy": 0.9,
        "fd_by_seed": fd,
        "fd_all": 1.0,
    }
    return VariantFigures(name=name, **(settings | changes))


def site(fqn, outcome="quantized", **changes):
    settings = {
        "fqn": fqn,
        "role": "attn.q",
        "rows": "64",
        "depth": 128,
        "width": 128,
        "outcome": outcome,
        "kernel": "onednn-u8",
        "reason": None,
        "bytes_full": 65536,
        "resident_packed": 16896,
    }
    return settings | changes


@pytest.fixture
def result():
    sites = [site("blocks.0.q"), site("blocks.0.<up>", reason="why"), site("blocks.1.q")]
    fast = figures("w8a8", 1.5, [11.0, 14.0], sqnr_db=40.0, psnr_db=30.0, quantized=3, sites=sites)
    slow = figures("w8a7", 0.8, [20.0, 24.0], sqnr_db=34.0, psnr_db=float("inf"))
    settings = {
        "command": "viditq demo",
        "images": 40,
        "seeds": [0, 1],
        "images_per_seed": 20,
        "steps": 2,
        "guidance": 2.0,
        "rows_per_step": 40,
        "model": "DiT",
    }
    machine = {"cpu": "a CPU", "threads": 2, "torch": "2.13"}
    return DemoResult(
        variants=[figures("fp32", 1.0, [10.0, 14.0]), fast, slow], settings=settings, machine=machine
    )


def assert_self_contained(page):
    for value in re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"')\s>]+)""", page):
        assert value.startswith(("data:", "#")), value
    assert "<script" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page


def test_a_slower_scheme_is_called_slower(result):
    _, fast, slow = result.variants
    assert speed_in_words(slow, result) == "0.80x: slower than fp32 here"
    assert speed_in_words(fast, result) == "1.50x: faster than fp32 here"
    assert speed_in_words(figures("w8a8", 0.98, []), result) == "0.98x: as fast as fp32 here"
    noisy = figures("w8a8", 0.7, [], speed_quartiles=(0.5, 1.1))
    assert "no clear difference from fp32 here (rounds 0.50 to 1.10)" in speed_in_words(noisy, result)
    text = " ".join(notes(result))
    assert "tiny" in text
    assert "busy" not in text
    result.machine["load_average"] = 6.2
    assert "load 6.2 on 2 threads" in " ".join(notes(result))
    assert "benchmarks/cpu.py" in text
    result.variants.pop()
    assert "tiny" not in " ".join(notes(result))


def test_fd_is_judged_by_its_spread_over_seeds(result):
    assert result.fd_spread == pytest.approx(8**0.5)
    text = " ".join(notes(result))
    assert "+0.5 against fp32: within its seed-to-seed spread of 2.8" in text
    assert "+10.0 against fp32: beyond" in text
    assert [signed(-0.01), signed(0.26), signed(-3.0)] == ["0.0", "+0.3", "-3.0"]


def test_one_seed_tells_no_spread(result):
    for variant in result.variants:
        variant.fd_by_seed = variant.fd_by_seed[:1]
    assert result.fd_spread is None
    assert "one seed only" in " ".join(notes(result))
    for variant in result.variants:
        variant.fd_by_seed = []
    assert "too few images" in " ".join(notes(result))
    assert all("None" not in cell for row in cells(result) for cell in row)


def test_a_scheme_that_runs_on_fp32_gemms_says_so(result):
    result.variants[1].kernels = ["fp32-exact"]
    result.variants[1].sites = [site("q", kernel="fp32-exact", reason="oneDNN saturates")]
    assert "oneDNN saturates" in " ".join(notes(result))


def test_json_has_every_figure_and_no_infinity(result):
    data = json.loads(render_json(result), parse_constant=lambda name: pytest.fail(name))
    assert {"format_version", "settings", "machine", "variants", "notes", "fd_seed_to_seed"} <= set(data)
    assert all(set(variant) == VARIANT_KEYS for variant in data["variants"])
    assert data["variants"][2]["psnr_db"] is None


def test_the_page_needs_nothing_and_says_everything(result):
    page = render_html(result, b"png")
    assert_self_contained(page)
    for column in COLUMNS:
        assert column.title in page
    for part in ("0.80x: slower than fp32 here", "identical", "and 1 alike", "&lt;up&gt;", "viditq demo"):
        assert part in page
    assert "<up>" not in page


def test_sites_alike_but_for_the_block_share_a_row():
    rows = site_rows(
        [
            site("b.0.q"),
            site("b.0.k", "kept", kernel=None, reason="policy"),
            site("b.1.q"),
            site("b.1.k", "kept", kernel=None, reason="policy"),
            site("b.2.q", "refused", kernel=None, reason="odd"),
        ]
    )
    assert [(row.names, row.outcome) for row in rows] == [
        (["b.0.q", "b.1.q"], "quantized"),
        (["b.0.k", "b.1.k"], "kept"),
        (["b.2.q"], "refused"),
    ]
    assert rows[0].weight == "0.13 → 0.03 MB"


def test_the_grid_is_a_png_with_a_row_for_each_variant_and_difference():
    images = {name: torch.zeros(4, 1, 32, 32) for name in ("fp32", "w8a8", "w8a7")}
    png = draw_grid(images, torch.arange(4), seed=3)
    assert png.startswith(b"\x89PNG")
    only = draw_grid({"fp32": images["fp32"][:1]}, torch.arange(1), seed=3)
    heights = [int.from_bytes(data[20:24], "big") for data in (png, only)]
    assert heights[0] > 3 * (heights[1] - 120)


def test_one_factor_for_all_differences_makes_them_seen_and_few_of_them_black():
    small, large = torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    small[:, :, :16], large[:, :, :16], large[0, 0, 0, :4] = 0.01, 0.03, 2.0
    gain = choose_gain([small, large])
    assert gain == 50  # 100 would draw all of the larger ones black
    assert (large * gain > 2).float().mean() < 0.01
    assert choose_gain([small]) == 200
    assert choose_gain([torch.zeros(2, 1, 32, 32)]) == choose_gain([]) == 1
    assert choose_gain([torch.full((2, 1, 32, 32), 1.9)]) == 1


def test_differences_are_seen_in_the_picture(monkeypatch):
    said = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, s, **style: said.append(s))
    base = torch.full((3, 1, 32, 32), -1.0)
    images = {"fp32": base, "w8a8": base + 0.01, "w8a7": base + 0.03}
    picture = imread(io.BytesIO(draw_grid(images, torch.arange(3), seed=0)))[..., :3].mean(-1)
    assert [line for line in said if "×" in line] == ["|w8a8 − fp32| × 50", "|w8a7 − fp32| × 50"]
    row_of, column = (
        np.array_split(picture[int(150 * 0.75) :], 5),
        int(150 * (1.75 + 0.31)),
    )  # inches of title, label
    middle = [float(row[len(row) // 2, column]) for row in row_of]
    assert middle[0] == 0  # the images are black
    assert 0.7 < middle[3] < 0.85
    assert 0.15 < middle[4] < 0.35


@pytest.mark.slow
def test_the_whole_run_with_a_tiny_model(tmp_path):
    stages = []

    class Watch:
        def stage(self, title, total):
            stages.append([title, total, 0])

        def advance(self):
            stages[-1][2] += 1

    out = tmp_path / "made" / "here"
    config = DemoConfig(out=out, images=4, steps=2, schemes=("w8a8",), device="cpu", timing_rounds=2)
    result = run_demo(config, tiny_dit, Watch())

    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "report.html", "table.json"]
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert_self_contained((out / "report.html").read_text())
    data = json.loads((out / "table.json").read_text())
    assert [variant["name"] for variant in data["variants"]] == ["fp32", "w8a8"]
    assert all(set(variant) == VARIANT_KEYS for variant in data["variants"])
    assert {"torch", "diffusers", "viditq_fx", "cpu"} <= set(data["machine"])
    assert all(done == total for _, total, done in stages)

    base, quantized = result.variants
    assert (quantized.quantized, quantized.refused) == (2 * 6, 0)
    # int8 and one fp32 scale for each output channel, against fp32; what is kept stays as it is.
    assert quantized.linear_bytes < 0.3 * base.linear_bytes
    saved = base.linear_bytes - quantized.linear_bytes
    assert base.model_bytes - quantized.model_bytes == saved
    assert quantized.sqnr_db is not None
    assert 25 < quantized.sqnr_db < 80
    assert quantized.psnr_db is not None
    assert quantized.psnr_db > 25
    assert len(base.fd_by_seed) == 1
