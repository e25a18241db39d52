"""The kernels with 4-bit weights assemble for each architecture: integer MMA, no spills, no int8 copy of the weight."""

from dataclasses import replace

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

import torch
import triton.language as tl
from nogpu.assemble import assemble

from viditq_fx.scheme import GROUPS
from viditq_fx.triton_templates import linear_w4_block, linear_w4a8
from viditq_fx.triton_templates.base import SHARED_BYTES, LinearProblem

W4A8 = linear_w4a8.TEMPLATES
BLOCK = (
    linear_w4_block.W4A8_BLOCK[1],
    linear_w4_block.W4A4[0],
    linear_w4_block.W4A4[2],
)  # `make assemble` lists all
KERNELS = {
    **dict.fromkeys((t.name for t in W4A8), linear_w4a8.linear_w4a8_kernel),
    **dict.fromkeys((t.name for t in linear_w4_block.TEMPLATES), linear_w4_block.linear_w4_block_kernel),
}
INTEGER = {80: {"IMMA"}, 89: {"IMMA"}, 90: {"IGMMA"}, 100: {"UTCIMMA", "IMMA"}}
"""Machine instructions of an integer product; Triton 3.6 has no tcgen05 for int8."""
CONFIGS = [
    *((template, arch, c) for template in W4A8 for arch, _, configs in template.configs for c in configs),
    *(
        (template, arch, config)
        for template in BLOCK
        for arch, shape, configs in template.configs
        for config in (configs[:2] if shape == "wide" else configs[-1:])
    ),
]
RAGGED = [
    (template, arch, configs[-1])
    for template, architectures in (*((t, (80, 89, 90, 100)) for t in W4A8), (BLOCK[0], (80, 90)))
    for arch, shape, configs in template.configs
    if shape == "wide" and arch in architectures
]


def case_id(case):
    template, arch, config = case
    return f"{template.name}-sm_{arch}-{config}-s{config.num_stages}-w{config.num_warps}"


def assembled(template, arch, config, depth, width=1152):
    fixed = {"K": depth} | template.constants(config, None, width, depth)
    fixed |= {"N": width, "HAS_BIAS": True, "INDEX_DTYPE": tl.int32}
    signature = {
        **{"x_ptr": "*u8" if template.depth_of == "argument" else "*i8", "x_scale_ptr": "*fp32"},
        **{"w_ptr": "*u8", "w_scale_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32"},
    }
    stages = {"warps": config.num_warps, "stages": config.num_stages}
    return assemble(KERNELS[template.name], signature, fixed, arch, **stages)


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
@pytest.mark.parametrize(("template", "arch", "config"), RAGGED, ids=map(case_id, RAGGED))
def test_assembles_ragged_k(template, arch, config):
    check(assembled(template, arch, config, depth=1000), arch)


@pytest.mark.slow
def test_hopper_takes_the_widened_weight_from_registers():
    """Swapped, it does not go back through shared memory: that holds the tiles in flight and nothing else."""
    template = linear_w4a8.TEMPLATE
    config = template.configs[-2][2][2]
    assert (template.configs[-2][0], config.swap, str(config)) == (90, True, "128x128x64")
    in_flight = config.num_stages * config.block_k * (2 * config.block_m + config.block_n)
    assert assembled(template, 90, config, 1152).shared_bytes <= in_flight + 1024


@pytest.mark.parametrize("template", [*W4A8, *linear_w4_block.TEMPLATES], ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 17, 4096])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("depth", [33, 1152, 3072])
def test_a_config_fits_every_problem(template, rows, capability, depth):
    group = next((group for group in GROUPS if template.name.endswith(f"_g{group}")), None)
    problem = LinearProblem(
        rows=rows,
        width=8,
        depth=depth,
        out_dtype=torch.bfloat16,
        capability=capability,
        processors=100,
        group=group,
    )
    assert template.supports(problem) is None
    assert template.supports(replace(problem, group=0)).startswith("it is for")
    assert all(config.block_k == 64 or depth == 3072 for config in template.candidates(problem))
