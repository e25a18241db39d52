"""Every kind of scheme end to end: compiled and as modules the same numbers, on integers at every planned site."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import viditq_fx as vq
from tests.small_models import GEMMS_PER_LAYER, QUANTIZED_PER_LAYER, relative_error, tiny_dit, tiny_inputs
from viditq_fx.demo.model import load_digits_dit
from viditq_fx.errors import OptionError, RecipeError, SchemeError
from viditq_fx.ops.packed_weights import packed_bytes
from viditq_fx.quant_linear import QuantLinear
from viditq_fx.recipe import Recipe, SitePlan
from viditq_fx.runtime import executions
from viditq_fx.scheme import QuantScheme, available_schemes
from viditq_fx.timestep import Clock, timestep_name

LAYERS = {"q": 64, "k": 64, "v": 64, "out": 64, "up": 64, "down": 256}
ERRORS = {
    "w6a6": 0.03,
    "w8a8-asym": 0.01,
    "w4a8-g128-asym-rot": 0.07,
    "dvd-w4a8": 0.08,
    "dvd-w4a4": 0.1,
    "w4a4-bgr-svd16": 0.1,
}


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="viditq", options=options, fullgraph=True)


def plan(scheme, depth, seed=0, **fields):
    gen = torch.Generator().manual_seed(seed)
    return SitePlan(
        scheme=QuantScheme.parse(scheme), multiplier=torch.rand(depth, generator=gen) + 0.5, **fields
    )


def recipe(scheme, **fields):
    """One plan for each site; q, k and v share theirs, as they share their input."""
    sites = {f"blocks.0.{name}": plan(scheme, depth, depth, **fields) for name, depth in LAYERS.items()}
    return Recipe(scheme=QuantScheme.parse(scheme), sites=sites, edges=(500.0,), timestep="timestep")


READ_BACK = [
    "w4a4",
    "w8a8-static",
    "w6a8-asym-rot-timestep",
    "w4a8-g64-asym-static",
    "w4a4-g64-bgr-rot-block-svd16",
    "w4a8-position",
]


@pytest.mark.parametrize("name", [*available_schemes(), *READ_BACK])
def test_names_read_back(name):
    assert str(QuantScheme.parse(name)) == name
    assert QuantScheme.parse(name.upper()) == QuantScheme.parse(name)


@pytest.mark.parametrize(
    "name",
    [
        "w4a8-g32",
        "w8a8-g128",
        "w4a8-asym-bgr",
        "w8a8-block",
        "w5a8",
        "fp8-rot",
        "w4a8-",
        "w4a4-block-static",
        "w8a8-static-position",
        "w4a8-block-position",
        "fp8-position",
    ],
)
def test_what_is_no_scheme_says_what_is(name):
    with pytest.raises(SchemeError, match="g128"):
        QuantScheme.parse(name)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ERRORS)
def test_compiled_is_what_modules_compute(scheme):
    model, inputs = tiny_dit(1), tiny_inputs()
    with torch.no_grad(), executions() as ran:
        want, got = model(*inputs), compiled(model, scheme=scheme)(*inputs)
        report = vq.quantize_(model, args=inputs, scheme=scheme)
        eager = model(*inputs)
    sites = [site for site in ran[0].report.sites if site.done]
    assert len(sites) == QUANTIZED_PER_LAYER
    assert {s.done for s in sites} == {scheme} == {s.done for s in report.sites if s.done}
    assert {s.outcome for s in sites} == {"quantized"}
    assert 0 < relative_error(got, want) < ERRORS[scheme]
    assert relative_error(eager, got) < 1e-3  # a rotation's sums in another order move a few integers
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert sum(m.resident_bytes() for m in layers) >= sum(s.bytes_packed for s in sites) > 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w4a8-rot", "w8a8-timestep"])
def test_a_recipe_is_followed_by_both(scheme):
    model, inputs = tiny_dit(1), tiny_inputs()
    fields = {"rotation": 64} if "rot" in scheme else {"input_scale": torch.tensor([0.03, 0.05])}
    followed = recipe(scheme, **fields)
    followed.sites["blocks.0.up"] = SitePlan(scheme=QuantScheme.parse("w8a8"))
    followed.sites["blocks.0.down"] = SitePlan(scheme=None, reason="most sensitive")
    with torch.no_grad(), executions() as ran:
        want, got = model(*inputs), compiled(model, recipe=followed)(*inputs)
        vq.quantize_(model, args=inputs, recipe=followed)
        eager = model(*inputs)
    done = {site.fqn: site.done for site in ran[0].report.sites if site.planned}
    assert done == {f"blocks.0.{n}": scheme for n in ("q", "k", "v", "out")} | {"blocks.0.up": "w8a8"}
    assert "most sensitive" in ran[0].report.site("blocks.0.down").reason
    assert relative_error(got, want) < 0.05
    assert relative_error(eager, got) < 1e-3


def test_ranges_of_the_timestep_are_the_tables():
    """The range is chosen in the graph, by the largest timestep; one compilation serves all steps."""
    scales = (0.02, 0.3)
    model, (x, _) = tiny_dit(1), tiny_inputs()
    table = recipe("w8a8-timestep", input_scale=torch.tensor(scales))
    with torch.no_grad():
        run = compiled(model, recipe=table)
        for timestep, scale in ((torch.tensor([1.0, 499.0]), 0), (torch.tensor([3.0, 500.0]), 1)):
            static = recipe("w8a8-static", input_scale=torch.tensor(scales[scale]))
            layers = copy.deepcopy(model)
            vq.quantize_(layers, args=(x, timestep), recipe=static)
            assert relative_error(run(x, timestep), layers(x, timestep)) < 1e-5
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for step in range(20):
            run(x, torch.full((2,), 1000.0 - 50 * step))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_layers_learn_the_timestep_from_their_model_and_say_so_without():
    model, inputs = tiny_dit(1), tiny_inputs()
    vq.quantize_(model, args=inputs, recipe=recipe("w8a8-timestep", input_scale=torch.tensor([0.02, 0.3])))
    with torch.no_grad():
        low, high = (model(inputs[0], torch.full((2,), t)) for t in (10.0, 900.0))
        again = copy.deepcopy(model)
        assert torch.equal(again(inputs[0], torch.full((2,), 900.0)), high)
        assert not torch.equal(low, high)
    with pytest.raises(RecipeError, match="outside its model"):
        Clock([0.5], torch.device("cpu")).read(torch.device("cpu"))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: recipe("w8a8-timestep"), "takes its input's scale from calibration"),
        (lambda: recipe("w8a8-timestep", input_scale=torch.ones(3)), "3 scales for 2 ranges"),
        (lambda: recipe("w8a8-static", input_scale=torch.tensor(float("nan"))), "not positive"),
        (lambda: recipe("w4a8-rot", rotation=256), "do not divide K=64"),
        (
            lambda: Recipe(scheme=QuantScheme.parse("w8a8"), sites={"blocks.0.q": plan("w8a8", 32)}),
            "another model",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_names_the_site(broken, message):
    with torch.no_grad(), pytest.raises(Exception, match=message) as caught:
        compiled(tiny_dit(1), recipe=broken())(*tiny_inputs())
    assert "blocks.0." in str(caught.value)


def test_a_model_without_a_timestep_is_an_error_of_that_scheme_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
    assert timestep_name(model) is None
    x = torch.randn(40, 64)
    for scheme, works in (("w8a8-timestep", False), ("w8a8-static", True)):
        scales = torch.tensor([0.1, 0.1]) if "timestep" in scheme else torch.tensor(0.1)
        sites = {n: SitePlan(scheme=QuantScheme.parse(scheme), input_scale=scales) for n in "02"}
        asked = Recipe(scheme=QuantScheme.parse(scheme), sites=sites, edges=(0.5,))
        with torch.no_grad():
            if works:
                assert relative_error(compiled(model, recipe=asked)(x), model(x)) < 0.1
            else:
                with pytest.raises(Exception, match="whole model and not its blocks"):
                    compiled(model, recipe=asked)(x)


def test_options_that_contradict_each_other():
    for options, message in (
        ({"scheme": "w4a8", "recipe": recipe("w8a8")}, "give the recipe alone"),
        ({"recipe": 3}, "a Recipe or the directory"),
        ({"delta": 0.1}, "switches its bits"),
        ({"scheme": "w8a8", "low_scheme": "w4a8"}, "share no weights"),
        ({"scheme": "dvd-w4a6", "delta": -1}, "'delta'"),
        ({"scheme": "dvd-w4a6", "high_last": 2}, "'steps'"),
        ({"scheme": "dvd-w4a6", "bits_schedule": ["lower"]}, "bits_schedule"),
    ):
        with torch.no_grad(), pytest.raises(Exception, match=message):
            compiled(tiny_dit(1), **options)(*tiny_inputs())
    with pytest.raises(OptionError, match="compile"):
        vq.quantize_(tiny_dit(1), args=tiny_inputs(), scheme="dvd-w4a6")


class Executed(TorchDispatchMode):
    """Notes every product that runs: its op and the dtypes of its two factors."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(part in name for part in ("matmul", "linear_w", "mm", "attention")):
            # Of a Hadamard matrix all entries are alike, and of a weight none.
            turns = name == "mm" and args[1].abs().amax() == args[1].abs().amin()
            self.products.append(("rotation" if turns else name, *(a.dtype for a in args[:2])))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", ["dvd-w4a4", "dvd-w4a8"])
def test_the_graph_that_runs_multiplies_integers_at_every_planned_site(monkeypatch, scheme):
    """What is given to Inductor: one GEMM of 4-bit weights for each planned one, and no float GEMM but those kept."""
    graphs, executed = [], Executed()

    def run_as_it_is(self, gm, inputs):
        graphs.append(gm)

        def run(*args):
            with executed:
                return gm.forward(*args)

        return run

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", run_as_it_is)
    with torch.no_grad(), executions() as ran:
        compiled(tiny_dit(2), scheme=scheme)(*tiny_inputs())
    (gm,), sites = graphs, ran[0].report.sites
    planned = [site for site in sites if site.planned]
    gemms = [node for node in gm.graph.nodes if "matmul_s8s4" in str(node.target)]
    assert len(planned) == 2 * QUANTIZED_PER_LAYER
    assert len(gemms) == len({site.joined or site.fqn for site in planned}) == 2 * GEMMS_PER_LAYER
    for node in gemms:
        x, w, _, blocks = (a.meta["example_value"] if a is not None else None for a in node.args)
        assert (x.dtype, w.dtype, blocks.shape[-1]) == (torch.int8, torch.uint8, -(-x.shape[-1] // 128))
    floats = [node for node in gm.graph.nodes if node.target is torch.nn.functional.linear]
    assert len(floats) == len(sites) - len(planned)
    integers = [product for product in executed.products if "s8s4" in product[0]]
    assert integers == [("matmul_s8s4", torch.int8, torch.uint8)] * len(gemms), "and they were run"
    others = [name for name, *_ in executed.products if name in ("mm", "addmm", "linear", "linear_w4a8")]
    assert others == ["addmm"] * len(floats), "and no other linear was"


def test_weights_of_a_row_take_at_most_a_quarter_of_bf16_and_their_scales():
    for name in ("dvd-w4a4", "w4a8", "w4a8-g128-asym"):
        form = QuantScheme.parse(name).weight_form
        for depth in (128, 1152, 3072):
            assert form.nbytes(3072, depth) <= 0.27 * 2 * 3072 * depth


def test_the_digits_models_weights_take_at_most_27_hundredths_of_bf16(monkeypatch):
    """Bytes that are held, by the pair of graphs that switches its bits together, down to rows of 128 channels."""
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: gm.forward)
    model, (noise, digit) = load_digits_dit(), (torch.zeros(2, 1, 32, 32), torch.tensor([1, 7]))
    run = compiled(model, scheme="dvd-w4a6")
    held = []
    for bits in ("high", "low"):
        with torch.no_grad(), executions() as ran, vq.forced_bits(bits):
            run(noise, timestep=torch.full((2,), 500.0), class_labels=digit)
        sites = [site for site in ran[0].report.sites if site.planned]
        weights = [model.get_parameter(f"{site.fqn}.weight") for site in sites]
        held.append([packed_bytes(weight) for weight in weights])
    assert len(weights) >= 36
    assert min(weight.shape[1] for weight in weights) == 128
    assert held[0] == held[1], "both widths of the input read one packed weight"
    for nbytes, weight in zip(held[0], weights, strict=True):
        assert 0.25 * 2 * weight.numel() < nbytes <= 0.27 * 2 * weight.numel()


def test_zero_points_of_older_files_are_read():
    """They were fp32; a value that no byte holds is refused, and the layer stays as it was."""
    linear = nn.Linear(64, 24)
    layer, other = (QuantLinear.from_linear(linear, QuantScheme.parse("dvd-w4a4")) for _ in range(2))
    saved = layer.state_dict()
    assert saved["weight_zero"].dtype == torch.int8
    old = saved | {"weight_zero": saved["weight_zero"].float()}
    for assign in (False, True):
        other.load_state_dict(old, assign=assign)
        assert other.state_dict()["weight_zero"].dtype == torch.int8
        assert torch.equal(other.weight, layer.weight)
    for wrong in (0.5, 300.0, float("nan")):
        with pytest.raises(RuntimeError, match=r"weight_zero: torch\.int8 of shape"):
            other.load_state_dict(old | {"weight_zero": torch.full((24,), wrong)})
        assert torch.equal(other.weight, layer.weight)
