"""The options with which the graphs of a compiled model can be traced again: those it was compiled with."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from viditq_fx.errors import ViditqError
from viditq_fx.options import CompileOptions
from viditq_fx.runtime import Execution
from viditq_fx.timestep import as_fp32, range_on_host, timestep_name, timestep_value

if TYPE_CHECKING:
    from viditq_fx.inspection.collect import ExplainReport


def options_of(ran: Sequence[Execution], report: ExplainReport) -> CompileOptions:
    """What all graphs that ran were compiled with, for a trace of the whole model.

    `keep` names full paths here: the patterns of a block are relative to it. Raises ViditqError where blocks were
    compiled with different passes: one trace cannot show both.
    """
    kinds = {_passes_of(run.options): run.options for run in ran}
    if len(kinds) > 1:
        told = "; ".join(", ".join(f"{name}={value}" for name, value in kind) for kind in kinds)
        raise ViditqError(
            f"graphs=True runs one set of passes over the whole model, and its blocks were compiled with "
            f"{len(kinds)}: {told}. Explain one of these blocks alone, or leave graphs=True out"
        )
    kept = [
        site.fqn
        for site in (*report.sites, *report.attention)
        if site.outcome == "kept" and (site.reason or "").startswith("kept by pattern")
    ]
    # strict: what could be refused was, when the model was compiled; a trace of more than its blocks must not raise.
    return replace(ran[0].options, keep=tuple(map(glob.escape, kept)), strict=False)


def options_of_call(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: CompileOptions
) -> CompileOptions:
    """Options with the plans of a call's range of the timestep, where the recipe has ranges.

    Without a timestep those of the first range: compiling says what is wrong with the call.
    """
    recipe = options.recipe
    if recipe is None or recipe.ranges == 1:
        return options
    name = timestep_name(model, recipe.timestep)
    value = timestep_value(model, name, args, kwargs) if name is not None else None
    place = range_on_host(torch.as_tensor(value), as_fp32(recipe.range_edges)) if value is not None else 0
    return replace(options, recipe=recipe.at_range(place))


def _passes_of(options: CompileOptions) -> tuple[tuple[str, Any], ...]:
    """What decides which passes run and what they plan; extra passes by their text, as in the caches' keys."""
    extra = ", ".join(map(repr, options.extra_passes))
    return (
        ("scheme", str(options.scheme)),
        ("attention", options.attention),
        ("plugins", options.plugins),
        ("extra_passes", f"[{extra}]"),
    )
