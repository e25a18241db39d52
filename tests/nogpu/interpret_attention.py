"""Child process that runs the attention kernel in Triton's interpreter: `interpret_attention IN OUT`."""

from __future__ import annotations

import functools
import sys

import torch
import triton
from nogpu.interpreter import fix_dot, fix_fp8_casts, fix_scalars

from viditq_fx.triton_templates.attention_int8 import launch


def main(source: str, target: str) -> None:
    """IN: a list of (args of the op, AttentionConfig, its `values`). OUT: the list of (result, log-sum-exp)."""
    assert triton.knobs.runtime.interpret, "start this process with TRITON_INTERPRET=1"
    fix_dot()
    fix_fp8_casts()
    fix_scalars()
    cases = torch.load(source, weights_only=False)
    run = functools.partial(launch, return_lse=True)
    torch.save([run(*args, config=config, values=values) for args, config, values in cases], target)


if __name__ == "__main__":
    main(*sys.argv[1:])
