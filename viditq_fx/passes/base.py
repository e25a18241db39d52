"""What a pass is: a frozen dataclass whose fields are its options, run over one FX graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx

from viditq_fx.recipe import Recipe
from viditq_fx.report import CompileReport, SiteReport
from viditq_fx.scheme import QuantScheme, WeightForm
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
    """"auto", "int8", "int8-fp8", "int8-int8" or "keep", as in CompileOptions."""
    recipe: Recipe | None = None
    """What calibration decided; `scheme` is its scheme then."""
    selection: str = "always"
    """"auto": sites that are expected to run no faster quantized stay in full precision. "always": none does."""
    report: CompileReport = field(default_factory=lambda: CompileReport(scheme="", device=""))
    sites: dict[str, SiteReport] = field(default_factory=dict)
    """Node name of each annotated site -> its report."""
    computed_by: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Node name of a site that is a slice -> (name of the wide linear's node, path that it runs under)."""
    weight_slots: list[WeightSlot] = field(default_factory=list)
    """Packed weights that the graph now takes as inputs, in order of its placeholders."""
    bias_slots: list[BiasSlot] = field(default_factory=list)
    """Joined biases that the graph takes as inputs, after the weights."""
    constant_slots: list[ConstantSlot] = field(default_factory=list)
    """Vectors of the recipe that the graph takes as inputs, before the weights."""


@dataclass(frozen=True, kw_only=True)
class WeightSlot:
    """Placeholders (integers, scales, zero points) that stand for a full-precision weight, or for several joined."""

    sources: tuple[str, ...]
    """Names of the placeholders of the full-precision weights in the graph that Dynamo made."""
    quantized: str
    """Name of the placeholder of the stored weight."""
    scale: str
    """Name of the placeholder of the fp32 scales; that of the zero points follows it where the form has a grid."""
    form: WeightForm
    frees_source: tuple[bool, ...]
    """For each source: no other node of this graph reads the full-precision weight."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ConstantSlot:
    """A placeholder that stands for a vector which is the same at every call."""

    name: str
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class BiasSlot:
    """A placeholder that stands for several biases joined."""

    sources: tuple[str, ...]
    joined: str


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One step of the pipeline. The graph verifies before and after it; in between it need not."""

    name: ClassVar[str]
    changes_numerics: ClassVar[bool]

    @abstractmethod
    def run(self, gm: fx.GraphModule, ctx: PassContext) -> tuple[Match | Reject, ...]:
        """Rewrite `gm` in place and say at which sites something was done or declined."""
