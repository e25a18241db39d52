"""Every config of the linear_w8a8_fp8 kernel assembles for its architecture: fp8 MMA, no spills."""

import pytest
import torch
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

import triton.language as tl
from nogpu.assemble import assemble

from viditq_fx.triton_templates.base import SHARED_BYTES, LinearProblem
from viditq_fx.triton_templates.linear_fp8 import TEMPLATE, constants, linear_w8a8_fp8_kernel

SIGNATURE = {
    **{"x_ptr": "*fp8e4nv", "x_scale_ptr": "*fp32", "w_ptr": "*fp8e4nv", "w_scale_ptr": "*fp32"},
    **{"bias_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32"},
}
MMA = {89: {"QMMA"}, 90: {"QGMMA"}, 100: {"UTCQMMA"}}
CONFIGS = [(arch, config) for arch, _, configs in TEMPLATE.configs for config in configs]
FIRST = [(arch, configs[0]) for arch, shape, configs in TEMPLATE.configs if shape == "wide"]


def case_id(case):
    return f"sm_{case[0]}-{case[1]}-s{case[1].num_stages}-w{case[1].num_warps}"


def check(arch, config, depth, width=1152):
    fixed = constants(config, None, width, depth)
    fixed |= {"N": width, "K": depth, "HAS_BIAS": True, "INDEX_DTYPE": tl.int32}
    stages = {"warps": config.num_warps, "stages": config.num_stages}
    result = assemble(linear_w8a8_fp8_kernel, SIGNATURE, fixed, arch, **stages)
    assert all("e4m3" in name or "kind::f8" in name for name in result.ptx_mma), result.ptx_mma
    assert set(result.sass_mma) == MMA[arch]
    assert (result.stack_bytes, result.local_bytes, result.spills) == (0, 0, 0)
    assert result.shared_bytes <= SHARED_BYTES[arch]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "config"), CONFIGS, ids=map(case_id, CONFIGS))
def test_assembles_without_spills(arch, config):
    assert check(arch, config, depth=1152).wide_loads


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "config"), FIRST, ids=map(case_id, FIRST))
def test_assembles_ragged_k(arch, config):
    check(arch, config, depth=1000)


def test_sums_are_promoted_out_of_the_tensor_cores():
    assert "max_num_imprecise_acc=BLOCK_K" in TEMPLATE.body


@pytest.mark.parametrize(
    ("capability", "serves"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)]
)
def test_needs_an_architecture_that_multiplies_e4m3(capability, serves):
    problem = LinearProblem(
        rows=64, width=64, depth=64, out_dtype=torch.bfloat16, capability=capability, processors=100
    )
    reason = TEMPLATE.supports(problem)
    assert (reason is None) == serves
    assert serves or "sm_89 or later" in reason
