"""What the passes make of every diffusion transformer at hand, as a page: writes docs/coverage.md.

    PYTHONPATH=.:tests python benchmarks/coverage_page.py [--only wan,flux2] [--layers 2] [--output docs/coverage.md]

Passes only: Dynamo traces each tiny model, the default pipeline runs over the graphs, and nothing is
lowered or compiled. A class that cannot be built or traced has a row with its error.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import fx

from benchmarks import kernels_per_block
from benchmarks.more_dits import MORE_DITS
from tests.models.tiny_dits import TINY_DITS, TinyDit
from viditq_fx.graph_edit import copy_graph_module
from viditq_fx.passes.annotate_sites import WIDE_KEY, fqn_of_node
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.report import SiteReport
from viditq_fx.scheme import QuantScheme

SIZE = 4
"""The largest resolution that the tiny models draw: FLOPs should be those of tokens, not of samples."""
LINEAR_TARGET, ATTENTION_TARGET = 0.95, 0.90
WORTH_SAYING = 0.01
"""A reason that costs a smaller share of the FLOPs is left to the section of its class."""
NOT_QUANTIZED = {
    "a product of two activations, or attention in a call of its own: no softmax attention that we know": (
        "no scaled_dot_product_attention"
    )
}
_SOFTMAX = frozenset({"softmax", "_softmax", "multi_head_attention_forward", "flex_attention"})
_LONGEST_ERROR = 300

KERNELS = """## Kernels launched per block

Inductor's CUDA code for blocks of published sizes in bf16, written with no GPU (`benchmarks/kernels_per_block.py`);
nothing runs, so this says nothing of time. Every launch of one call is counted: *GEMM* (cuBLAS or a Triton template),
*attention* (a fused kernel of ATen; without a device torch spells attention as two batched products and a softmax,
before and after alike, which count as GEMM and generated) and Inductor's *generated* kernels. Projections of one input
are one GEMM, and most quantize steps are part of the kernel of the norm or activation in front.
"""

INTRO = f"""# What the passes find in each model

Written by `PYTHONPATH=.:tests python benchmarks/coverage_page.py`; do not edit. Passes only, on CPU, scheme W8A8,
default policy, torch {{torch}}, diffusers {{diffusers}}, float32, {{layers}} blocks of each kind.

**The models are tiny** (width 128 or so) with random weights: the stems, heads and text projections that
stay in full precision take a larger share of their FLOPs than of a real model's, so the shares of FLOPs at
real sizes are higher wherever nothing else is left out. The counts are those of {{layers}} blocks.

* *graphs*: how many graphs Dynamo made; "broken" where it refuses the model as one graph. A block that
  becomes a graph of its own is traced once for all blocks that are alike, and counts once.
* *linears*, and of them *quantized*, *kept* by the policy (conditioning, stem, head, few rows or channels) and
  *refused* (the policy asked, something stood in the way).
* *linear FLOPs*: share of the multiply-adds of all linears (1x1 convolutions included) that run in integers.
* *attention*: recognised calls of all softmax attention, and their share of its FLOPs. One spelled as
  products and a softmax counts once for each product. A product of two activations without a softmax
  (linear attention) is no softmax attention: it is listed with the reasons.
* *fused*: linears whose quantize took in the norm or activation in front. *wide*: GEMMs that run several linears.

A **bold** share is under its target ({LINEAR_TARGET:.0%} of linear FLOPs, {ATTENTION_TARGET:.0%} of attention by
calls and by FLOPs).
"""


@dataclass(kw_only=True)
class Coverage:
    """What happened to one model, over all its graphs."""

    name: str
    class_name: str
    graphs: int = 0
    broken: str | None = None
    """Why Dynamo does not trace the model as one graph."""
    error: str | None = None
    sites: list[SiteReport] = field(default_factory=list)
    attention: list[SiteReport] = field(default_factory=list)
    products: list[SiteReport] = field(default_factory=list)
    """Products of activations outside of softmax attention."""
    rejects: list[str] = field(default_factory=list)
    wide: int = 0

    @property
    def linear_share(self) -> float:
        """Share of linear FLOPs that is quantized; of 1 when there are none."""
        return share(self.sites, [site for site in self.sites if site.done])

    @property
    def recognised(self) -> list[SiteReport]:
        return [call for call in self.attention if call.prologue]

    @property
    def attention_share(self) -> float:
        """Share of the FLOPs of softmax attention that is recognised."""
        return share(self.attention, self.recognised)

    @property
    def attention_met(self) -> bool:
        """Whether enough of softmax attention is recognised, by calls and by FLOPs."""
        calls = len(self.recognised) / len(self.attention) if self.attention else 1.0
        return min(calls, self.attention_share) >= ATTENTION_TARGET

    def add(self, gm: fx.GraphModule) -> None:
        """Run the passes over one graph, in place, and take in what they report."""
        ctx = PassContext(scheme=QuantScheme.parse("w8a8"))
        softmax = {fqn_of_node(node) for node in gm.graph.nodes if op_name(node) in _SOFTMAX}
        PassPipeline(passes=default_passes()).run(gm, ctx)
        self.graphs += 1
        self.sites += ctx.report.sites
        for call in ctx.report.attention:
            known = call.prologue or call.fqn in softmax
            (self.attention if known else self.products).append(call)
        self.rejects += ctx.report.rejects
        wide = (n for n in gm.graph.nodes if n.target is torch.functional.split and WIDE_KEY in n.meta)
        self.wide += sum(1 for _ in wide)


def flops(sites: Iterable[SiteReport]) -> int:
    return sum(site.flops for site in sites)


def share(whole: list[SiteReport], part: list[SiteReport]) -> float:
    return flops(part) / flops(whole) if flops(whole) else 1.0


def outcome(site: SiteReport) -> str:
    """What became of a site: "quantized", "kept" or "refused"."""
    if site.done is not None:
        return "quantized"
    return "kept" if site.planned is None else "refused"


def cover(dit: TinyDit, layers: int) -> Coverage:
    """Trace one model, as one graph where Dynamo can, and run the passes on what comes."""
    row = Coverage(name=dit.name, class_name=dit.class_name)
    try:
        model, kwargs = dit.build(layers), dit.make_inputs(size=SIZE)
        dit.run(model, kwargs)  # Z-Image builds tables at its first call, in a way that Dynamo cannot trace
    except Exception as error:  # noqa: BLE001 - whatever diffusers raises is the row's content
        row.error = f"cannot be built: {first_line(error)}"
        return row
    whole = trace(dit, row, model, kwargs, fullgraph=True)
    if whole.error is None:
        return whole
    parts = trace(dit, row, model, kwargs, fullgraph=False)
    parts.broken = whole.error
    return parts


def trace(dit: TinyDit, row: Coverage, model: Any, kwargs: dict[str, Any], *, fullgraph: bool) -> Coverage:
    """One attempt at tracing: a fresh row."""
    result = Coverage(name=row.name, class_name=row.class_name)
    failures: list[Exception] = []

    def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        try:
            result.add(copy_graph_module(gm))
        except Exception as error:  # noqa: BLE001 - a pass that raises is the row's content
            failures.append(error)
        return gm.forward

    torch._dynamo.reset()
    try:
        dit.run(torch.compile(model, backend=capture, fullgraph=fullgraph, dynamic=False), kwargs)
    except Exception as error:  # noqa: BLE001 - whatever Dynamo raises is the row's content
        failures.append(error)
    if failures:
        result.error = first_line(failures[0])
    return result


def first_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    return f"{type(error).__name__}: {text[:_LONGEST_ERROR]}"


def table(rows: list[Coverage]) -> list[str]:
    lines = [
        "| class | graphs | linears | quantized | kept | refused | linear FLOPs | attention | fused | wide |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return lines + [table_row(row) for row in rows]


def table_row(row: Coverage) -> str:
    if row.error is not None:
        return f"| {row.class_name} | failed | " + " | ".join("-" * 8) + " |"
    counts = Counter(map(outcome, row.sites))
    attention = f"{len(row.recognised)} of {len(row.attention)}, {row.attention_share:.1%}"
    cells = [
        row.class_name,
        f"{row.graphs}{', broken' if row.broken else ''}",
        len(row.sites),
        *(counts[key] for key in ("quantized", "kept", "refused")),
        marked(f"{row.linear_share:.1%}", row.linear_share >= LINEAR_TARGET),
        marked(attention, row.attention_met),
        sum(bool(site.done and site.prologue) for site in row.sites),
        row.wide,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def marked(text: str, met: bool) -> str:
    return text if met else f"**{text}**"


def reasons(entries: Iterable[SiteReport], whole: int, least: float = 0.0) -> list[str]:
    """One line for each reason that costs `least` of the FLOPs: how many entries, what share, which modules."""
    groups: dict[str, list[SiteReport]] = defaultdict(list)
    for entry in entries:
        reason = re.sub(r"^M=\S+ rows is", "M is", entry.reason or "no reason given")
        groups[f"{entry.role}: {NOT_QUANTIZED.get(reason, reason)}"].append(entry)
    ordered = sorted(groups.items(), key=lambda item: -flops(item[1]))
    return [
        f"  * {len(found)} × {reason} ({flops(found) / whole if whole else 0:.1%} of FLOPs; {paths(found)})"
        for reason, found in ordered
        if flops(found) >= least * whole
    ]


def paths(entries: list[SiteReport]) -> str:
    """Module paths, block numbers left out."""
    names = sorted({re.sub(r"\.\d+\.", ".*.", entry.fqn) or "(root)" for entry in entries})
    return ", ".join(f"`{name}`" for name in names[:4]) + (", ..." if len(names) > 4 else "")


def section(row: Coverage) -> list[str]:
    """What stands behind one row of the table."""
    lines = [f"### {row.class_name}", ""]
    if row.error is not None:
        return [*lines, f"Failed: `{row.error}`", ""]
    if row.broken is not None:
        lines += [f"Not one graph: `{row.broken}`", ""]
    forms = Counter(call.prologue for call in row.attention if call.prologue)
    fused = Counter(site.prologue for site in row.sites if site.done and site.prologue)
    for title, counts in (("Attention", forms), ("Fused with the quantize", fused)):
        if counts:
            lines.append(f"* {title}: {', '.join(f'{n} × {key}' for key, n in sorted(counts.items()))}.")
    kept = [site for site in row.sites if not site.done]
    unknown = [call for call in row.attention if not call.prologue]
    for title, entries, whole in (
        ("Linears not quantized", kept, flops(row.sites)),
        ("Softmax attention not recognised", unknown, flops(row.attention)),
        ("Other products of activations", row.products, flops([*row.attention, *row.products])),
    ):
        lines += [f"* {title}:", *reasons(entries, whole)] if entries else []
    lines += [f"* {count} × {reject}" for reject, count in Counter(row.rejects).items()]
    return [*lines, ""]


def under_target(rows: list[Coverage]) -> list[str]:
    """The rows that miss a target, each with the reasons that cost it most."""
    lines = []
    for row in rows:
        kept = [site for site in row.sites if not site.done]
        if row.error is not None:
            lines.append(f"* {row.class_name}: failed, {row.error}")
            continue
        if row.linear_share < LINEAR_TARGET:
            lines.append(f"* {row.class_name}: {row.linear_share:.1%} of linear FLOPs.")
            lines += reasons(kept, flops(row.sites), least=WORTH_SAYING)
        if not row.attention_met:
            unknown = [call for call in row.attention if not call.prologue]
            found = f"{len(row.recognised)} of {len(row.attention)} attention calls"
            lines.append(f"* {row.class_name}: {found}, {row.attention_share:.1%} of its FLOPs.")
            lines += reasons(unknown, flops(row.attention))
    return lines or ["None."]


def page(known: list[Coverage], more: list[Coverage], layers: int, kernels: list[str]) -> str:
    versions = {
        "torch": torch.__version__.split("+")[0],
        "diffusers": diffusers.__version__,
        "layers": layers,
    }
    parts = [INTRO.format(**versions)]
    parts += ["## The seventeen models of the test suite", "", *table(known), ""]
    parts += ["## Other classes", "", "The test suite does not hold these models.", "", *table(more), ""]
    parts += [KERNELS, *kernels, ""] if kernels else []
    parts += ["## Under target", "", *under_target([*known, *more]), ""]
    parts += ["## Each class", "", *(line for row in [*known, *more] for line in section(row))]
    return "\n".join(parts).rstrip() + "\n"


def write(path: Path, text: str) -> None:
    """Replace the file in one step."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names separated by commas; all by default")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "coverage.md")
    args = parser.parse_args()
    wanted = set(filter(None, args.only.split(",")))
    if unknown := wanted - {*TINY_DITS, *MORE_DITS}:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    rows: list[list[Coverage]] = []
    for group in (TINY_DITS, MORE_DITS):
        rows.append([])
        for name, dit in group.items():
            if not wanted or name in wanted:
                rows[-1].append(cover(dit, args.layers))
                print(f"{name:16} {table_row(rows[-1][-1])} {rows[-1][-1].error or ''}", flush=True)
    blocks = kernels_per_block.BLOCKS.items() if not wanted else ()
    counts = [kernels_per_block.count(name, make) for name, make in blocks]
    write(args.output, page(*rows, args.layers, kernels_per_block.table(counts) if counts else []))
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
