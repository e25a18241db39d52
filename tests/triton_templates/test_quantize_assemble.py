"""The quantize kernels assemble at the widths of models: 16-byte loads, no spills, shared memory fits."""

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.table import ROW_WIDTHS, activation, norm, rotation

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
@pytest.mark.parametrize("arch", [80, 90])
def test_norm(arch, width):
    result = norm(arch, width)
    check(result, arch, 3)
    assert not result.sass_mma


@pytest.mark.parametrize("width", ROW_WIDTHS)
@pytest.mark.parametrize("arch", [80, 90])
def test_activation(arch, width):
    check(activation(arch, width, "silu", gate=True), arch, 2)


def test_the_widest_row_with_everything_in_front():
    check(norm(90, WIDEST, affine=True, multiplier=True), 90, 5)
    check(activation(90, WIDEST, "gelu"), 90, 1)
    check(rotation(90, WIDEST), 90, 4)
