"""Compiled graphs of one model that differ in their bits: each call runs the one of its timestep's range.

ViDiT-Q, section 4.3, gives ranges of the denoising steps bits of their own. The graphs are all made before the first
call and are chosen outside of them, so no step recompiles; a call waits for the device once, for one number. What is
packed of a weight is kept once (ops/packed_weights.py): ranges in which a site has one scheme share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.weak import WeakTensorKeyDictionary

from viditq_fx.report import RangesReport
from viditq_fx.runtime import CompiledGraph
from viditq_fx.timestep import as_fp32, range_on_host


class RangeGraph:
    """Called by Dynamo with a graph's own arguments; runs it at the schemes of the call's range."""

    def __init__(
        self,
        *,
        graphs: Sequence[CompiledGraph],
        graph_of: Sequence[int],
        edges: Sequence[float],
        timestep: int,
        release: bool,
    ) -> None:
        """graph_of: for each range, which of the graphs. timestep: which argument. release: as option "weights"."""
        self._graphs, self._graph_of = tuple(graphs), tuple(graph_of)
        self._edges, self._timestep = as_fp32(edges), timestep
        self._release = release
        self._packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for graph in self._graphs:
            others = [other.passed_through for other in self._graphs if other is not graph]
            graph.keep_sources(frozenset().union(*others))

    def __call__(self, *args: Any) -> Any:
        """Arguments and result are those of the graph that Dynamo captured."""
        self._pack(args)
        index = range_on_host(args[self._timestep], self._edges)
        return self._graphs[self._graph_of[index]](*args)

    def _pack(self, args: Sequence[Any]) -> None:
        """Pack for all ranges at once: no step later on is slowed by it, and a released weight cannot be packed again.

        Weights that were written since are packed by the graph that needs them, unless they will be released.
        """
        first = next((graph.weight_positions[0] for graph in self._graphs if graph.weight_positions), None)
        if first is None or (args[first] in self._packed and not self._release):
            return
        for graph in self._graphs:
            graph.pack(args)
        self._packed[args[first]] = True


def ranges_report(
    edges: tuple[float, ...],
    graph_of: Sequence[int],
    graphs: Sequence[CompiledGraph],
    example_inputs: Sequence[Any],
) -> RangesReport:
    """What all graphs of a recipe hold.

    graph_of: which of them each range runs. example_inputs: arguments of the graph that Dynamo captured.
    """
    forms = set().union(*(graph.packed_forms() for graph in graphs))
    shapes = {
        (indices, form): [example_inputs[index].flatten(1).shape for index in indices]
        for indices, form in forms
    }
    nbytes = [
        form.nbytes(sum(int(shape[0]) for shape in found), int(found[0][1]))
        for (_, form), found in shapes.items()
    ]
    bits = [graph.report.average_weight_bits() for graph in graphs]
    return RangesReport(
        edges=edges,
        graphs=tuple(graph_of),
        weight_bits=tuple(bits[number] for number in graph_of),
        bytes_packed=sum(nbytes),
    )
