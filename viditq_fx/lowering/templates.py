"""Kernel templates from outside: which there are, and which serve the ops of this compilation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from viditq_fx.errors import OptionError
from viditq_fx.lowering.inductor_compat import has_triton
from viditq_fx.ops.linear import LINEAR_W8A8
from viditq_fx.options import CompileOptions
from viditq_fx.plugins import TEMPLATES_GROUP, Failure, attempt, installed, refuse
from viditq_fx.report import CompileReport
from viditq_fx.triton_templates.base import KernelTemplate

OUR_NAMES = (
    *("linear_w8a8", "linear_w8a8_split_k", "linear_w8a8_persistent", "linear_w8a8_tma"),
    *("linear_w4a8", "linear_w4a8_g128", "linear_w4a8_g64", "linear_w8a8_fp8"),
    *("linear_w4a8_block", "linear_w4a8_block_g128", "linear_w4a8_block_g64"),
    *("linear_w4a4", "linear_w4a4_g128", "linear_w4a4_g64"),
)

# Context, not state: set only while one graph is compiled, so concurrent compilations do not mix.
_OUTSIDE: ContextVar[tuple[KernelTemplate, ...]] = ContextVar("viditq_templates", default=())


@contextmanager
def serving(templates: Sequence[KernelTemplate]) -> Iterator[None]:
    """Let these templates be asked by the lowerings of what is compiled inside."""
    token = _OUTSIDE.set(tuple(templates))
    try:
        yield
    finally:
        _OUTSIDE.reset(token)


def outside_templates(overload: Any) -> tuple[KernelTemplate, ...]:
    """Templates from outside that serve an op, in the order in which they are asked."""
    return tuple(t for t in _OUTSIDE.get() if any(op.overload is overload for op in t.ops))


def extra_templates(options: CompileOptions, report: CompileReport) -> tuple[KernelTemplate, ...]:
    """The user's templates, then those of installed plugins; none where Triton does not run.

    Raises OptionError for a wrong one of the user's; a plugin's is left out with a reason, or StrictError.
    """
    found: list[KernelTemplate] = []
    for value in options.extra_templates:
        found.append(check_template(value, [t.name for t in found]))
    if report.device != "cuda" or not has_triton():
        return ()
    for plugin in installed(TEMPLATES_GROUP) if options.plugins else ():
        value = plugin.value
        if not isinstance(value, Failure):
            value = attempt(check_template, value, [t.name for t in found])
        if isinstance(value, Failure):
            reason = f"{plugin.name} was left out: {value}"
            refuse(reason, report, strict=options.strict, cause=value.error)
            continue
        found.append(value)
    return tuple(found)


def check_template(value: Any, taken: Sequence[str] = ()) -> KernelTemplate:
    """`value`, if it is a template that the lowering of linears can use. Raises OptionError."""
    if not isinstance(value, KernelTemplate):
        raise OptionError(f"a template is a viditq_fx.triton_templates.base.KernelTemplate, not {value!r}")
    if value.name in (*OUR_NAMES, *taken):
        raise OptionError(f"template {value.name!r} has the name of another; give it one of its own")
    wanted = _signature(LINEAR_W8A8.overload)
    for op in value.ops:
        if _signature(op.overload) != wanted:
            raise OptionError(
                f"template {value.name!r} serves {op.name}{op.schema}: only ops with the arguments of "
                f"{LINEAR_W8A8.name}{LINEAR_W8A8.schema} are lowered through templates"
            )
    problem = attempt(lambda: value.body)
    if isinstance(problem, Failure):
        raise OptionError(f"template {value.name!r}: {problem}") from problem.error
    return value


def _signature(overload: Any) -> list[str]:
    schema = overload._schema
    return [str(a.type) for a in schema.arguments] + [str(r.type) for r in schema.returns]
