"""Every benchmark starts: what it imports of the package is still there."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_it_loads(script, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "tests"))  # some say PYTHONPATH=.:tests
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as `python benchmarks/<script>` has it
    before = dict(sys.modules)
    spec = importlib.util.spec_from_file_location(f"script_{Path(script).stem}", BENCHMARKS / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        assert module.__doc__
    finally:
        for name in set(sys.modules) - set(before):
            if (
                getattr(sys.modules[name], "__file__", None)
                and BENCHMARKS in Path(sys.modules[name].__file__).parents
            ):
                del sys.modules[name]
