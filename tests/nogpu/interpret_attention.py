"""Child process that runs the attention kernel in Triton's interpreter: `interpret_attention IN OUT`."""

from __future__ import annotations

import sys

import torch
import triton
from nogpu.interpreter import fix_dot, fix_scalars

from viditq_fx.triton_templates.attention_int8 import launch


def main(source: str, target: str) -> None:
    """IN: a list of (args of the op, AttentionConfig). OUT: the list of (result, log-sum-exp)."""
    assert triton.knobs.runtime.interpret, "start this process with TRITON_INTERPRET=1"
    fix_dot()
    fix_scalars()
    cases = torch.load(source, weights_only=False)
    torch.save([launch(*args, config=config, return_lse=True) for args, config in cases], target)


if __name__ == "__main__":
    main(*sys.argv[1:])
