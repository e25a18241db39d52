"""Every config of attention with P V in 8 bits assembles: fp8 or integer MMA, 16-byte loads, no spills."""

import pytest
import triton
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.table import HEAD_WIDTHS, attention

from viditq_fx.triton_templates.attention_tiles import (
    EIGHT_BIT_CONFIGS,
    config_for,
    why_no_eight_bit_values,
)
from viditq_fx.triton_templates.base import SHARED_BYTES

INTEGER = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA"}
FP8 = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}
WIDEST = {key: zip(HEAD_WIDTHS, tiles, strict=True) for key, tiles in EIGHT_BIT_CONFIGS.items()}
CASES = [(*key, head, config) for key, tiles in WIDEST.items() for head, config in tiles]


def products(arch, values, rows=128):
    """Hopper and Blackwell take 64 rows or more into tensor cores of their own, fewer into those of older GPUs."""
    integer = INTEGER[arch] if rows >= 64 else "IMMA"
    return {integer} if values == "int8" else {integer, FP8[arch]}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_assembles_without_spills(case):
    arch, masked, values, head, config = case
    if reason := why_no_eight_bit_values(divmod(arch, 10)):
        pytest.skip(reason)
    result = attention(arch, config, head, values=values, masked=masked)
    assert set(result.sass_mma) == products(arch, values, config.block_m)
    if case[:4] == (90, True, "fp8", 256) and triton.__version__ < "3.7":
        assert result.spills <= 17  # no tile that Triton 3.6 does not spill multiplies e4m3 there
    else:
        assert (result.stack_bytes, result.local_bytes, result.spills) == (0, 0, 0)
    assert result.shared_bytes <= SHARED_BYTES[arch]
    assert result.wide_loads


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "values"), [(89, "fp8"), (90, "fp8"), (90, "int8")])
def test_assembles_with_a_padded_head_and_causal(arch, values):
    config = EIGHT_BIT_CONFIGS[arch, False, values][1]
    result = attention(arch, config, 72, values=values, causal=True, lse=True)
    assert set(result.sass_mma) == products(arch, values)
    assert result.spills <= 64, result.spills  # stated, not hidden: a few registers of the padding's masks


def test_no_config_where_nothing_multiplies_fp8():
    assert config_for((8, 9), 128, False, "fp8")
    assert config_for((8, 0), 128, False, "int8")
    with pytest.raises(ValueError, match=r"needs sm_89 or later.*attention_int8_int8"):
        config_for((8, 0), 128, False, "fp8")


def test_an_old_triton_is_named_on_blackwell(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert "needs Triton 3.7 or later, not 3.6.0" in (why_no_eight_bit_values((10, 0)) or "")
    assert why_no_eight_bit_values((9, 0)) is None
    monkeypatch.setattr(triton, "__version__", "3.10.1+git0")
    assert why_no_eight_bit_values((10, 0)) is None
