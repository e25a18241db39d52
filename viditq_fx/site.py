"""A Site names one place in a model: module path plus what is quantized there."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ROOT = re.compile(r"""^(L\[['"][^'"]+['"]\]|L__self__|self)""")
_STEP = re.compile(
    r"""\.?(?:_modules|_parameters|_buffers)\[['"]([^'"]+)['"]\]|\[['"]?([^\]'"]+)['"]?\]|\.?([^.\[\]]+)"""
)
_WRAPPER_STEPS = frozenset({"__dict__", "_orig_mod", "_modules", "_parameters", "_buffers"})


@dataclass(frozen=True, order=True)
class Site:
    """The one key of calibration, recipe, passes and report: module FQN + role.

    `fqn` is relative to the compiled module ("transformer_blocks.0.attn1.to_q"); `role` says which
    tensor of it ("weight", "input").
    """

    fqn: str
    role: str = "weight"

    def __str__(self) -> str:
        return f"{self.fqn}:{self.role}"


def fqn_of_source(source: str) -> str:
    """Dotted path of a Dynamo source or module-stack name, without the root.

    "L['self']._modules['blocks']._modules['0'].attn" -> "blocks.0.attn".
    """
    rest = _ROOT.sub("", source, count=1)
    steps: list[str] = []
    for match in _STEP.finditer(rest):
        step = next(group for group in match.groups() if group is not None)
        if step not in _WRAPPER_STEPS:
            steps.append(step)
    return ".".join(steps)


def site_of_module(fqn: str, role: str = "weight") -> Site:
    """The Site of a module by its name in `model.named_modules()`; agrees with `site_of_node`."""
    return Site(".".join(step for step in fqn.split(".") if step not in _WRAPPER_STEPS), role)
