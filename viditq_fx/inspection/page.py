"""The explain report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from viditq_fx.errors import ViditqError
from viditq_fx.inspection.answers import answers, count_of, percent, size
from viditq_fx.inspection.blocks import Block, choose_block, find_blocks, relative
from viditq_fx.inspection.breakdown import ROOT, block_of, by_role, everything, total
from viditq_fx.inspection.collect import ExplainedSite, ExplainReport
from viditq_fx.inspection.drawing import to_svg
from viditq_fx.inspection.error_page import error_section, step_sections
from viditq_fx.inspection.flow_graph import flow_graph
from viditq_fx.inspection.render import EXPECTED, expected, has_expected, shape_of, tables, why
from viditq_fx.inspection.vocabulary import OUTCOMES, ops_in_words, scheme_in_words

_MOST_BOXES = 260
"""A picture of more boxes is no picture any more, and takes seconds to lay out."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site of the page's list."""

    path: str
    role: str
    outcome: str
    done: str
    shape: str
    kernel: str
    flops: str
    expected: str
    weight: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The sites of one block."""

    name: str
    rows: tuple[Row, ...]
    summary: str
    open: bool
    """It shows when the page opens: the typical block, and those in which something was refused."""


@dataclass(frozen=True, kw_only=True)
class BlockGraphs:
    """One block's pictures and diffs."""

    block: Block
    before: str
    after: str
    last: str
    """Name of the last pass."""
    shown: bool
    """Whether it is open when the page opens: the typical one."""
    ops: Mapping[str, str]
    """Our ops in it -> what they do."""


def render_page(report: ExplainReport) -> str:
    """The page as text. Raises ViditqError when jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise ViditqError('the HTML page needs jinja2; run: pip install "viditq_fx[cli]"') from error
    source = resources.files("viditq_fx.inspection") / "templates" / "explain.html.j2"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    sites = everything(report)
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        report=report,
        scheme=", ".join(f"{name} ({scheme_in_words(name)})" for name in report.schemes),
        headline=_headline(report),
        answers=answers(report),
        bars=_bars(sites),
        role_table=tables(report)[0],
        tables=tables(report)[1:],
        groups=_groups(report),
        expected=EXPECTED if has_expected(report) else "",
        count=len(sites),
        roles=list(dict.fromkeys(site.role for site in sites)),
        outcomes={o: words for o, words in OUTCOMES.items() if any(site.outcome == o for site in sites)},
        graphs=_graphs(report),
        errors=error_section(report),
        steps=step_sections(report),
    )


def _headline(report: ExplainReport) -> list[tuple[str, str]]:
    """The figures to take away: (figure, what it is)."""
    totals, work = report.totals(), total(by_role(report))
    before, packed = totals["quantized_weight_bytes_before"], totals["quantized_weight_bytes_packed"]
    figures = [(f"{report.count('quantized')} of {len(report.sites)}", "linears run in integers")]
    if work.flops:
        share = percent(work.flops_quantized, work.flops)
        figures.append((share, "of the FLOPs of linears and attention are integer products"))
    if before:
        figures.append((f"{size(before)} → {size(packed)}", "weights of these linears, packed"))
    if report.model_bytes_before:
        now = f"{size(report.model_bytes_before)} → {size(report.model_bytes)}"
        figures.append((now, "the whole model in memory, before and now"))
    return figures


def _bars(sites: Sequence[ExplainedSite]) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """(what is measured, [(outcome, share as text, share)]): of FLOPs and of the bytes of weights."""
    weights = {site.weight or site.fqn: site for site in sites if site.bytes_full}.values()
    measured = {
        "FLOPs": [(site.outcome, site.flops) for site in sites],
        "bytes of linear weights": [(site.outcome, site.bytes_full) for site in weights],
        "sites": [(site.outcome, 1) for site in sites],
    }
    bars = []
    for title, pairs in measured.items():
        whole = sum(amount for _, amount in pairs)
        parts = {o: sum(amount for outcome, amount in pairs if outcome == o) for o in OUTCOMES}
        shown = [(o, percent(part, whole), 100 * part / whole) for o, part in parts.items() if part]
        if shown:
            bars.append((title, shown))
    return bars


def _groups(report: ExplainReport) -> list[Group]:
    sites = everything(report)
    blocks: dict[str, list[ExplainedSite]] = {}
    for site in sites:
        blocks.setdefault(block_of(site.fqn), []).append(site)
    flops = sum(site.flops for site in sites)
    typical = _typical(report, blocks)
    groups = []
    for name, members in blocks.items():
        counts = [(o, sum(site.outcome == o for site in members)) for o in OUTCOMES]
        words = ", ".join(f"{count} {outcome}" for outcome, count in counts if count)
        share = percent(sum(site.flops for site in members), flops)
        groups.append(
            Group(
                name=name,
                rows=tuple(map(_row, members)),
                summary=f"{words}; {share} of FLOPs",
                open=name == typical or any(site.outcome == "refused" for site in members),
            )
        )
    return groups


def _typical(report: ExplainReport, blocks: Mapping[str, Sequence[ExplainedSite]]) -> str | None:
    """The block whose picture is open; without pictures, of the kind of sites that occurs most often."""
    chosen = choose_block(find_blocks(report.snapshots))
    if chosen is not None:
        return chosen.name
    kinds = {name: _kind(name, sites) for name, sites in blocks.items() if name != ROOT or len(blocks) == 1}
    counts = Counter(kinds.values())
    return max(kinds, key=lambda name: counts[kinds[name]], default=None)


def _kind(name: str, sites: Sequence[ExplainedSite]) -> tuple[tuple[str, ...], ...]:
    """What two blocks that are alike have the same."""
    return tuple((relative(s.fqn, name), s.role, s.outcome, shape_of(s), s.kernel or "") for s in sites)


def _row(site: ExplainedSite) -> Row:
    return Row(
        path=site.fqn or "(root)",
        role=site.role,
        outcome=site.outcome,
        done=site.done or "",
        shape=shape_of(site).replace("x", " × "),
        kernel=site.kernel or "",
        flops=count_of(site.flops),
        expected=expected(site),
        weight=f"{size(site.bytes_full)} → {size(site.resident_packed)}" if site.resident_packed else "",
        reason=why(site),
    )


def _graphs(report: ExplainReport) -> list[BlockGraphs]:
    blocks = find_blocks(report.snapshots)
    chosen = choose_block(blocks)
    return [
        BlockGraphs(
            block=block,
            before=_picture(block, 0),
            after=_picture(block, -1),
            last=block.stages[-1].after,
            shown=block is chosen,
            ops=ops_in_words(node.target for node in block.stages[-1].nodes),
        )
        for block in blocks
    ]


def _picture(block: Block, stage: int) -> str:
    graph = flow_graph(block, block.stages[stage])
    if not graph.nodes or len(graph.nodes) > _MOST_BOXES:
        return ""
    return to_svg(graph)
