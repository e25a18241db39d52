"""Which kernel each quantized node was given, and why: recorded while Inductor lowers a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class KernelRecord:
    """What computes one node of a compiled graph."""

    op: str
    """Op of the dialect, e.g. "linear_w8a8"."""
    kernel: str
    """E.g. "triton:linear_w8a8 128x256x128", "extern:int_mm", "eager reference"."""
    reason: str
    """Why this kernel and not another."""
    fqn: str
    """Path of the innermost module that the node came from, as a Site has it; "" is the compiled one."""


# Context, not state: set only inside `kernel_log()`, so concurrent compilations do not mix.
_LOG: ContextVar[dict[str, KernelRecord] | None] = ContextVar("viditq_kernel_log", default=None)


@contextmanager
def kernel_log() -> Iterator[dict[str, KernelRecord]]:
    """Collect the choices of all compilations inside: FX node name -> KernelRecord.

    The names are those of the graph that Inductor lowers (AOTAutograd renames nodes); `fqn` is the
    same in every graph. A graph that comes from Inductor's cache is not lowered, so it adds nothing.
    """
    entries: dict[str, KernelRecord] = {}
    token = _LOG.set(entries)
    try:
        yield entries
    finally:
        _LOG.reset(token)


def record(node: str, entry: KernelRecord) -> None:
    """Add the choice for the FX node of that name to the innermost open log, if there is one."""
    entries = _LOG.get()
    if entries is not None:
        entries[node] = entry
