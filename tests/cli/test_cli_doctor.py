"""`viditq doctor`: what it finds, and what it tells of what is missing."""

import importlib.metadata

from viditq_fx.cli import doctor as doctor_module
from viditq_fx.cli.doctor import Finding, examine


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
