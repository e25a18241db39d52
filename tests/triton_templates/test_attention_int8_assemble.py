"""Every config of the attention kernel assembles: integer and half-precision MMA, no spills, shared memory fits."""

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.table import HEAD_WIDTHS, attention

from viditq_fx.triton_templates.attention_tiles import CONFIGS
from viditq_fx.triton_templates.base import SHARED_BYTES

pytestmark = pytest.mark.slow
INTEGER = {80: {"IMMA"}, 89: {"IMMA"}, 90: {"IGMMA"}, 100: {"UTCIMMA"}}
HALF = {80: {"HMMA"}, 89: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA"}}


# FLUX and Wan have heads of 128, PixArt of 72 (padded to 128), SD3.5 and CogVideoX of 64.
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "mask"])
@pytest.mark.parametrize("width", HEAD_WIDTHS)
@pytest.mark.parametrize("arch", INTEGER)
def test_assembles_without_spills(arch, width, masked):
    result = attention(arch, CONFIGS[arch, masked][HEAD_WIDTHS.index(width)], width, masked=masked)
    assert set(result.sass_mma) == INTEGER[arch] | HALF[arch]
    assert (result.stack_bytes, result.local_bytes, result.spills) == (0, 0, 0)
    assert result.shared_bytes <= SHARED_BYTES[arch]


@pytest.mark.parametrize("arch", INTEGER)
def test_assembles_with_a_padded_head_and_causal(arch):
    result = attention(arch, CONFIGS[arch, False][1], 72, causal=True, lse=True)
    assert set(result.sass_mma) == INTEGER[arch] | HALF[arch]
    assert result.shared_bytes <= SHARED_BYTES[arch]
    assert result.spills <= 64, result.spills  # stated, not hidden: a few registers of the padding's masks
