"""The linear_w4_block kernel assembles for each architecture: integer MMA, no spills, shared memory that fits."""

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

import triton.language as tl
from nogpu.assemble import assemble

from viditq_fx.triton_templates.base import SHARED_BYTES, LinearProblem
from viditq_fx.triton_templates.linear_w4_block import (
    TEMPLATES,
    W4A4,
    W4A8_BLOCK_GROUPED,
    linear_w4_block_kernel,
)

SIGNATURE = {
    **{"x_scale_ptr": "*fp32", "w_ptr": "*u8", "w_scale_ptr": "*fp32"},
    **{"bias_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32"},
}
INTEGER = {
    80: {"IMMA"},
    89: {"IMMA"},
    90: {"IGMMA"},
    100: {"UTCIMMA", "IMMA"},
}  # Triton 3.6 has no tcgen05 for int8
CONFIGS = [
    (template, arch, config)
    for template in (W4A8_BLOCK_GROUPED, W4A4)  # `make assemble` lists all
    for arch, shape, configs in template.configs
    for config in (configs[:2] if shape == "wide" else configs[-1:])
]


def case_id(case):
    template, arch, config = case
    return f"{template.name}-sm_{arch}-{config}-s{config.num_stages}-w{config.num_warps}"


def assembled(template, arch, config, depth, width=1152):
    fixed = template.constants(config, None, width, depth)
    fixed |= {"N": width, "HAS_BIAS": True, "INDEX_DTYPE": tl.int32}
    signature = SIGNATURE | {"x_ptr": "*u8" if template.depth_of == "argument" else "*i8"}
    stages = {"warps": config.num_warps, "stages": config.num_stages}
    return assemble(linear_w4_block_kernel, signature, fixed, arch, **stages)


def check(result, arch):
    assert result.ptx_mma
    assert all("s8" in name or "kind::i8" in name for name in result.ptx_mma), result.ptx_mma
    assert len(result.sass_mma) == 1
    assert set(result.sass_mma) <= INTEGER[arch]
    assert (result.stack_bytes, result.local_bytes, result.spills) == (0, 0, 0)
    assert result.shared_bytes <= SHARED_BYTES[arch]
    assert result.wide_loads, "operands are not read 16 bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize(("template", "arch", "config"), CONFIGS, ids=map(case_id, CONFIGS))
def test_assembles_without_spills(template, arch, config):
    depth = 3072 if config.block_k == 128 else 1152
    check(assembled(template, arch, config, depth), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_assembles_ragged_k(arch):
    (config,) = [
        configs[-1]
        for known, shape, configs in W4A8_BLOCK_GROUPED.configs
        if (known, shape) == (arch, "wide")
    ]
    check(assembled(W4A8_BLOCK_GROUPED, arch, config, depth=1000), arch)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 17, 4096])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("depth", [33, 1152, 3072])
def test_a_config_fits_every_problem(template, rows, capability, depth):
    import torch

    problem = LinearProblem(
        rows=rows,
        width=8,
        depth=depth,
        out_dtype=torch.bfloat16,
        capability=capability,
        processors=100,
        grouped=template.name.endswith("_g128"),
    )
    assert template.supports(problem) is None
    assert all(config.block_k == 64 or depth == 3072 for config in template.candidates(problem))
