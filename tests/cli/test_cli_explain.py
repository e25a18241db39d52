"""`viditq explain`: the models that it takes, what it prints and the files that it writes."""

import json

import pytest
import torch

from tests.command_line import assert_one_line_error
from viditq_fx.cli.target import TargetError, load_target


def test_a_target_is_a_function_that_makes_a_model_and_a_call(targets):
    loaded = load_target("viditq_targets:three")
    assert len(loaded.args) == 1
    assert loaded.kwargs == {}
    assert set(load_target("viditq_targets:two").kwargs) == {"x"}


@pytest.mark.parametrize("name", ["one", "uncallable", "swapped", "number", "missing", ""])
def test_other_targets_are_refused(targets, name):
    with pytest.raises(TargetError, match="TARGET"):
        load_target(f"viditq_targets:{name}")


def test_a_target_that_does_not_parse_is_refused(targets):
    (targets / "viditq_broken.py").write_text("def f(:\n")
    with pytest.raises(TargetError, match="viditq_broken"):
        load_target("viditq_broken:f")


@pytest.mark.slow
def test_explain_as_a_table(run, targets):
    options = ("--scheme", "w8a7", "--keep", "1.down", "--weights", "release")
    code, out, _ = run("explain", "viditq_targets:three", *options)
    assert code == 0
    for part in ("1.up", "1.down", "w8a7", "kept by pattern '1.down'", "fewer than 32 channels"):
        assert part in out
    for part in (
        "Saves: Memory now: the whole model takes",
        "quantized FLOPs",
        "place_weights",
        "Not quantized: ",
    ):
        assert part in out


@pytest.mark.slow
def test_explain_as_json(run, targets):
    code, out, _ = run("explain", "viditq_targets:three", "--json")
    assert code == 0
    report = json.loads(out)
    assert {"model", "schemes", "device", "sites", "totals", "rejects"} <= set(report)
    assert report["schemes"] == ["w8a8"]
    assert {site["fqn"]: site["outcome"] for site in report["sites"]} == {
        "0": "kept",
        "1.up": "quantized",
        "1.down": "quantized",
        "2": "kept",
    }


def test_explain_into_a_file(run, targets):
    code, out, _ = run("explain", "viditq_targets:two", "--out", targets / "report.json")
    assert (code, out) == (0, "")
    assert json.loads((targets / "report.json").read_text())["totals"]["sites"] == 2
    outcome = run("explain", "viditq_targets:two", "--out", targets / "none" / "report.json")
    assert_one_line_error(outcome, "report.json", "No such file")


def test_explain_with_an_option_for_attention(run, targets, eager_inductor):
    code, out, _ = run("explain", "viditq_targets:attends", "--attention", "keep", "--json")
    assert code == 0
    (entry,) = json.loads(out)["attention"]
    assert (entry["outcome"], entry["reason"]) == ("kept", "kept by option attention='keep'")


def test_explain_as_page_picture_and_dot(run, targets, eager_inductor):
    names = {"--html": "page.html", "--svg": "block.svg", "--dot": "block.dot", "--out": "report.json"}
    options = [part for option, name in names.items() for part in (option, targets / name)]
    code, out, _ = run("explain", "viditq_targets:three", *options, "--block", "1")
    assert (code, out) == (0, "")
    page = (targets / "page.html").read_text()
    assert "<svg" in page
    assert "2 of 4 linears" in page
    assert "linear_w8a8" in (targets / "block.svg").read_text()
    assert "digraph" in (targets / "block.dot").read_text()
    blocks = json.loads((targets / "report.json").read_text())["blocks"]
    assert [block["name"] for block in blocks] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--html", "none/page.html"], ["page.html", "No such file"]),
        (["--svg", "."], ["is a folder"]),
        (["--block", "1"], ["--svg"]),
        (["--svg", "a.svg", "--block", "blocks.9"], ["blocks.9", "'1'"]),
        (["--dot", "a.dot", "--after", "fuse"], ["fuse_linear"]),
    ],
)
def test_explain_tells_wrong_files_blocks_and_passes(run, targets, eager_inductor, arguments, parts):
    before = set(targets.iterdir())
    code, _, err = run("explain", "viditq_targets:three", *arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err
    assert {path for path in targets.iterdir() if path.name != "__pycache__"} == before


def test_explain_without_a_compiler_is_one_line(run, targets):
    settings = {"cpp.cxx": (None, "/no-such-compiler"), "force_disable_caches": True}
    with torch._inductor.config.patch(settings):  # monkeypatch would leave the entries deleted
        outcome = run("explain", "viditq_targets:two")
    assert_one_line_error(outcome, "/no-such-compiler", "viditq doctor")


def test_explain_with_errors_runs_the_samples_of_its_target(run, targets, eager_inductor):
    files = ("--out", targets / "report.json", "--html", targets / "page.html")
    code, out, err = run("explain", "viditq_targets:samples", "--errors", "--keep", "1.down", *files)
    assert code == 0, err
    data = json.loads((targets / "report.json").read_text())
    assert (data["errors"]["samples"], data["errors"]["calls"]) == (3, 3)
    assert [entry["site"] for entry in data["errors"]["sites"]] == ["1.up"]
    assert [entry["site"] for entry in data["errors"]["weights"]] == ["1.up"]
    assert data["totals"]["quantized"] == 1
    assert "Where errors come from" in (targets / "page.html").read_text()
    code, out, err = run("explain", "viditq_targets:three", "--errors")
    assert code == 0, err
    assert "the 2 most incoherent of 2 inputs" in out
    assert "Errors: 1 of 2 sites: balance. Where: 1.down." in out


def test_options_of_samples_need_errors(run, targets):
    assert_one_line_error(run("explain", "viditq_targets:three", "--samples", "2"), "--samples", "--errors")
