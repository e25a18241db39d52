"""`benchmarks/gpu.py --write-tuned`: what it times is what could be chosen, and its file is obeyed."""

import pytest
import torch

pytest.importorskip("triton")

from viditq_fx.lowering import tuned_configs
from viditq_fx.lowering.linear import ROUTES, _configs
from viditq_fx.lowering.tuned_configs import known_kernel, write_tuned
from viditq_fx.ops.weight_forms import linear_of
from viditq_fx.scheme import QuantScheme
from viditq_fx.triton_templates.base import LinearProblem


@pytest.fixture
def gpu_tuned():
    import gpu_tuned

    return gpu_tuned


def problem(rows, group=None):
    return LinearProblem(
        rows=rows,
        width=3072,
        depth=3072,
        out_dtype=torch.bfloat16,
        capability=(9, 0),
        processors=132,
        group=group,
    )


@pytest.mark.parametrize("rows", [20, 4608])
@pytest.mark.parametrize(
    ("timed", "scheme"),
    [
        *((name, name) for name in ("w8a8", "w4a8", "w4a8-g128", "w4a8-g64", "fp8")),
        ("w4a8-block", "w4a8-block"),
        ("w4a4-g128", "w4a4-g128-block"),
    ],
)
def test_all_that_the_lowering_could_choose_is_timed(gpu_tuned, timed, scheme, rows):
    group, op = QuantScheme.parse(scheme).group, linear_of(QuantScheme.parse(scheme))
    route = ROUTES[op.overload]
    configs, _ = _configs(route.templates, route.templates, problem(rows, group))
    found = gpu_tuned.candidates(timed, problem(rows))
    assert sorted(c.kernel for c in found) == sorted([*configs, *filter(None, [route.extern_name])])
    assert {c.op for c in found} == {op.name + (f"-g{group}" if group else "")}


def shape(rows, **times):
    names = {f"tune linear_w8a8 {kernel.replace('_', ':', 1)}": {"p50": us} for kernel, us in times.items()}
    return {
        "model": "flux",
        "rows": rows,
        "width": 3072,
        "depth": 3072,
        "times": {"bf16": {"p50": 1}, **names},
    }


def record(*shapes):
    environment = {
        "device": "NVIDIA H200",
        "capability": "sm_90",
        "torch": "2.13.0",
        "triton": "3.7",
        "commit": "c",
    }
    return {"environment": environment, "shapes": [*shapes, {"model": "failed", "error": "x"}]}


def test_the_file_names_the_fastest_of_a_class_and_is_obeyed(gpu_tuned, monkeypatch, tmp_path):
    """a wins at 4,608 rows and fails at 8,000; of the two that ran at both, c is faster in sum."""
    made = record(
        shape(4608, triton_a=90.0, triton_b=100.0, triton_c=110.0),
        shape(8000, triton_b=200.0, triton_c=150.0),
        shape(64, extern_int=7.0, triton_a=8.0),
    )
    data = gpu_tuned.tuned_file(made)
    found = {entry["rows"]: (entry["kernel"], entry["us"]) for entry in data["linears"]}
    assert found == {8192: ("triton:c", 130.0), 64: ("extern:int", 7.0)}
    assert (data["architecture"], data["device"], data["commit"]) == ("sm_90", "NVIDIA H200", "c")
    write_tuned(tmp_path / "sm_90.json", data)
    monkeypatch.setattr(tuned_configs, "SHIPPED", tmp_path)
    known = known_kernel("linear_w8a8", problem(5000), "NVIDIA H200", ("triton:b", "triton:c"), timing=False)
    assert known.kernel == "triton:c"


def test_a_run_that_timed_none_of_them_is_told(gpu_tuned):
    with pytest.raises(ValueError, match="--write-tuned"):
        gpu_tuned.tuned_file(record())
