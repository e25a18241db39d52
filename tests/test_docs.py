"""The tutorials are followed to the letter: each file is saved, each command run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nogpu.fake_cuda import missing

ROOT = Path(__file__).parents[1]
TUTORIALS = ["add_a_pass.md", "add_a_template.md"]


def blocks(name):
    """(language, text) of each code block, in order."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.S | re.M)


def run(command, folder):
    shim = folder / "bin"
    shim.mkdir(exist_ok=True)
    python = shim / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "CHECKOUT": str(ROOT),
        "PATH": f"{shim}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
    }
    return subprocess.run(
        ["sh", "-ec", command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_works_word_for_word(name, tmp_path):
    if name == "add_a_template.md" and (reason := missing()):
        pytest.skip(reason)
    printed = ""
    for language, text in blocks(name):
        if language == "python":
            (tmp_path / re.match(r"# file: (\S+)\n", text)[1]).write_text(text)
        elif language == "sh":
            done = run(text, tmp_path)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout + done.stderr
    traces = "".join(path.read_text() for path in tmp_path.glob("trace/*.log"))
    assert "viditq_fuse_linear" in traces or "TORCH_TRACE" not in str(blocks(name))
    for expected in SAID[name]:
        assert expected in printed, f"{expected!r} is not in:\n{printed}"


SAID = {
    "add_a_pass.md": [
        "2 other w8a8 prologue: None",
        "insert_qdq: ",  # TORCH_LOGS shows the passes
        "1 passed",
        "[None, 'gelu_tanh'], error 0.0",
    ],
    "add_a_template.md": [
        "40 triton:linear_mine 32x64x128",
        "512 triton:linear_w8a8",
        "linear_mine declined: 512 rows; this kernel is for at most 48",
        "ok ",
    ],
}


@pytest.mark.parametrize("name", TUTORIALS)
def test_links_lead_somewhere_and_no_block_goes_unread(name):
    text = re.sub(r"^```.*?^```$", "", (ROOT / "docs" / name).read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
    assert {language for language, _ in blocks(name)} <= {"python", "sh", "toml"}
