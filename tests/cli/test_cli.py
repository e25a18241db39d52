"""The command line: what it prints and writes, and one clear line for every user's mistake."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

from tests.command_line import assert_one_line_error
from viditq_fx.cli.errors import user_errors
from viditq_fx.demo.config import DemoConfig, DemoError, parse_schemes
from viditq_fx.demo.output import OutputFolder
from viditq_fx.errors import SchemeError
from viditq_fx.whole_file import write_whole


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
        (["explain", "digits", "--selection", "never"], ["never", "always"]),
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
