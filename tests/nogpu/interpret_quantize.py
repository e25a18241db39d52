"""Child process that runs the quantize kernels in Triton's interpreter: `interpret_quantize IN OUT`."""

from __future__ import annotations

import sys

import torch
import triton
from nogpu.interpreter import fix_dot, fix_scalars

from viditq_fx.triton_templates import quantize_rows, rotate_quantize

LAUNCHES = {
    "norm": quantize_rows.launch_norm,
    "activation": quantize_rows.launch_activation,
    "rotate": rotate_quantize.launch,
}


def main(source: str, target: str) -> None:
    """IN: a list of (name in LAUNCHES, args, kwargs). OUT: the list of (integers, scales)."""
    assert triton.knobs.runtime.interpret, "start this process with TRITON_INTERPRET=1"
    fix_dot()
    fix_scalars()
    cases = torch.load(source, weights_only=False)
    torch.save([LAUNCHES[name](*args, **kwargs) for name, args, kwargs in cases], target)


if __name__ == "__main__":
    main(*sys.argv[1:])
