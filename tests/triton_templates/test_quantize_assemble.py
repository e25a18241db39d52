"""The quantize kernels assemble at the widths of models: 16-byte loads, no spills, shared memory fits."""

from dataclasses import replace

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.table import ROW_WIDTHS, Case, activation, faults, norm, rotation

from viditq_fx.triton_templates.base import SHARED_BYTES

pytestmark = pytest.mark.slow
WIDEST = 15360


def check(result, arch, loads):
    assert (result.stack_bytes, result.local_bytes, result.spills) == (0, 0, 0)
    assert result.shared_bytes <= SHARED_BYTES[arch]
    assert result.wide_loads >= loads


@pytest.mark.parametrize("width", ROW_WIDTHS)
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_rotation(arch, width):
    result = rotation(arch, width, multiplier=True, group=128 if width in (1152, 12288) else 0)
    check(result, arch, 12 if arch == 90 else 8)
    assert result.sass_mma


@pytest.mark.parametrize("width", ROW_WIDTHS)
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_norm(arch, width):
    result = norm(arch, width)
    check(result, arch, 3)
    assert not result.sass_mma


@pytest.mark.parametrize("width", [1152, 12288])
@pytest.mark.parametrize(("kind", "gate"), [("gelu_tanh", False), ("silu", True)])
@pytest.mark.parametrize("arch", SHARED_BYTES)
def test_activation(arch, kind, gate, width):
    check(activation(arch, width, kind, gate=gate), arch, 1 + gate)


@pytest.mark.parametrize("arch", [90, 100])
def test_the_widest_row_with_everything_in_front(arch):
    check(norm(arch, WIDEST, affine=True, multiplier=True), arch, 5)
    check(activation(arch, WIDEST, "gelu"), arch, 1)
    check(rotation(arch, WIDEST), arch, 4)


def test_a_row_of_the_table_says_what_is_wrong_with_it():
    found = norm(90, 1152)
    case = Case(kernel="norm_quantize", arch=90, label="", run=lambda: found)
    assert faults(case, found) == []
    broken = replace(found, spills=2, wide_loads=0, shared_bytes=SHARED_BYTES[90] + 1)
    assert faults(case, broken) == ["SPILLS", "TOO MUCH SHARED MEMORY", "NARROW LOADS"]
    assert faults(replace(case, kernel="linear_w8a8"), found) == ["NO MATRIX INSTRUCTION"]
