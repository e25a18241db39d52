"""Child process that runs linear kernels in Triton's interpreter: `interpret_linear IN OUT`."""

from __future__ import annotations

import sys
from importlib import import_module

import torch
import triton
from nogpu.interpreter import fix_dot, fix_scalars


def main(source: str, target: str) -> None:
    """IN: a list of (module of the template, args of the op, GemmConfig). OUT: the list of results."""
    assert triton.knobs.runtime.interpret, "start this process with TRITON_INTERPRET=1"
    fix_dot()
    fix_scalars()
    cases = torch.load(source, weights_only=False)
    templates = {name: import_module(f"viditq_fx.triton_templates.{name}") for name, _, _ in cases}
    torch.save([templates[name].launch(*args, config=config) for name, args, config in cases], target)


if __name__ == "__main__":
    main(*sys.argv[1:])
