"""A rewritten block launches no more kernels than plain Inductor's, but for quantize steps that stand alone."""

import pytest
from nogpu.fake_cuda import missing

if reason := missing():
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("diffusers")

from benchmarks.kernels_per_block import BLOCKS, count, table

pytestmark = pytest.mark.slow

# Plain Inductor's count differs between torch versions; ours has to follow it, so only the steps are fixed.
STEPS = {"FLUX.1 double": (8, 2), "FLUX.1 single": (2, 1), "PixArt": (7, 4), "Wan": (7, 3)}


@pytest.mark.parametrize("name", BLOCKS)
def test_launches(name):
    block = count(name, BLOCKS[name])
    assert block.after.total <= block.before.total + block.unfused
    assert block.after.gemms < block.before.gemms  # projections of one input run as one
    steps = next(value for key, value in STEPS.items() if name.startswith(key))
    assert (block.quantizes, block.unfused) == steps
    assert name in table([block])[-1]
