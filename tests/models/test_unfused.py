"""No quantize with a norm or an activation just above it is left without a word, in any model at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx

from benchmarks.more_dits import MORE_DITS
from tests.models.tiny_dits import TINY_DITS
from viditq_fx import ops
from viditq_fx.graph_edit import copy_graph_module
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.effects import op_name
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.report import SiteReport
from viditq_fx.scheme import QuantScheme

MODELS = {**TINY_DITS, **MORE_DITS}
MADE = {"layer_norm", "rms_norm", "rsqrt", "gelu", "silu", "relu"}
MADE_OF_FIRST = {"to", "type_as", "float", "half", "bfloat16", "contiguous", "view", "reshape", "flatten"} | {
    "unflatten",
    "permute",
    "transpose",
    "squeeze",
    "unsqueeze",
    "getitem",
    "chunk",
    "split",
}
MADE_OF_ALL = {"cat", "add", "mul", "sub", "truediv", "tanh"}
HOPS = 8
FEWEST = {"consisid": 2}
"""Layers, where a model needs more than one."""
JOINED = ("flux_dev", "chroma", "flux2", "bria", "hunyuanvideo", "hunyuanimage")
"""Models with a parallel block: the activation is joined with attention's channels."""


def above(node: fx.Node, hops: int = HOPS) -> Iterator[str]:
    """Norms and activations within a few ops. Apart from the pass on purpose: it does not know its walk."""
    if hops and op_name(node) in MADE_OF_FIRST | MADE_OF_ALL:
        sources = node.args[:1] if op_name(node) in MADE_OF_FIRST else node.all_input_nodes
        for source in sources:
            if isinstance(source, fx.Node):
                yield from above(source, hops - 1)
    elif op_name(node) in MADE and node.op != "placeholder":
        yield op_name(node)


def behind(pair: fx.Node, sites: dict[str, SiteReport]) -> list[SiteReport]:
    """The linears that read a quantize, directly or behind a cat or a move of its rows."""
    found, ahead = [], list(pair.users)
    while ahead:
        node = ahead.pop()
        if node.name in sites:
            found.append(sites[node.name])
        else:
            ahead += node.users
    return found


def quantizes(name: str) -> list[tuple[list[str], list[SiteReport]]]:
    """What stands above each quantize that the passes left, and the linears behind it."""
    model, kwargs = MODELS[name].build(FEWEST.get(name, 1)), MODELS[name].make_inputs()
    if name == "zimage":  # builds its rotary tables at the first call, in a way that Dynamo cannot trace
        MODELS[name].run(model, kwargs)
    left: list[tuple[list[str], list[SiteReport]]] = []

    def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graph, ctx = copy_graph_module(gm), PassContext(scheme=QuantScheme.parse("w8a8"))
        PassPipeline(passes=default_passes()).run(graph, ctx)
        for node in graph.graph.nodes:
            if node.target is ops.QUANTIZE_PER_TOKEN.overload:
                left.append((list(above(node.args[0])), behind(node, ctx.sites)))
        return gm.forward

    MODELS[name].run(torch.compile(model, backend=capture, dynamic=False), kwargs)
    return left


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_no_silent_miss(name):
    left = quantizes(name)
    for made, sites in left:
        assert sites
        assert not made or all(site.unfused for site in sites), (made, [site.fqn for site in sites])
    said = [site.unfused for _, sites in left for site in sites if site.unfused]
    if name in JOINED:
        assert any("joined with other channels" in reason for reason in said)
