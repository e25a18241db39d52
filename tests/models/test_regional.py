"""Regional compilation: one compiled block runs with the weights of every block of every model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import viditq_fx
import viditq_fx.runtime
from tests.models.tiny_dits import TINY_DITS, sqnr
from viditq_fx.quant_conv import is_linear_layer
from viditq_fx.scheme import WeightForm

MIN_SQNR = 30.0
# Classes that name their blocks for compile_repeated_blocks, and how many graphs those make.
REPEATED = {"flux_dev": 3, "wan": 1}
# Classes that do not: their blocks are compiled one by one.
UNNAMED = ("pixart_sigma", "sd3", "mochi", "lumina2", "sana")


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the model's own lists of modules."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{i}", block) for i, block in enumerate(child))


def two_models(name: str, compiled: bool = True) -> list[nn.Module]:
    models = [TINY_DITS[name].build(layers=2, seed=seed) for seed in (0, 1)]
    for model in models if compiled else []:
        model.compile_repeated_blocks(backend="viditq", fullgraph=True)
    return models


def noise(name: str) -> list[float]:
    """SQNR of the outputs of two models with different weights whose blocks are compiled."""
    dit = TINY_DITS[name]
    kwargs = dit.make_inputs()
    references = [dit.run(model, kwargs) for model in two_models(name, compiled=False)]
    outputs = [dit.run(model, kwargs) for model in two_models(name)]
    return [sqnr(reference, output) for reference, output in zip(references, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.usefixtures("eager_inductor")
@pytest.mark.parametrize("name", REPEATED)
def test_two_models_share_blocks_not_weights(name):
    """Two models of one class, of different weights, through the graphs that the first one compiled."""
    assert min(noise(name)) >= MIN_SQNR
    assert counters["stats"]["unique_graphs"] == REPEATED[name]


@pytest.mark.slow
@pytest.mark.usefixtures("eager_inductor")
def test_weights_of_one_block_for_all_would_be_noticed(monkeypatch):
    """The test above can fail: with weights baked in, i.e. the first block's for all, it does."""
    honest, first = viditq_fx.runtime.packed_weight, {}

    def baked(weight: Tensor, form: WeightForm, name: str) -> tuple[Tensor, Tensor]:
        return first.setdefault((name, weight.shape, form), honest(weight, form, name))

    monkeypatch.setattr(viditq_fx.runtime, "packed_weight", baked)
    assert max(noise("wan")) < MIN_SQNR


@pytest.mark.slow
def test_generated_code_of_repeated_blocks():
    """The same with Inductor's code, and weights of full precision released."""
    dit = TINY_DITS["wan"]
    kwargs = dit.make_inputs()
    references = [dit.run(model, kwargs) for model in two_models("wan", compiled=False)]
    for seed, reference in enumerate(references):
        model = dit.build(layers=2, seed=seed)
        options = {"weights": "release"}
        model.compile_repeated_blocks(backend="viditq", fullgraph=True, options=options)
        for _ in range(2):  # the second call runs on released weights
            assert sqnr(reference, dit.run(model, kwargs)) >= MIN_SQNR
        report = viditq_fx.explain(model, **kwargs)
        assert report.totals()["quantized_weight_bytes_full_resident"] == 0
        assert report.count("refused") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("eager_inductor")
@pytest.mark.parametrize("name", UNNAMED)
def test_blocks_compiled_one_by_one(name):
    """block.compile(backend="viditq"): right numbers, and sites under their full module path."""
    dit = TINY_DITS[name]
    model, kwargs = dit.build(layers=2), dit.make_inputs()
    reference = dit.run(model, kwargs)
    with pytest.raises(ValueError, match="_repeated_blocks"):
        model.compile_repeated_blocks(backend="viditq")
    compiled = dict(blocks(model))
    for block in compiled.values():
        block.compile(backend="viditq", fullgraph=True)
    assert sqnr(reference, dit.run(model, kwargs)) >= MIN_SQNR

    report = viditq_fx.explain(model, **kwargs)
    linears = {
        f"{path}.{name}"
        for path, block in compiled.items()
        for name, module in block.named_modules()
        if is_linear_layer(module)
    }
    sites = {site.fqn for site in report.sites}
    assert sites == linears
    assert all(torch.is_tensor(model.get_submodule(fqn).weight) for fqn in sites)
    assert not [site.fqn for site in report.sites if site.role in {"stem", "head"}]
