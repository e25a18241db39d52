"""Every config of the linear_w8a8 kernel and its variants assembles for its architecture: integer MMA, no spills."""

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.table import GEMMS, linear

from viditq_fx.triton_templates.base import SHARED_BYTES, slice_depth

KERNELS = {
    gemm[0].name: gemm for gemm in GEMMS if gemm[0].name.startswith("linear_w8a8") and gemm[2] == "*i8"
}


def listed():
    """(kernel, architecture, shape class, config); of the splits of one tile one, as only a bound differs."""
    for name, (template, *_) in KERNELS.items():
        for arch, shape, configs in template.configs:
            yield from ((name, arch, shape, c) for c in configs if c.split_k in (1, 4))


def case_id(case):
    return f"{case[0]}-sm_{case[1]}-{case[2]}-{case[3]}-s{case[3].num_stages}-w{case[3].num_warps}"


CONFIGS = list(listed())
# The first wide config of each architecture is assembled with K % BLOCK_K != 0 too.
FIRST = list({(case[0], case[1]): case for case in reversed(CONFIGS) if case[2] == "wide"}.values())
RAGGED = {"linear_w8a8_tma": 1008}
"""K with a short last tile, where 1000 is declined."""


def check(result, kernel, arch, shape):
    integer = {n: c for n, c in result.ptx_mma.items() if "s8.s8" in n or "kind::i8" in n}
    assert integer
    assert integer == dict(result.ptx_mma), result.ptx_mma
    assert set(result.sass_mma) <= {"IMMA", "IGMMA", "UTCIMMA"}, result.sass_mma
    assert (result.stack_bytes, result.local_bytes, result.spills) == (0, 0, 0)
    assert result.shared_bytes <= SHARED_BYTES[arch]
    assert (result.tensor_loads > 0) == (kernel == "linear_w8a8_tma")
    if arch == 90 and shape != "skinny":
        assert any(name.startswith("wgmma") for name in integer), integer


@pytest.mark.parametrize(("kernel", "arch", "shape", "config"), CONFIGS, ids=map(case_id, CONFIGS))
def test_fits_shared_memory(kernel, arch, shape, config):
    assert config.shared_bytes <= SHARED_BYTES[arch]
    assert config.split_k == 1 or slice_depth(config, 3072) % config.block_k == 0


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "arch", "shape", "config"), CONFIGS, ids=map(case_id, CONFIGS))
def test_assembles_without_spills(kernel, arch, shape, config):
    check(linear(KERNELS[kernel], arch, config, depth=1152), kernel, arch, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "arch", "shape", "config"), FIRST, ids=map(case_id, FIRST))
def test_assembles_ragged_k(kernel, arch, shape, config):
    check(linear(KERNELS[kernel], arch, config, depth=RAGGED.get(kernel, 1000)), kernel, arch, shape)
