"""Every config of the linear_w8a8 kernel assembles for its architecture: integer MMA, no spills."""

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

import triton.language as tl
from nogpu.assemble import assemble

from viditq_fx.triton_templates.base import SHARED_BYTES, shape_constants
from viditq_fx.triton_templates.linear_w8a8 import TEMPLATE, linear_w8a8_kernel

SIGNATURE = {
    "x_ptr": "*i8",
    "x_scale_ptr": "*fp32",
    "w_ptr": "*i8",
    "w_scale_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "y_ptr": "*bf16",
    "M": "i32",
}
CONFIGS = [(arch, shape, config) for arch, shape, configs in TEMPLATE.configs for config in configs]
# The first config of each architecture is assembled with K % BLOCK_K != 0 too.
FIRST = [(arch, shape, configs[0]) for arch, shape, configs in TEMPLATE.configs if shape == "wide"]


def case_id(case):
    return f"sm_{case[0]}-{case[1]}-{case[2]}-s{case[2].num_stages}-w{case[2].num_warps}"


def assembled(arch, config, depth, width=1152):
    fixed = shape_constants(config, None, width, depth)
    fixed |= {"N": width, "K": depth, "HAS_BIAS": True, "INDEX_DTYPE": tl.int32}
    stages = {"warps": config.num_warps, "stages": config.num_stages}
    return assemble(linear_w8a8_kernel, SIGNATURE, fixed, arch, **stages)


def check(result, arch, shape):
    integer = {n: c for n, c in result.ptx_mma.items() if "s8.s8" in n or "kind::i8" in n}
    assert integer
    assert integer == dict(result.ptx_mma), result.ptx_mma
    assert set(result.sass_mma) <= {"IMMA", "IGMMA", "UTCIMMA"}, result.sass_mma
    assert (result.stack_bytes, result.local_bytes, result.spills) == (0, 0, 0)
    assert result.shared_bytes <= SHARED_BYTES[arch]
    if arch == 90 and shape == "wide":
        assert any(name.startswith("wgmma") for name in integer), integer


@pytest.mark.parametrize(("arch", "shape", "config"), CONFIGS, ids=map(case_id, CONFIGS))
def test_fits_shared_memory(arch, shape, config):
    assert config.shared_bytes <= SHARED_BYTES[arch]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "shape", "config"), CONFIGS, ids=map(case_id, CONFIGS))
def test_assembles_without_spills(arch, shape, config):
    check(assembled(arch, config, depth=1152), arch, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "shape", "config"), FIRST, ids=map(case_id, FIRST))
def test_assembles_ragged_k(arch, shape, config):
    check(assembled(arch, config, depth=1000), arch, shape)
