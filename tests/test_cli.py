"""The command line: what each command prints and writes, and one clear line for every user's mistake."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

from viditq_fx.cli import doctor as doctor_module
from viditq_fx.cli.app import app
from viditq_fx.cli.doctor import Finding, examine
from viditq_fx.cli.errors import user_errors
from viditq_fx.cli.target import TargetError, load_target
from viditq_fx.demo.config import DemoConfig, DemoError, parse_schemes
from viditq_fx.demo.output import OutputFolder
from viditq_fx.errors import SchemeError
from viditq_fx.recipe import Recipe
from viditq_fx.whole_file import write_whole

TARGETS = """
import torch
from torch import nn

class Wrong:
    pass

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(torch.nn.functional.layer_norm(x, (64,)))))

def three():
    return nn.Sequential(nn.Linear(8, 64), Block(), nn.Linear(64, 8)), (torch.ones(40, 8),), {}

def samples():
    model, args, kwargs = three()
    return model, [(args, kwargs)] * 3

def two():
    return Block(), {"x": torch.ones(40, 64)}

def one():
    return Block()

def uncallable():
    return Wrong(), {}

class Attends(nn.Module):
    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

def attends():
    return Attends(), {"x": torch.ones(2, 4, 40, 32)}

def swapped():
    return Block(), {"x": 1}, ()

number = 3
"""


@pytest.fixture
def run(monkeypatch):
    """Run the command line; returns (exit code, stdout, stderr)."""

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return invoke


@pytest.fixture
def targets(tmp_path, monkeypatch):
    """A folder with a module of targets, made the current one."""
    (tmp_path / "viditq_targets.py").write_text(TARGETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("viditq_targets", None)


@pytest.fixture
def eager_inductor(monkeypatch):
    """Run what would go to Inductor as it is: it is about files, not about generated code."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)


def assert_one_line_error(outcome, *parts):
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("viditq: ")
    for part in parts:
        assert part in err


def test_help_is_quick_because_torch_is_not_imported():
    script = (
        "import sys\nsys.argv = ['viditq', '--help']\nfrom viditq_fx.cli import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert done.code in (0, None)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "explain", "calibrate", "doctor"):
        assert command in done.stdout


def test_version(run):
    assert run("--version") == (0, f"viditq_fx {importlib.metadata.version('viditq_fx')}\n", "")


def test_without_typer_the_message_says_what_to_install():
    script = "import sys\nsys.modules['typer'] = None\nfrom viditq_fx.cli import main\nmain()\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "viditq_fx[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demo", "--images", "0"], ["--images 0"]),
        (["demo", "--images", "-5"], ["--images -5"]),
        (["demo", "--images", "many"], ["--images"]),
        (["demo", "--steps", "0"], ["--steps 0"]),
        (["demo", "--seed", "-1"], ["--seed -1"]),
        (["demo", "--schemes", "w8a8,w3a3"], ["w3a3", "w8a7"]),
        (["demo", "--schemes", ","], ["--schemes"]),
        (["demo", "--device", "tpu"], ["tpu", "cuda"]),
        (["explain"], ["target"]),
        (["explain", "digits", "--scheme", "int8"], ["int8", "w8a8"]),
        (["explain", "digits", "--weights", "burn"], ["burn", "release"]),
        (["explain", "nonsense"], ["nonsense", "package.module:function"]),
        (["explain", "digits", "--attention", "int4"], ["int4", "keep"]),
        (["explain", "no_such_module_xyz:f"], ["no_such_module_xyz"]),
        (["explain", "folder/my_file.py:f"], ["not a file's", "my_model:make"]),
        (["explain", "json:no_such_function"], ["no_such_function"]),
        (["nonsense"], ["nonsense"]),
        (["demo", "--nonsense"], ["--nonsense"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run(*arguments), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(run, tmp_path):
    assert_one_line_error(run("demo", "--device", "cuda", "--out", tmp_path / "out"), "--device cpu")
    assert not (tmp_path / "out").exists()


def test_an_out_folder_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert_one_line_error(run("demo", "--out", tmp_path / "file"), "file")
    assert_one_line_error(run("demo", "--out", tmp_path / "file" / "below"), "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_folder_without_permission(run, tmp_path):
    tmp_path.chmod(0o500)
    assert_one_line_error(run("demo", "--out", tmp_path / "out"), "Permission denied")


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stopped, user_errors():
        write_whole(tmp_path / "table.json", b"{}")
    assert stopped.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_exits_with_130_and_leaves_nothing(tmp_path, capsys):
    def interrupted_run():
        with user_errors(), OutputFolder(tmp_path / "a" / "b") as out:
            out.write("grid.png", b"half")
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        interrupted_run()
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_run_keeps_a_folder_that_was_there(tmp_path):
    (tmp_path / "table.json").write_text("old")

    def failed_run():
        with OutputFolder(tmp_path) as out:
            out.write("table.json", b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failed_run()
    assert (tmp_path / "table.json").read_text() == "old"
    with OutputFolder(tmp_path) as out:
        out.write("table.json", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    assert (tmp_path / "table.json").read_text() == "new"


def test_images_are_split_evenly_over_seeds():
    def split(images):
        config = DemoConfig(images=images, seed=7)
        return config.seeds, config.images_per_seed, config.batch_size

    assert split(200) == ((7, 8, 9, 10), 50, 50)
    assert split(30) == ((7, 8, 9), 10, 10)
    assert split(4) == ((7,), 4, 4)
    assert split(480) == ((7, 8, 9, 10), 120, 40)
    assert split(101) == ((7,), 101, 34)


def test_schemes_are_read_once_each():
    assert parse_schemes(" w8a7, W8A8,w8a7") == ("w8a7", "w8a8")
    with pytest.raises(DemoError):
        parse_schemes("")
    with pytest.raises(SchemeError):
        parse_schemes("w8a8;w8a7")


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


def test_doctor_names_versions_kernels_and_the_compiler(run):
    code, out, err = run("doctor")
    names = (
        "torch",
        "triton",
        "diffusers",
        "backend",
        "C++ compiler",
        "oneDNN int8",
        "w8a7 on the CPU",
        "GPU",
    )
    for name in names:
        assert name in out
    assert code == (1 if "essential" in err else 0)


def test_doctor_fails_without_a_compiler(run, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = run("doctor")
    assert code == 1
    assert "no-such-compiler" in out
    assert "C++ compiler" in err
    assert len(err.strip().splitlines()) == 1


def test_explain_without_a_compiler_is_one_line(run, targets):
    settings = {"cpp.cxx": (None, "/no-such-compiler"), "force_disable_caches": True}
    with torch._inductor.config.patch(settings):  # monkeypatch would leave the entries deleted
        outcome = run("explain", "viditq_targets:two")
    assert_one_line_error(outcome, "/no-such-compiler", "viditq doctor")


@pytest.mark.parametrize(
    ("inner", "part"),
    [
        (SchemeError("no such scheme"), "no such scheme"),
        (OSError(28, "No space left"), "TORCHINDUCTOR_CACHE_DIR"),
    ],
)
def test_what_torch_compile_wraps_is_one_line(capsys, inner, part):
    class Wrapped(RuntimeError):  # as torch.compile's BackendCompilerFailed
        inner_exception = inner

    with pytest.raises(SystemExit) as stopped, user_errors():
        raise Wrapped("backend='viditq' raised")
    assert_one_line_error((stopped.value.code, *capsys.readouterr()), part)
    with pytest.raises(ZeroDivisionError), user_errors():  # a bug keeps its traceback
        raise ZeroDivisionError


def test_doctor_lists_plugins_and_says_which_do_not_import(monkeypatch):
    def points(group):
        if group != "viditq_fx.passes":
            return []
        names = {"good": "viditq_fx.passes.normalize:Normalize", "bad": "no_such_module_xyz:step"}
        return [importlib.metadata.EntryPoint(name, value, group) for name, value in names.items()]

    monkeypatch.setattr("viditq_fx.plugins.metadata.entry_points", lambda group: points(group))
    bad, good = [finding for finding in examine(None) if finding.name.startswith("added")]
    assert (good.name, good.state, good.detail) == ("added pass", "ok", "plugin 'good'")
    assert bad.state == "note"
    assert "'bad': left out, ModuleNotFoundError" in bad.detail


def test_doctor_stops_at_a_missing_torch(monkeypatch):
    lost = Finding(name="torch", state="missing", detail="not installed")
    monkeypatch.setattr(doctor_module, "_torch", lambda: lost)
    assert examine(None)[-1] is lost


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
