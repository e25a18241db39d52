"""Passes from outside, each put before or after a pass that is known by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from viditq_fx.errors import OptionError
from viditq_fx.passes.base import Pass

DEFAULT_ANCHOR = "place_weights"


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """A pass and its place; made by `before` or `after`."""

    step: Pass
    side: Literal["before", "after"]
    anchor: str
    """Name of a pass of ours, or of an extra pass that was given earlier."""


def before(anchor: str, step: Pass) -> Anchored:
    """Run `step` right before the pass of that name: before("fuse_linear", MyPass())."""
    return Anchored(step=step, side="before", anchor=anchor)


def after(anchor: str, step: Pass) -> Anchored:
    """Run `step` right after the pass of that name, and after what was put there earlier."""
    return Anchored(step=step, side="after", anchor=anchor)


class Order:
    """Passes in order, to which others are added one by one."""

    def __init__(self, passes: Iterable[Pass]) -> None:
        self.passes = list(passes)
        self.extra: list[Pass] = []
        self._follows: dict[str, str] = {}
        """Name of a pass that was put after another -> that other's name."""

    def add(self, entry: Any) -> None:
        """Put a pass in its place; one without an anchor goes before `place_weights`.

        Raises OptionError for what is no pass, an unknown anchor, or a name that is taken.
        """
        anchored = entry if isinstance(entry, Anchored) else before(DEFAULT_ANCHOR, entry)
        step = _checked(anchored.step)
        names = [known.name for known in self.passes]
        if step.name in names:
            raise OptionError(
                f"extra pass {step.name!r} has the name of another pass; give it one of its own, taken are {names}"
            )
        if anchored.anchor not in names:
            raise OptionError(
                f"extra pass {step.name!r} is placed {anchored.side} {anchored.anchor!r}, which is no pass"
                f"{_nearest(anchored.anchor, names)}; passes are {names}"
            )
        index = names.index(anchored.anchor)
        if anchored.side == "after":
            group, index = {anchored.anchor}, index + 1
            while index < len(names) and self._follows.get(names[index]) in group:
                group.add(names[index])
                index += 1
            self._follows[step.name] = anchored.anchor
        self.passes.insert(index, step)
        self.extra.append(step)


def _checked(step: Any) -> Pass:
    if isinstance(step, type) and issubclass(step, Pass):
        raise OptionError(f"extra pass {step.__name__} is a class: give an instance, {step.__name__}()")
    if not isinstance(step, Pass):
        raise OptionError(
            f"an extra pass is an instance of viditq_fx.passes.base.Pass, alone or in before(name, pass) or "
            f"after(name, pass), not {step!r}"
        )
    name = getattr(step, "name", None)
    if not isinstance(name, str) or not name:
        raise OptionError(f"extra pass {type(step).__name__} needs `name: ClassVar[str]`, not {name!r}")
    return step


def _nearest(name: Any, names: list[str]) -> str:
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
