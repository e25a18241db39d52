"""Child process that runs the linear_w8a8 kernel in Triton's interpreter: `interpret_linear IN OUT`."""

from __future__ import annotations

import sys

import torch
import triton
from nogpu.interpreter import fix_dot

from viditq_fx.triton_templates.linear_w8a8 import launch


def main(source: str, target: str) -> None:
    """IN: a list of (args of the op, GemmConfig). OUT: the list of results."""
    assert triton.knobs.runtime.interpret, "start this process with TRITON_INTERPRET=1"
    fix_dot()
    cases = torch.load(source, weights_only=False)
    torch.save([launch(*args, config=config) for args, config in cases], target)


if __name__ == "__main__":
    main(*sys.argv[1:])
