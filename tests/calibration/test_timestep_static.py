"""Scales by timestep over a whole sampling: one compilation, nothing waits for the device, each step reads its own."""

import dataclasses

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

import viditq_fx as vq
from tests.small_models import relative_error, tiny_dit, tiny_inputs
from viditq_fx import ops
from viditq_fx.calibration.timesteps import range_of
from viditq_fx.graph_edit import copy_graph_module
from viditq_fx.lowering import select
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.runtime import CompiledGraph

STEPS = [1000.0 - 50 * step for step in range(20)]
"""A sampling, falling; rising is the same backwards, at times in between that calibration never saw."""
RUNS = {"falling": STEPS, "rising": [t + 11 for t in reversed(STEPS)]}
SITES = ("q", "k", "v", "out", "up", "down")
"""Of a block, in order: q, k and v share one look-up and one quantize."""
SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "allclose", "unique")
"""Ops whose result has a value or a size that the host has to know."""


class NoSync(TorchDispatchMode):
    """Fails at the first op that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in SYNCS or name.startswith("unique"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class Scales(fx.Interpreter):
    """Runs a graph and keeps each (table, scale) that was chosen from it."""

    def __init__(self, gm):
        super().__init__(gm)
        self.chosen = []

    def run_node(self, n):
        result = super().run_node(n)
        if n.target is torch.index_select:
            self.chosen.append((self.fetch_args_kwargs_from_env(n)[0][0], result))
        return result


@pytest.fixture(scope="module")
def sampled():
    """(model, its input, recipe by a falling sampling)."""
    model, (x, _) = tiny_dit(layers=1), tiny_inputs()
    recipe = vq.calibrate(
        model, lambda: [model(x, at(t)) for t in STEPS], scheme="w8a8-timestep", balance="off", rotation="off"
    )
    assert len(recipe.edges) == 19
    for name in SITES:  # what a step reads can be told from what another does
        assert len(set(recipe.sites[f"blocks.0.{name}"].input_scale.tolist())) == 20
    return model, x, recipe


def at(t):
    """The timestep of a batch."""
    return torch.full((2,), t)


def test_the_mode_has_teeth():
    for sync in (lambda x: float(x), lambda x: bool(x > 0), lambda x: x.nonzero()):
        with pytest.raises(AssertionError, match="waits for the device"), NoSync():
            sync(torch.ones(()))


@pytest.mark.slow
@torch.no_grad()
def test_a_sampling_compiles_once_waits_for_nothing_and_reads_its_tables(sampled, monkeypatch):
    model, x, recipe = sampled
    graphs, chosen, reference, packed = [], [], [], []
    compile_with_kernels = select.compile_with_kernels

    def watched(gm, *args, **kwargs):
        ours = copy_graph_module(gm)
        compiled = compile_with_kernels(gm, *args, **kwargs)
        graphs.extend((ours, gm))  # after our passes, and as handed to Inductor

        def run(*inputs):
            interpreter = Scales(ours)
            reference.append(interpreter.run(*inputs)[0])
            chosen.append(interpreter.chosen)
            return compiled.run(*inputs)

        return dataclasses.replace(compiled, run=run)

    call = CompiledGraph.__call__

    def watched_call(self, *args):
        if not packed:  # the first call packs the weights, once
            packed.append(self)
            return call(self, *args)
        with NoSync():  # from here on: a mode around Dynamo would be a recompile by itself
            return call(self, *args)

    monkeypatch.setattr(select, "compile_with_kernels", watched)
    monkeypatch.setattr(CompiledGraph, "__call__", watched_call)
    torch._dynamo.reset()
    run = torch.compile(model, backend="viditq", options={"recipe": recipe, "strict": True}, fullgraph=True)
    run(x, at(STEPS[0]))
    plans = [recipe.sites[f"blocks.0.{name}"].input_scale for name in SITES]
    tables = list({tuple(table.tolist()): table for table in plans}.values())  # q, k and v read one
    assert len(tables) < len(plans)
    for times in RUNS.values():
        with torch.compiler.set_stance("fail_on_recompile"):
            for t in times:
                chosen.clear()
                got = run(x, at(t))
                assert reference
                assert relative_error(got, reference[-1]) < 1e-3  # a few integers round the other way
                (scales,) = chosen
                assert [table.tolist() for table, _ in scales] == [table.tolist() for table in tables]
                expected = [[float(table[range_of(recipe.edges, t)])] for table in tables]
                assert [scale.tolist() for _, scale in scales] == expected
    assert len(packed) == 1
    assert len(graphs) == 2
    shared = [n for n in graphs[0].graph.nodes if n.target is ops.QUANTIZE_STATIC.overload]
    assert len(shared) == len(tables)
    for gm in graphs:
        names = {str(node.target).rpartition("::")[2] for node in gm.graph.nodes if node.op != "placeholder"}
        assert not {n for n in names if any(s == n.split(".")[0] for s in SYNCS) or n in ("cpu", "tolist")}


@torch.no_grad()
def test_layers_read_their_tables_and_wait_for_nothing(sampled, monkeypatch):
    _, x, recipe = sampled
    layers = tiny_dit(layers=1)
    vq.quantize_(layers, (x, at(500.0)), recipe=recipe)
    names = {module: name for name, module in layers.named_modules() if isinstance(module, QuantLinear)}
    read, scale_now = [], QuantLinear._scale_now

    def noted(self, x):
        read.append((names[self], scale_now(self, x)))
        return read[-1][1]

    monkeypatch.setattr(QuantLinear, "_scale_now", noted)
    for times in RUNS.values():
        for t in times:
            read.clear()
            with NoSync():
                layers(x, at(t))
            assert {name for name, _ in read} == set(recipe.sites)
            for name, scale in read:
                table = recipe.sites[name].input_scale
                assert scale.tolist() == [float(table[range_of(recipe.edges, t)])]
