"""The order of the passes, in one place, with verification, time and trace round each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from viditq_fx.errors import OptionError
from viditq_fx.options import CompileOptions
from viditq_fx.passes.annotate_sites import AnnotateSites
from viditq_fx.passes.base import Match, Pass, PassContext, Reject
from viditq_fx.passes.checkpoint import Checkpoint
from viditq_fx.passes.extra import Anchored, Order, after, before
from viditq_fx.passes.fold_balance import FoldBalance
from viditq_fx.passes.fuse_activation_quantize import FuseActivationQuantize
from viditq_fx.passes.fuse_linear import FuseLinear
from viditq_fx.passes.fuse_norm_quantize import FuseNormQuantize
from viditq_fx.passes.fuse_shared_input import FuseSharedInput
from viditq_fx.passes.hoist_quantize import HoistQuantize
from viditq_fx.passes.insert_qdq import InsertQdq
from viditq_fx.passes.linearize_convolutions import LinearizeConvolutions
from viditq_fx.passes.normalize import Normalize
from viditq_fx.passes.place_weights import PlaceWeights
from viditq_fx.passes.quantize_attention import AnnotateAttention, QuantizeAttention
from viditq_fx.passes.report_unfused import ReportUnfused
from viditq_fx.passes.verify import verify
from viditq_fx.passes.work import count_work
from viditq_fx.plugins import PASSES_GROUP, Failure, attempt, installed, refuse
from viditq_fx.report import CompileReport, Declined, PassTrace

__all__ = [
    "Anchored",
    "Observer",
    "PassPipeline",
    "after",
    "arrange_extra",
    "before",
    "build_pipeline",
    "context_of",
    "default_passes",
]

_LOG = logging.getLogger("viditq_fx.passes")
"""One INFO line a pass; TORCH_LOGS="+viditq_fx" shows them, and each refusal at DEBUG."""

Observer = Callable[[str, fx.GraphModule], None]
"""Called with a pass's name and the graph as that pass left it."""


@dataclass(frozen=True, kw_only=True)
class PassPipeline:
    """Passes in the order in which they run."""

    passes: tuple[Pass, ...]
    observer: Observer | None = None
    extra: tuple[Pass, ...] = ()
    """Those of `passes` that are from outside: one that raises is undone and left out."""
    strict: bool = False
    """Raise StrictError instead."""

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        """Run every pass over `gm` in place; verify and trace after each.

        Raises VerifyError when a pass breaks an invariant.
        """
        for step in self.passes:
            size, start = len(gm.graph.nodes), time.perf_counter()
            results = self._run_extra(step, gm, ctx) if self._is_extra(step) else step.run(gm, ctx)
            if results is None:
                continue
            seconds = time.perf_counter() - start
            verify(gm, ctx, after=step.name)
            matches = sum(isinstance(result, Match) for result in results)
            ctx.report.passes.append(
                PassTrace(
                    name=step.name,
                    seconds=seconds,
                    matches=matches,
                    rejects=len(results) - matches,
                    nodes_before=size,
                    nodes_after=len(gm.graph.nodes),
                )
            )
            ctx.report.declined += [
                Declined(step=step.name, fqn=r.site.fqn, reason=r.reason, extra=self._is_extra(step))
                for r in results
                if isinstance(r, Reject)
            ]
            _log(ctx.report.passes[-1], results)
            if step.name == AnnotateAttention.name:
                count_work(gm.graph, ctx)
            if self.observer is not None:
                self.observer(step.name, gm)
        gm.recompile()

    def _is_extra(self, step: Pass) -> bool:
        return any(step is known for known in self.extra)  # by identity: a field may hold a tensor

    def _run_extra(
        self, step: Pass, gm: fx.GraphModule, ctx: PassContext
    ) -> tuple[Match | Reject, ...] | None:
        """Run a pass from outside; None if it raised, and the graph is as it was."""
        checkpoint = Checkpoint(gm, ctx)
        results = attempt(lambda: _checked(step.run(gm, ctx)))
        if isinstance(results, Failure):
            checkpoint.restore()
            reason = f"extra pass {step.name!r} raised {results}; compiled without it"
            refuse(reason, ctx.report, strict=self.strict, cause=results.error)
            return None
        checkpoint.check_interface(step.name)
        return results


def _checked(results: object) -> tuple[Match | Reject, ...]:
    if not isinstance(results, tuple | list) or not all(isinstance(r, Match | Reject) for r in results):
        raise TypeError(f"run returns a tuple of Match and Reject, not {results!r}")
    return tuple(results)


def _log(trace: PassTrace, results: tuple[Match | Reject, ...]) -> None:
    _LOG.info(
        "%s: %.1f ms, %d matches, %d rejects, %d -> %d nodes",
        *(trace.name, 1e3 * trace.seconds, trace.matches, trace.rejects),
        *(trace.nodes_before, trace.nodes_after),
    )
    for result in results:
        if isinstance(result, Reject):
            _LOG.debug("%s: %s: %s", trace.name, result.site.fqn or "(root)", result.reason)


def default_passes() -> tuple[Pass, ...]:
    """THE order."""
    return (
        Normalize(),
        AnnotateSites(),
        AnnotateAttention(),
        LinearizeConvolutions(),
        InsertQdq(),
        FuseLinear(),
        FoldBalance(),
        HoistQuantize(),
        FuseNormQuantize(),
        FuseActivationQuantize(),
        ReportUnfused(),
        FuseSharedInput(),
        QuantizeAttention(),
        PlaceWeights(),
    )


def context_of(options: CompileOptions, report: CompileReport) -> PassContext:
    """What the passes over one graph share, as the options ask it; of a recipe's ranges one is chosen before."""
    assert options.recipe is None or options.recipe.ranges == 1, "a graph has one scheme for each site"
    return PassContext(
        scheme=options.scheme,
        keep=options.keep,
        attention=options.attention,
        recipe=options.recipe,
        selection="auto" if options.weighs_speed else "always",
        report=report,
    )


def build_pipeline(
    options: CompileOptions, report: CompileReport, observer: Observer | None = None
) -> PassPipeline:
    """THE order with the user's extra passes and those of installed plugins in their places.

    Raises OptionError for a wrong extra pass; a plugin's is left out, with a reason, or StrictError.
    """
    order = arrange_extra(options)
    for plugin in installed(PASSES_GROUP) if options.plugins else ():
        failure = plugin.value
        if not isinstance(failure, Failure):
            try:
                order.add(plugin.value)
                continue
            except OptionError as error:
                failure = Failure(error=error)
        refuse(f"{plugin.name} was left out: {failure}", report, strict=options.strict, cause=failure.error)
    return PassPipeline(
        passes=tuple(order.passes), observer=observer, extra=tuple(order.extra), strict=options.strict
    )


def arrange_extra(options: CompileOptions) -> Order:
    """THE order with the user's extra passes. Raises OptionError for a wrong one."""
    order = Order(default_passes())
    for entry in options.extra_passes:
        order.add(entry)
    return order
