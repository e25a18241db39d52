"""FLOPs of linears and attention: equal to the formula by hand, at the hints of symbolic sizes; the log of passes."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from tests.small_models import capture, context, tiny_dit, tiny_inputs
from viditq_fx.passes.pipeline import PassPipeline, default_passes

BATCH, TOKENS, WIDTH, HEADS = 2, 40, 64, 4


def passed(model, *inputs, dynamic=False):
    ctx = context()
    PassPipeline(passes=default_passes()).run(capture(model, *inputs, dynamic=dynamic), ctx)
    return ctx.report


def test_linears_and_attention_by_the_formula():
    report = passed(tiny_dit(1), *tiny_inputs(BATCH, TOKENS))
    assert report.site("blocks.0.up").flops == 2 * BATCH * TOKENS * WIDTH * 4 * WIDTH
    assert report.site("blocks.0.modulation").flops == 2 * BATCH * WIDTH * 3 * WIDTH
    (attention,) = report.attention
    assert (attention.fqn, attention.role) == ("blocks.0", "attention")
    assert attention.flops == 4 * BATCH * TOKENS * TOKENS * WIDTH
    assert attention.reason


def test_symbolic_sizes_count_as_their_hints_and_say_so():
    fixed = passed(tiny_dit(1), *tiny_inputs(BATCH, TOKENS))
    torch._dynamo.reset()
    dynamic = passed(tiny_dit(1), *tiny_inputs(BATCH, TOKENS), dynamic=True)
    for one, other in zip(fixed.sites + fixed.attention, dynamic.sites + dynamic.attention, strict=True):
        assert one.flops == other.flops > 0
        assert (one.flops_hinted, other.flops_hinted) == (False, True)


def test_attention_spelled_as_matmuls_counts_the_same():
    def spelled(q, k, v):
        return F.softmax(q @ k.transpose(-1, -2), dim=-1) @ v

    q = torch.randn(BATCH, HEADS, TOKENS, 16)
    k = torch.randn(BATCH, HEADS, 24, 16)
    report = passed(spelled, q, k, k.clone())
    assert sum(entry.flops for entry in report.attention) == 4 * BATCH * HEADS * TOKENS * 24 * 16
    whole = passed(F.scaled_dot_product_attention, q, k, k.clone())
    assert [entry.flops for entry in whole.attention] == [4 * BATCH * HEADS * TOKENS * 24 * 16]


def test_each_pass_logs_one_line_and_each_reject_another(caplog):
    with caplog.at_level(logging.DEBUG, logger="viditq_fx.passes"):
        passed(tiny_dit(1), *tiny_inputs())
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [line.partition(":")[0] for line in lines] == [step.name for step in default_passes()]
    assert "annotate_sites: head: final projection: its error would be the output's" in caplog.messages


@pytest.mark.slow
def test_torch_logs_shows_the_passes():
    script = (
        "import torch\nmodel = torch.nn.Linear(64, 64).requires_grad_(False)\n"
        "torch._TorchCompileInductorWrapper.__call__ = lambda self, gm, inputs: gm.forward\n"
        "torch.compile(model, backend='viditq')(torch.ones(40, 64))\n"
    )
    env = {**os.environ, "TORCH_LOGS": "+viditq_fx"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "fuse_linear: " in done.stderr
    assert " matches, 0 rejects" in done.stderr
