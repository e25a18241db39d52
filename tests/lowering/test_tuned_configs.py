"""Files say which kernel is fastest: this machine's own, then shipped ones; what is broken is never obeyed."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from nogpu.fake_cuda import cuda_code, missing
from torch import nn

from viditq_fx.backend import viditq_backend
from viditq_fx.lowering import inductor_compat, tuned_configs
from viditq_fx.lowering.tuned_configs import (
    SHIPPED,
    Known,
    ShapeClass,
    known_kernel,
    own_digest,
    read_tuned,
    remember,
    write_tuned,
)
from viditq_fx.triton_templates.base import LinearProblem, generic_configs

H200 = "NVIDIA H200"
TUNED = "triton:linear_w8a8 128x128x128 s4 w8"
needs_fake_gpu = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def problem(rows=512, width=256, depth=256, capability=(9, 0)):
    return LinearProblem(
        rows=rows, width=width, depth=depth, out_dtype=torch.bfloat16, capability=capability, processors=132
    )


@pytest.fixture
def cache():
    """The folder of this machine's own files, which tests/lowering/conftest.py has put aside."""
    return tuned_configs.cache_folder()


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """Put a made file in the place of the shipped ones: `shipped(name, device, kernel, architecture)`."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(tuned_configs, "SHIPPED", folder)

    def put(name, device, kernel, architecture="sm_90", **sizes):
        entry = {"op": "linear_w8a8", "rows": 512, "width": 256, "depth": 256, **sizes, "kernel": kernel}
        head = {"format": 1, "architecture": architecture, "device": device}
        write_tuned(folder / name, {**head, "linears": [entry]})
        tuned_configs._read_shipped.cache_clear()

    yield put
    tuned_configs._read_shipped.cache_clear()


def ask(allowed=("first", "second", TUNED), timing=False, **sizes):
    return known_kernel("linear_w8a8", problem(**sizes), H200, allowed, timing=timing)


def test_every_shipped_file_can_be_read():
    for path in SHIPPED.glob("*.json"):
        assert read_tuned(path).kernels
    assert {path.suffix for path in SHIPPED.iterdir()} <= {".json", ".md"}


@pytest.mark.parametrize(
    ("rows", "width", "depth", "expected"),
    [
        (1, 1, 1, (16, 256, 256)),
        (16, 256, 256, (16, 256, 256)),
        (4097, 257, 3072, (8192, 512, 3072)),
        (4608, 3072, 12288, (8192, 3072, 12288)),
    ],
)
def test_classes_of_shapes(rows, width, depth, expected):
    shape = ShapeClass.of("linear_w8a8", problem(rows, width, depth))
    assert (shape.rows, shape.width, shape.depth) == expected


def test_the_very_device_goes_before_another_of_its_architecture(cache, shipped):
    assert ask() is None
    shipped("a.json", "NVIDIA H100", "first")
    assert ask() == Known(kernel="first", source="fastest on NVIDIA H100 (a.json)")
    shipped("b.json", H200, "second")
    assert ask().kernel == "second"
    assert ask(allowed=("first",)).kernel == "first"  # what cannot be chosen is passed over
    assert ask(rows=4096) is None
    assert ask(capability=(8, 0)) is None
    assert ask(timing=True) is None  # who asks for timing gets one


def test_what_this_machine_timed_goes_first_and_spares_the_timing(cache, shipped):
    shipped("b.json", H200, "second")
    remember("linear_w8a8", problem(rows=300), H200, "first")
    remember("linear_w8a8", problem(rows=4096), H200, "second")
    for timing in (False, True):
        assert ask(timing=timing) == Known(kernel="first", source="fastest when this machine timed it")
        assert ask(timing=timing, rows=4000).kernel == "second"
    assert known_kernel("linear_w4a8", problem(), H200, ("first",), timing=True) is None
    (path,) = cache.iterdir()
    assert path.name == "tuned-sm_90-nvidia-h200.json"
    assert len(read_tuned(path).kernels) == 2


def damaged(text):
    data = json.loads(text)
    entry = data["linears"][0]
    return {
        "cut short": text[: len(text) // 2],
        "empty": "",
        "no object": "[1]",
        "another format": json.dumps({**data, "format": 2}),
        "another torch": json.dumps({**data, "torch": "1.0"}),
        "other kernels": json.dumps({**data, "kernels": "0"}),
        "no list": json.dumps({**data, "linears": 3}),
        "no size": json.dumps({**data, "linears": [{**entry, "rows": "many"}]}),
        "no class": json.dumps({**data, "linears": [{**entry, "rows": 500}]}),
        "no text": json.dumps({**data, "linears": [{**entry, "kernel": None}]}),
    }


@pytest.mark.parametrize(
    "damage",
    [
        *("cut short", "empty", "no object", "another format", "another torch", "other kernels"),
        *("no list", "no size", "no class", "no text"),
    ],
)
def test_a_broken_or_foreign_file_is_left_out_with_a_warning_and_written_anew(cache, damage):
    remember("linear_w8a8", problem(), H200, "first")
    (path,) = cache.iterdir()
    path.write_text(damaged(path.read_text())[damage])
    with pytest.warns(UserWarning, match=r"nvidia-h200\.json is left out, and written anew") as told:
        assert ask() is None
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remember("linear_w8a8", problem(rows=4096), H200, "second")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask() is None
        assert ask(rows=4096).kernel == "second"
    assert [p.name for p in cache.iterdir()] == [path.name]  # no temporary file is left


def test_a_file_that_is_no_text_is_left_out(cache):
    remember("linear_w8a8", problem(), H200, "first")
    (path,) = cache.iterdir()
    path.write_bytes(b"\xff\xfe\x00broken")
    with pytest.warns(UserWarning, match="left out"):
        assert ask() is None


def test_a_folder_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuned_configs, "cache_folder", lambda: tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="cannot be kept in"):
        remember("linear_w8a8", problem(), H200, "first")


def test_timings_are_part_of_the_key_of_generated_code(cache):
    assert own_digest() == ""
    remember("linear_w8a8", problem(), H200, "first")
    first = own_digest()
    remember("linear_w8a8", problem(), H200, "second")
    assert own_digest() not in ("", first)


@pytest.mark.parametrize(
    ("capability", "note"),
    [
        ((8, 0), None),
        ((9, 0), None),
        ((10, 0), None),
        ((7, 5), None),  # no kernel of ours runs there
        ((8, 6), "no tile configs for sm_86: those of sm_89 serve"),
        ((10, 3), "no tile configs for sm_103: those of sm_100 serve"),
        ((12, 0), "no tile configs for sm_120: those of sm_89 serve"),
        ((13, 0), "no tile configs for sm_130: those of sm_89 serve"),
    ],
)
def test_an_architecture_without_configs_of_its_own_says_whose_it_takes(capability, note):
    assert generic_configs(capability) == note


def compiled_linear(monkeypatch, capability=None, **options):
    """(kernel, reason) of one linear [512, 256] x [256, 256] on a fake H200."""
    reports = []

    def make():
        if capability is not None:
            torch.cuda.get_device_capability = lambda device=None: capability  # fake_cuda puts it back
        with torch.device("cuda"):
            return nn.Linear(256, 256).requires_grad_(False), torch.empty(512, 256)

    def compiler(gm, inputs):
        settings = {"plugins": False, "selection": "always", **options}
        reports.append(viditq_backend(gm, inputs, options=settings).report)

    cuda_code(make, compiler=compiler)
    (site,) = reports[0].sites
    return site.kernel, site.reason


@needs_fake_gpu
@pytest.mark.slow
def test_a_tuned_kernel_is_what_runs(monkeypatch, cache, shipped):
    estimated, why = compiled_linear(monkeypatch)
    assert (estimated != TUNED, why) == (True, "estimated best tile")
    shipped("h200.json", H200, TUNED)
    assert compiled_linear(monkeypatch) == (TUNED, f"fastest on {H200} (h200.json)")
    shipped("h200.json", H200, "extern:int_mm")
    assert compiled_linear(monkeypatch) == ("extern:int_mm", f"fastest on {H200} (h200.json)")
    shipped("h200.json", H200, "triton:linear_w8a8 999x999x999 s3 w8")
    assert compiled_linear(monkeypatch) == (estimated, "estimated best tile")


@needs_fake_gpu
@pytest.mark.slow
def test_the_winner_of_autotuning_is_kept_and_not_timed_again(monkeypatch, cache):
    timed = []

    def second_wins(name, choices, inputs, layout):
        timed.append(len(choices))
        winner = choices[min(1, len(choices) - 1)]
        return winner.output_node(), winner

    monkeypatch.setattr(inductor_compat, "select", second_wins)
    with monkeypatch.context() as autotuning:
        autotuning.setattr(inductor_compat, "wants_autotuning", lambda: True)
        winner, why = compiled_linear(autotuning)
        assert why == f"fastest of {timed[0]} timed"
        assert timed[0] > 3
        assert compiled_linear(autotuning) == (winner, "fastest when this machine timed it")
    assert compiled_linear(monkeypatch) == (winner, "fastest when this machine timed it")
    assert timed[1:] == [1, 1]
    assert Path(next(cache.iterdir())).name == "tuned-sm_90-nvidia-h200.json"


@needs_fake_gpu
@pytest.mark.slow
@pytest.mark.parametrize("capability", [(7, 5), (12, 0), (10, 3)])
def test_an_unlisted_architecture_runs_and_says_with_what(monkeypatch, cache, capability):
    kernel, why = compiled_linear(monkeypatch, capability)
    if capability == (7, 5):
        assert kernel == "extern:int_mm"
        assert why == "int8 tensor cores through Triton need sm_80 or later; the device is sm_75"
    else:
        assert kernel.startswith("triton:linear_w8a8 ")
        assert why == f"estimated best tile; {generic_configs(capability)}"
