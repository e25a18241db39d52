"""The timestep's range: by thread, device and file, and which argument of a call, or of a graph, tells it."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import viditq_fx as vq
from tests.small_models import QUANTIZED_PER_LAYER, relative_error, tiny_dit, tiny_inputs
from tests.test_schemes import compiled, recipe
from viditq_fx.calibration.timesteps import TimestepArgument
from viditq_fx.errors import RecipeError
from viditq_fx.passes.dataflow import is_argument, is_constant_argument, source_name
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.timestep import Clock, timestep_name, timestep_value


@pytest.mark.parametrize("compiled_layers", [False, True])
def test_threads_that_sample_with_one_model_have_ranges_of_their_own(compiled_layers):
    model, (x, _) = tiny_dit(1), tiny_inputs()
    late, early = torch.full((2,), 900.0), torch.full((2,), 10.0)
    vq.quantize_(model, args=(x, late), recipe=recipe("w8a8-timestep", input_scale=torch.tensor([0.02, 0.3])))
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    for layer in layers if compiled_layers else ():
        layer.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        want = model(x, late), model(x, early)
    other = []

    def in_between(*_):
        def sample():
            with torch.no_grad():
                other.append(model(x, early))

        if not other:
            other.append(None)
            thread = threading.Thread(target=sample)
            thread.start()
            thread.join()

    layers[0].register_forward_pre_hook(torch.compiler.disable(in_between) if compiled_layers else in_between)
    model.blocks[0].register_forward_pre_hook(in_between)
    with torch.no_grad():
        assert torch.equal(model(x, late), want[0])
    assert torch.equal(other[1], want[1])


def test_edges_go_with_the_layers_and_never_to_meta():
    with FakeTensorMode():
        clock, (cpu, cuda) = Clock([0.5], torch.device("cpu")), (torch.device("cpu"), torch.device("cuda", 0))
        clock.set(torch.ones(2, device=cuda))
        assert clock.read(cuda).device == cuda  # computed where the timestep is: nothing comes to the host
        clock.follow(cuda)
        clock.follow(torch.device("meta"))
        assert clock.edges.device == cuda
        clock.set(0.7)
        assert clock.read(cuda).device == cuda
        clock.set(torch.ones(2))
        assert clock.read(cuda).device == cuda
        assert clock.read(cpu).device == cpu


def test_moving_a_quantized_model_moves_its_edges():
    model, inputs = tiny_dit(1), tiny_inputs()
    vq.quantize_(model, args=inputs, recipe=recipe("w8a8-timestep", input_scale=torch.tensor([0.02, 0.3])))
    followed = []
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.clock.follow = followed.append
    model.to("meta")
    assert followed == [torch.device("meta")] * QUANTIZED_PER_LAYER


def test_scales_of_other_ranges_of_the_timestep_are_not_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    models, inputs = [], tiny_inputs()
    for edges, scales in (((500.0,), [0.02, 0.3]), ((500.0,), [0.1, 0.2]), ((50.0,), [0.05, 0.06])):
        model = tiny_dit(1)
        asked = recipe("w8a8-timestep", input_scale=torch.tensor(scales))
        vq.quantize_(model, args=inputs, recipe=replace(asked, edges=edges))
        models.append(model)
    saved, same, other = models
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    same.load_state_dict(state)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        RuntimeError, match=r"input_edges: .* between \[500.0\], this model's .* \[50.0\]; quantize it by"
    ):
        other.load_state_dict(state)
    assert all(
        torch.equal(value, before[key]) for key, value in other.state_dict().items() if "input_scale" in key
    )
    with torch.no_grad():
        assert torch.equal(same(*inputs), saved(*inputs))
    other.load_state_dict({k: v for k, v in before.items() if not k.endswith("input_edges")})  # as once saved


class ByName(nn.Module):
    """Takes its timestep as one of any arguments by name."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_dit(1)

    def forward(self, x, **kw):
        return self.inner(x, kw["sigma"])


def test_what_calibrate_reads_quantize_reads_too():
    model, (x, _) = ByName(), tiny_inputs()
    calls = [((x,), {"sigma": torch.full((2,), t)}) for t in (10.0, 900.0)]
    found = vq.calibrate(
        model, calls, scheme="w8a8-timestep", timestep="sigma", balance="off", rotation="off", keep="*.q"
    )
    assert found.edges == (455.0,)
    layers = copy.deepcopy(model)
    vq.quantize_(layers, args=(x,), kwargs={"sigma": torch.full((2,), 900.0)}, recipe=found)
    with torch.no_grad():
        for _, kwargs in calls:
            assert relative_error(layers(x, **kwargs), model(x, **kwargs)) < 0.03


def test_one_reader_of_the_timestep_for_positions_and_names():
    def of(forward):
        module = nn.Module()
        module.forward = forward
        return module

    cases = [
        (of(lambda x, timestep: x), "timestep", (1, 2), {}, 2),
        (of(lambda x, timestep: x), "timestep", (1,), {"timestep": 3}, 3),
        (of(lambda x, timestep=None: x), "timestep", (1,), {}, None),
        (of(lambda x, *rest, timestep=None: x), "timestep", (1, 9, 9), {}, None),
        (of(lambda x, **kw: x), "sigma", (1,), {"sigma": 4}, 4),
        (of(lambda x, **kw: x), "sigma", (1,), {}, None),
    ]
    for model, name, args, kwargs, want in cases:
        assert timestep_name(model, name) == name
        assert timestep_value(model, name, args, kwargs) == want
        assert TimestepArgument.of(model, name).read(args, kwargs) == want
    with pytest.raises(RecipeError, match=r"'sigma' is no argument of Module.forward; it takes x, timestep"):
        timestep_name(cases[0][0], "sigma")


def test_the_graph_tells_an_argument_from_an_entry_of_a_dict():
    seen = {}

    def backend(gm, inputs):
        for node in gm.graph.find_nodes(op="placeholder"):
            seen[source_name(node)] = is_argument(node, "timestep")
        seen["constant"] = is_constant_argument("timestep")
        return gm.forward

    t = torch.ones(1)

    def by_name(x, cond, **kwargs):
        return x + cond["timestep"] + kwargs["timestep"]

    def deeply(x, cond):
        return x + cond["more"]["timestep"]

    torch.compile(deeply, backend=backend, fullgraph=True)(t, {"more": {"timestep": t + 1}})
    assert not any(seen.values())
    seen.clear()
    torch.compile(by_name, backend=backend, fullgraph=True)(t, {"timestep": t + 1}, timestep=t + 2)
    assert seen == {
        "L['x']": False,
        "L['cond']['timestep']": False,
        "L['kwargs']['timestep']": True,
        "constant": False,
    }
    seen.clear()
    torch.compile(lambda x, timestep: x + timestep, backend=backend, fullgraph=True)(t, t + 1)
    assert seen == {"L['x']": False, "L['timestep']": True, "constant": False}
    seen.clear()
    torch.compile(lambda x, timestep: x + timestep, backend=backend, fullgraph=True)(t, 7)
    assert seen == {"L['x']": False, "constant": True}


def test_a_timestep_that_is_a_python_number_is_told_from_a_block():
    class Numbered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_dit(1)

        def forward(self, x, timestep):
            return self.inner(x, torch.full((2,), timestep))

    asked = recipe("w8a8-timestep", input_scale=torch.tensor([0.02, 0.3]))
    sites = {path.replace("blocks", "inner.blocks"): plan for path, plan in asked.sites.items()}
    with torch.no_grad(), pytest.raises(Exception, match=r"a Python number: pass a tensor") as caught:
        compiled(Numbered(), recipe=replace(asked, sites=sites))(tiny_inputs()[0], 500.0)
    assert "not its blocks" not in str(caught.value)
