"""What a pass is: a frozen dataclass whose fields are its options, run over one FX graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from viditq_fx.report import CompileReport, SiteReport
from viditq_fx.scheme import QuantScheme
from viditq_fx.site import Site


@dataclass(frozen=True, kw_only=True)
class Match:
    """A pass did its work at a site."""

    site: Site
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A pass declined a site, and why."""

    site: Site
    reason: str


@dataclass(kw_only=True)
class PassContext:
    """What passes over one graph share: the request, and the report that they fill."""

    scheme: QuantScheme
    keep: tuple[str, ...] = ()
    attention: str = "auto"
    """"auto", "int8" or "keep", as in CompileOptions."""
    report: CompileReport = field(default_factory=lambda: CompileReport(scheme="", device=""))
    sites: dict[str, SiteReport] = field(default_factory=dict)
    """Node name of each annotated site -> its report."""
    weight_slots: list[WeightSlot] = field(default_factory=list)
    """Packed weights that the graph now takes as inputs, in order of its placeholders."""


@dataclass(frozen=True, kw_only=True)
class WeightSlot:
    """Two placeholders (integers, scales) that stand for one full-precision weight."""

    source: str
    """Name of the placeholder of the full-precision weight in the graph that Dynamo made."""
    quantized: str
    """Name of the placeholder of the int8 weight [N, K]."""
    scale: str
    """Name of the placeholder of the fp32 scales [N]."""
    bits: int
    frees_source: bool
    """No other node of this graph reads the full-precision weight."""


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One step of the pipeline. The graph verifies before and after it; in between it need not."""

    name: ClassVar[str]
    changes_numerics: ClassVar[bool]

    @abstractmethod
    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        """Rewrite `gm` in place and say at which sites something was done or declined."""
