"""Bit switching beside a step cache of diffusers: blocks are skipped, and what runs runs at the step's bits."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

import viditq_fx as vq
from tests.models.tiny_dits import TINY_DITS
from viditq_fx.runtime import executions
from viditq_fx.switching import HIGH, LOW

STEPS = 6


@pytest.mark.slow
@pytest.mark.usefixtures("eager_inductor")
def test_first_block_cache_and_bits_go_together():
    dit = TINY_DITS["wan"]
    model, kwargs = dit.build(layers=3), dit.make_inputs(batch=1)
    model.compile_repeated_blocks(backend="viditq", options={"scheme": "dvd-w4a6"})
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    vq.switch_bits(model, delta=100.0)
    ran = []
    with torch.no_grad(), model.cache_context("cond"):
        for step in range(STEPS):
            kwargs["timestep"] = torch.full_like(kwargs["timestep"], 900.0 - 100 * step)
            with executions() as calls:
                output = dit.run(model, kwargs)
            assert torch.isfinite(output).all()
            ran.append({call.options.scheme.input_bits for call in calls})
            counts = len(calls)
            if step == 0:
                whole = counts
    assert [record.bits for record in vq.step_records(model)] == [HIGH, HIGH] + [LOW] * (STEPS - 2)
    assert [sorted(bits) for bits in ran] == [[8], [8]] + [[4]] * (STEPS - 2)
    assert counts < whole, "the cache skips all blocks but the first where little changes"
