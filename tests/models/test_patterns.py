"""What the pattern passes find in every model, as a function of its layers: no name decides, no site is missed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

from tests.models.tiny_dits import TINY_DITS, cast
from viditq_fx.graph_edit import copy_graph_module
from viditq_fx.passes.annotate_sites import WIDE_KEY
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.pipeline import PassPipeline, default_passes
from viditq_fx.scheme import QuantScheme

# Layers -> sites whose input's quantize took in a norm or an activation; attention calls by form; wide GEMMs.
FOUND = {
    "dit": lambda n: {"attention: self": n, "gelu_tanh": n, "layer_norm+modulate": 4 * n, "wide": n},
    "pixart_sigma": lambda n: {
        "attention: cross, additive mask": n,
        "attention: self": n,
        "gelu_tanh": n,
        "layer_norm+modulate": 4 * n,
        "wide": 2 * n,
    },
    "latte": lambda n: {
        "attention: cross": n,
        "attention: self": 2 * n,
        "gelu_tanh": 2 * n,
        "layer_norm+modulate": 8 * n,
        "wide": 3 * n,
    },
    "hunyuandit": lambda n: {
        "attention: cross, qk layer_norm, RoPE": 2 * n,
        "attention: self, qk layer_norm, RoPE": 2 * n,
        "gelu_tanh": 2 * n,
        "layer_norm": 5 * n - 1,
        "layer_norm+shift": 6 * n,
        "wide": 4 * n,
    },
    "sd3": lambda n: {
        "attention: joint": n,
        "gelu_tanh": 2 * n - 1,
        "layer_norm+modulate": 8 * n - 1,
        "wide": 2 * n,
    },
    "qwenimage": lambda n: {
        "attention: joint, qk rms_norm, RoPE, bool mask": n,
        "gelu_tanh": 2 * n - 1,
        "layer_norm+modulate": 8 * n - 1,
        "wide": 2 * n,
    },
    "cogvideox": lambda n: {
        "attention: self, qk layer_norm, RoPE": n,
        "gelu_tanh": n,
        "layer_norm+modulate": 4 * n,
        "wide": n,
    },
    "mochi": lambda n: {
        "attention: cross, bool mask": 1,
        "attention: joint, qk rms_norm, RoPE": 2 * n,
        "rms_norm+modulate": 8 * n - 1,
        "silu*gate": 2 * n - 1,
        "wide": 2 * n,
    },
    "hunyuanvideo": lambda n: {
        "attention: joint, qk rms_norm, RoPE, bool mask": n,
        "attention: self, bool mask": 1,
        "attention: self, qk rms_norm, RoPE, bool mask": n,
        "gelu_tanh": 2 * n,
        "layer_norm": 4,
        "layer_norm+modulate": 12 * n,
        "silu": 1,
        "wide": 3 * n + 1,
    },
    "flux_dev": lambda n: {
        "attention: joint, qk rms_norm, RoPE": n,
        "attention: self, qk rms_norm, RoPE": n,
        "gelu_tanh": 2 * n,
        "layer_norm+modulate": 12 * n,
        "wide": 3 * n,
    },
    "wan": lambda n: {
        "attention: cross, qk rms_norm": n,
        "attention: self, qk rms_norm, RoPE": n,
        "gelu_tanh": n,
        "layer_norm": n,
        "layer_norm+modulate": 4 * n,
        "wide": 2 * n,
    },
    "ltx": lambda n: {
        "attention: cross, qk rms_norm, additive mask": n,
        "attention: self, qk rms_norm, RoPE": n,
        "gelu_tanh": n,
        "rms_norm+modulate": 4 * n,
        "wide": 2 * n,
    },
    "cosmos": lambda n: {
        "attention: cross, qk rms_norm, additive mask": n,
        "attention: self, qk rms_norm, RoPE": n,
        "gelu": n,
        "layer_norm+modulate": 5 * n,
        "wide": 2 * n,
    },
    "sana": lambda n: {
        "attention: cross, additive mask": n,
        "layer_norm+modulate": 4 * n,
        "rms_norm": 2 * n,
        "silu*gate": n,
        "wide": 2 * n,
    },
    "lumina2": lambda n: {
        "attention: self, qk rms_norm, RoPE": 1,
        "attention: self, qk rms_norm, RoPE, bool mask": n + 1,
        "rms_norm": 6,
        "rms_norm+modulate": 5 * n + 5,
        "silu*gate": n + 2,
        "wide": 2 * n + 4,
    },
    "zimage": lambda n: {
        "attention: self, qk rms_norm, RoPE": n + 2,
        "rms_norm": 5,
        "rms_norm+modulate": 5 * n + 5,
        "silu*gate": n + 2,
        "wide": 2 * n + 4,
    },
    "stable_audio": lambda n: {
        "attention: cross": n,
        "attention: self, RoPE": n,
        "layer_norm": 5 * n,
        "silu*gate": n,
        "wide": 2 * n,
    },
}
HALF = ("cogvideox", "flux_dev", "wan", "ltx", "zimage", "qwenimage", "sana")
"""Casts stand between the steps of half-precision models: one of each family of spellings."""


def found(name: str, layers: int, dtype: torch.dtype) -> Counter[str]:
    """Count what the default pipeline finds in the graphs of one call."""
    dit = TINY_DITS[name]
    model, kwargs, counts = dit.build(layers), dit.make_inputs(), Counter()
    if dtype != torch.float32:
        kwargs = cast(model, kwargs, dtype)
    if name == "zimage":  # builds its rotary tables at the first call, in a way that Dynamo cannot trace
        dit.run(model, kwargs)

    def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graph = copy_graph_module(gm)
        ctx = PassContext(scheme=QuantScheme.parse("w8a8"))
        PassPipeline(passes=default_passes()).run(graph, ctx)
        counts.update(site.prologue for site in ctx.report.sites if site.done and site.prologue)
        counts.update(f"attention: {site.prologue}" for site in ctx.report.attention if site.prologue)
        wide = (n for n in graph.graph.nodes if n.target is torch.functional.split and WIDE_KEY in n.meta)
        counts.update("wide" for _ in wide)
        return gm.forward

    dit.run(torch.compile(model, backend=capture, fullgraph=name != "lumina2", dynamic=False), kwargs)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", FOUND)
def test_counts_are_a_function_of_layers(name, layers):
    assert found(name, layers, torch.float32) == Counter(FOUND[name](layers))


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_the_same_in_half_precision(name):
    assert found(name, 1, torch.bfloat16) == Counter(FOUND[name](1))
