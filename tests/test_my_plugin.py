"""An outside package is built, installed and found: its pass and its kernel template serve a model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_an_installed_plugin_serves_a_model(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(TESTS / "my_plugin", source)  # a build leaves files beside the source
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)]
    subprocess.run(command, check=True)
    path = os.pathsep.join(map(str, (site, TESTS, TESTS.parent)))
    done = subprocess.run(
        [sys.executable, str(source / "exercise.py")],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cpu"]["error"] < 0.05
    assert "name_squared_relu" in found["cpu"]["passes"]
    assert found["cpu"]["prologues"] == [None, "relu_squared"]
    assert "name_squared_relu" not in found["without"]
    assert found["cpu"]["rejects"] == []
    if "gpu" in found:
        assert found["gpu"]["rejects"] == []
        assert found["gpu"]["in_code"]
        assert all(kernel.startswith("triton:linear_few_rows ") for kernel, _ in found["gpu"]["few"])
        for kernel, reason in found["gpu"]["many"]:
            assert kernel.startswith("triton:linear_w8a8 ")
            assert "linear_few_rows declined: 512 rows" in reason
