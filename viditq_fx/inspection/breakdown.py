"""The explain report by role, by reason, by kernel and by pass: counts, FLOPs, bytes and time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from viditq_fx.inspection.collect import ExplainedSite, ExplainReport

ROOT = "outside the blocks"


@dataclass(kw_only=True)
class RoleRow:
    """All sites of one role."""

    role: str
    sites: int = 0
    quantized: int = 0
    simulated: int = 0
    kept: int = 0
    refused: int = 0
    flops: int = 0
    flops_quantized: int = 0
    weight_bytes: int = 0
    """In full precision; a weight that several sites share counts once."""
    weight_bytes_quantized: int = 0
    """Of those, the full-precision bytes of what is quantized."""
    weight_bytes_packed: int = 0
    """What stands for them: integers and scales."""

    @property
    def flops_share(self) -> float:
        """Share of the FLOPs that is quantized, 0 to 1."""
        return self.flops_quantized / self.flops if self.flops else 0.0


@dataclass(kw_only=True)
class ReasonRow:
    """All sites that are not quantized for one reason."""

    outcome: str
    reason: str
    sites: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    flops: int = 0


@dataclass(kw_only=True)
class DeclinedRow:
    """All places at which one pass declined for one reason."""

    step: str
    reason: str
    extra: bool
    """The pass is from outside."""
    sites: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class KernelRow:
    """All sites that one kernel runs."""

    kernel: str
    sites: int = 0
    roles: list[str] = field(default_factory=list)
    flops: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why this kernel and not another, where that was said."""


@dataclass(kw_only=True)
class PassRow:
    """One pass, summed over all graphs."""

    name: str
    graphs: int = 0
    seconds: float = 0.0
    matches: int = 0
    rejects: int = 0
    nodes_before: int = 0
    nodes_after: int = 0


def everything(report: ExplainReport) -> list[ExplainedSite]:
    """Sites and attention calls."""
    return [*report.sites, *report.attention]


def by_role(report: ExplainReport) -> list[RoleRow]:
    """One row a role, in order of FLOPs, most first."""
    rows: dict[str, RoleRow] = {}
    weights: set[str] = set()
    for site in everything(report):
        row = rows.setdefault(site.role, RoleRow(role=site.role))
        row.sites += 1
        setattr(row, site.outcome, getattr(row, site.outcome) + 1)
        row.flops += site.flops
        row.flops_quantized += site.flops if site.outcome == "quantized" else 0
        if (site.weight or site.fqn) in weights or not site.bytes_full:
            continue
        weights.add(site.weight or site.fqn)
        row.weight_bytes += site.bytes_full
        if site.done:
            row.weight_bytes_quantized += site.bytes_full
            row.weight_bytes_packed += site.resident_packed or site.bytes_packed
    return sorted(rows.values(), key=lambda row: (-row.flops, row.role))


def total(rows: Iterable[RoleRow], role: str = "all") -> RoleRow:
    """The sum of rows."""
    result = RoleRow(role=role)
    for row in rows:
        for name, value in asdict(row).items():
            if name != "role":
                setattr(result, name, getattr(result, name) + value)
    return result


def by_reason(report: ExplainReport) -> list[ReasonRow]:
    """Why sites are not quantized: refusals first, then in order of FLOPs."""
    rows: dict[tuple[str, str], ReasonRow] = {}
    for site in everything(report):
        if site.outcome == "quantized":
            continue
        reason = site.reason or "no reason was recorded"
        row = rows.setdefault((site.outcome, reason), ReasonRow(outcome=site.outcome, reason=reason))
        row.sites.append(site.fqn or "(root)")
        row.flops += site.flops
        if site.role not in row.roles:
            row.roles.append(site.role)
    return sorted(rows.values(), key=lambda row: (row.outcome != "refused", -row.flops, row.reason))


def by_declined(report: ExplainReport) -> list[DeclinedRow]:
    """What passes declined and why, but for what the report of the site says itself; passes in their order."""
    told = {(site.fqn, site.reason) for site in everything(report)}
    rows: dict[tuple[str, str], DeclinedRow] = {}
    for item in report.declined:
        if (item.fqn, item.reason) in told and not item.extra:
            continue
        made = DeclinedRow(step=item.step, reason=item.reason, extra=item.extra)
        rows.setdefault((item.step, item.reason), made).sites.append(item.fqn or "(root)")
    return list(rows.values())


def by_kernel(report: ExplainReport) -> list[KernelRow]:
    """Which kernel runs how many sites; what is not quantized runs as PyTorch or Inductor chooses."""
    rows: dict[str, KernelRow] = {}
    for site in everything(report):
        row = rows.setdefault(
            site.kernel or "", KernelRow(kernel=site.kernel or "full precision (Inductor's choice)")
        )
        row.sites += 1
        row.flops += site.flops
        if site.role not in row.roles:
            row.roles.append(site.role)
        if site.kernel and site.reason and site.reason not in row.reasons:
            row.reasons.append(site.reason)
    return sorted(rows.values(), key=lambda row: (-row.flops, row.kernel))


def by_pass(report: ExplainReport) -> list[PassRow]:
    """Time, matches and rejects of each pass, in the order in which they run."""
    rows: dict[str, PassRow] = {}
    for trace in report.passes:
        row = rows.setdefault(trace.name, PassRow(name=trace.name))
        row.graphs += 1
        for name in ("seconds", "matches", "rejects", "nodes_before", "nodes_after"):
            setattr(row, name, getattr(row, name) + getattr(trace, name))
    return list(rows.values())


def breakdown(report: ExplainReport) -> dict[str, Any]:
    """All of the above as plain data."""
    roles = [asdict(row) | {"flops_share": row.flops_share} for row in by_role(report)]
    return {
        "by_role": roles,
        "by_reason": [asdict(row) for row in by_reason(report)],
        "by_kernel": [asdict(row) for row in by_kernel(report)],
        "by_pass": [asdict(row) for row in by_pass(report)],
        "by_declined": [asdict(row) for row in by_declined(report)],
    }


def block_of(path: str) -> str:
    """The block that a module path stands in: up to its first number ("blocks.0.attn.q" -> "blocks.0")."""
    steps = path.split(".")
    for index, step in enumerate(steps):
        if step.isdigit():
            return ".".join(steps[: index + 1])
    return ROOT
