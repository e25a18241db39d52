"""Child process that runs linear kernels in Triton's interpreter: `interpret_linear IN OUT`."""

from __future__ import annotations

import sys
from importlib import import_module

import torch
import triton
from nogpu.interpreter import fix_dot, fix_scalars


def main(source: str, target: str) -> None:
    """IN: a list of (module of the template, args of the op, GemmConfig, further options of its `launch` if any).

    OUT: the list of results.
    """
    assert triton.knobs.runtime.interpret, "start this process with TRITON_INTERPRET=1"
    fix_dot()
    fix_scalars()
    results = []
    for name, args, config, *rest in torch.load(source, weights_only=False):
        launch = import_module(f"viditq_fx.triton_templates.{name}").launch
        results.append(launch(*args, config=config, **(rest[0] if rest else {})))
    torch.save(results, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
