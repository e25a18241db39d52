"""What happened to every site of one compiled graph: plain data, no rendering."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from viditq_fx.scheme import QuantScheme
from viditq_fx.timestep import range_names

SIMULATION = "simulation:"
"""How the name of a kernel begins that rounds values as a scheme does, and computes in floating point."""


@dataclass(kw_only=True)
class SiteReport:
    """One linear (or a relative of it) of a compiled graph."""

    fqn: str
    """Module path relative to the compiled module; "" is the compiled module itself."""
    role: str
    """Role found by data flow: attn.q, attn.kv, attn.out, ffn.up, ffn.down, cond, stem, head, other."""
    rows: str
    """M: tokens x batch at compile time; a symbolic expression under dynamic shapes."""
    depth: int
    """K: input channels."""
    width: int
    """N: output channels."""
    planned: str | None = None
    """Scheme that the policy asked for; None when it keeps the site in full precision."""
    done: str | None = None
    """Scheme that was carried out; None when the site runs in full precision."""
    kernel: str | None = None
    """What computes it: chosen by the lowering, e.g. "onednn-u8" or "triton:linear_w8a8 128x256x128"."""
    reason: str | None = None
    """Why the site is not quantized, or why the first choice of kernel was not taken."""
    prologue: str | None = None
    """What is computed in one op with the quantization of its input, e.g. "layer_norm+modulate"."""
    unfused: str | None = None
    """Why a norm or an activation in front of it is not."""
    joined: str | None = None
    """Path of the first of the sites that one wide GEMM computes together with this one."""
    weight: str | None = None
    """Source of the weight parameter, which says where two sites share one."""
    bytes_full: int = 0
    """Bytes of the weight in full precision."""
    bytes_packed: int = 0
    """Bytes of integers and scales that stand for it; 0 when not quantized."""
    flops: int = 0
    """Multiplies and adds of one call, at the sizes seen at compile time."""
    flops_hinted: bool = False
    """Some of those sizes are symbolic: other calls may do more or less."""
    expected_us: float | None = None
    """Microseconds that it should take quantized, its input's quantization included; None: not known."""
    expected_full_us: float | None = None
    """The same in full precision."""

    @property
    def outcome(self) -> str:
        """What became of it: "quantized", "simulated" (rounded, but computed in floating point), "kept" or "refused".

        Kept is the policy's or the user's choice; refused was planned and could not be done.
        """
        if self.done is not None:
            return "simulated" if (self.kernel or "").startswith(SIMULATION) else "quantized"
        return "kept" if self.planned is None else "refused"


@dataclass(kw_only=True)
class PassTrace:
    """One pass over one graph."""

    name: str
    seconds: float
    matches: int
    rejects: int
    nodes_before: int
    nodes_after: int


@dataclass(frozen=True, kw_only=True)
class Declined:
    """A pass left a site as it was, and said why."""

    step: str
    """Name of the pass."""
    fqn: str
    reason: str
    extra: bool = False
    """The pass is from outside: nothing else in the report tells what it thought of the site."""


@dataclass(frozen=True, kw_only=True)
class RangesReport:
    """The graphs that a recipe with ranges of the timestep was compiled to; each call runs one."""

    edges: tuple[float, ...]
    """Timesteps between the ranges."""
    graphs: tuple[int, ...]
    """For each range the number of its graph; ranges with the same schemes share one."""
    weight_bits: tuple[float, ...]
    """For each range the mean bits of a weight over the quantized linears."""
    bytes_packed: int
    """Bytes of integers and scales of all graphs, every form of every weight once."""

    def __str__(self) -> str:
        told = zip(range_names(self.edges), self.weight_bits, strict=True)
        bits = "; ".join(f"{name}: {value:.3g}" for name, value in told)
        return (
            f"Bits of a weight by range of the timestep: {bits} ({len(set(self.graphs))} graphs, "
            f"{self.bytes_packed:,} bytes of packed weights for all of them)"
        )


@dataclass(kw_only=True)
class CompileReport:
    """Everything that one call of the backend planned, did and refused."""

    scheme: str
    device: str
    sites: list[SiteReport] = field(default_factory=list)
    rejects: list[str] = field(default_factory=list)
    """Refusals that concern the graph and no single site, e.g. that it wants gradients."""
    passes: list[PassTrace] = field(default_factory=list)
    attention: list[SiteReport] = field(default_factory=list)
    """Attention calls that are no sites: M = batch x heads x queries, K = head width, N = keys."""
    declined: list[Declined] = field(default_factory=list)
    """Every Reject of every pass that ran, in order."""
    ranges: RangesReport | None = None
    """All graphs that a recipe with ranges was compiled to, this one among them."""
    in_ranges: tuple[int, ...] = ()
    """Which ranges this graph is for; () without ranges."""

    def __str__(self) -> str:
        """A line a site, then what was refused; vq.explain has more."""
        quantized = sum(entry.outcome == "quantized" for entry in self.sites)
        lines = [f"{quantized} of {len(self.sites)} linears in {self.scheme} on {self.device}"]
        lines += [
            f"{entry.fqn or '(root)'} ({entry.role}): {entry.done or entry.reason or 'full precision'}"
            for entry in self.sites
        ]
        lines += [f"refused: {reason}" for reason in self.rejects]
        lines += [] if self.ranges is None else [self.told_ranges()]
        return "\n".join(lines)

    def average_weight_bits(self) -> float:
        """Mean bits of a weight over the quantized linears; 0 where there is none."""
        done = {entry.weight or entry.fqn: entry for entry in self.sites if entry.done is not None}.values()
        weights = sum(entry.width * entry.depth for entry in done)
        bits = sum(
            QuantScheme.parse(entry.done).weight_bits * entry.width * entry.depth
            for entry in done
            if entry.done is not None
        )
        return bits / weights if weights else 0.0

    def told_ranges(self) -> str:
        """The bits of all ranges of the timestep, and which of them this graph runs; "" without ranges."""
        if self.ranges is None:
            return ""
        names = range_names(self.ranges.edges)
        own = " and ".join(names[index] for index in self.in_ranges)
        return f"{self.ranges}; what ran here is the graph of {own}"

    def site(self, fqn: str) -> SiteReport:
        """The report of the site with this module path. Raises KeyError when there is none."""
        for entry in self.sites:
            if entry.fqn == fqn:
                return entry
        raise KeyError(fqn)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, ready for JSON."""
        return asdict(self)
