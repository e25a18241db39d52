"""Every config of the attention kernel assembles: integer and half-precision MMA, no spills, shared memory fits."""

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

import torch
from nogpu.assemble import assemble

from viditq_fx.triton_templates.attention_int8 import CONFIGS, attention_int8_kernel, constants
from viditq_fx.triton_templates.base import SHARED_BYTES

pytestmark = pytest.mark.slow
STRIDES = [f"{t}_stride_{d}" for t, dims in (("v", "bhl"), ("mask", "bhqk"), ("out", "bhl")) for d in dims]
SIGNATURE = {
    **{"q_ptr": "*i8", "q_scale_ptr": "*fp32", "k_ptr": "*i8", "k_scale_ptr": "*fp32"},
    **{"v_ptr": "*bf16", "mask_ptr": "*i1", "out_ptr": "*bf16", "lse_ptr": "*fp32", "scale": "fp32"},
    **dict.fromkeys(("HEADS", "GROUP", "LQ", "LK", *STRIDES), "i32"),
}
INTEGER = {80: {"IMMA"}, 89: {"IMMA"}, 90: {"IGMMA"}, 100: {"UTCIMMA"}}
HALF = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA"}}
# FLUX and Wan have heads of 128, PixArt of 72 (padded to 128), SD3.5 and CogVideoX of 64.
WIDTHS = (64, 128, 256)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("arch", INTEGER)
def test_assembles_without_spills(arch, width, masked):
    config = CONFIGS[arch, masked][WIDTHS.index(width)]
    mask = torch.ones(1, dtype=torch.bool) if masked else None
    fixed = constants(config, width, width, mask, False) | {"HAS_LSE": False}
    stages = {"warps": config.num_warps, "stages": config.num_stages}
    result = assemble(attention_int8_kernel, SIGNATURE, fixed, arch, **stages)
    assert set(result.sass_mma) == INTEGER[arch] | HALF[arch]
    assert (result.stack_bytes, result.local_bytes, result.spills) == (0, 0, 0)
    assert result.shared_bytes <= SHARED_BYTES[arch]


@pytest.mark.parametrize("arch", INTEGER)
def test_assembles_with_a_padded_head_and_causal(arch):
    config = CONFIGS[arch, False][1]
    fixed = constants(config, 72, 72, None, True) | {"HAS_LSE": True}
    stages = {"warps": config.num_warps, "stages": config.num_stages}
    result = assemble(attention_int8_kernel, SIGNATURE, fixed, arch, **stages)
    assert set(result.sass_mma) == INTEGER[arch] | HALF[arch]
    assert result.shared_bytes <= SHARED_BYTES[arch]
    assert result.spills <= 64, result.spills  # stated, not hidden: a few registers of the padding's masks
