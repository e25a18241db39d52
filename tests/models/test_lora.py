"""LoRA of peft on a tiny DiT: unfused, swapped in place, and fused into the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import viditq_fx
from tests.models.tiny_dits import TINY_DITS, sqnr

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("eager_inductor")]

DIT = TINY_DITS["wan"]
RANK = 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
MIN_SQNR = 30.0
ADAPTED = 8 + 2
"""Linears of one layer of Wan that are targets: two attentions of four, and two of the FFN."""


def with_lora(layers: int = 1, seed: int = 3) -> nn.Module:
    """A tiny Wan with one adapter that changes the output much more than quantization does."""
    model = DIT.build(layers)
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    draw_lora(model, seed)
    return model.eval().requires_grad_(False)


def draw_lora(model: nn.Module, seed: int) -> None:
    """New values for every A and B, written in place as hotswapping does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_adapters_are_kept_and_their_linears_quantized():
    model, kwargs = with_lora(), DIT.make_inputs()
    reference, without = DIT.run(model, kwargs), DIT.run(DIT.build(1), kwargs)
    compiled = torch.compile(model, backend="viditq", fullgraph=True)
    assert sqnr(reference, without) < 20 < MIN_SQNR <= sqnr(reference, DIT.run(compiled, kwargs))

    report = viditq_fx.explain(compiled, **kwargs)
    bases = [site for site in report.sites if site.fqn.endswith(".base_layer")]
    adapters = [site for site in report.sites if ".lora_" in site.fqn]
    assert len(bases) == ADAPTED
    assert len(adapters) == 2 * ADAPTED
    assert {site.outcome for site in bases} == {"quantized"}
    assert {site.outcome for site in adapters} == {"kept"}
    assert all("fewer than 32 channels" in site.reason for site in adapters)
    roles = {site.fqn.removesuffix(".base_layer"): site.role for site in bases}
    assert all(roles[site.fqn.partition(".lora_")[0]] == site.role for site in adapters)
    plain = viditq_fx.explain(torch.compile(DIT.build(1), backend="viditq"), **kwargs)
    assert roles == {site.fqn: site.role for site in plain.sites if site.outcome == "quantized"}


def test_hotswap_needs_no_recompile():
    model, kwargs = with_lora(), DIT.make_inputs()
    compiled = torch.compile(model, backend="viditq", fullgraph=True)
    first = DIT.run(compiled, kwargs)
    draw_lora(model, seed=4)
    second = DIT.run(compiled, kwargs)
    assert counters["stats"]["unique_graphs"] == 1
    assert sqnr(first, second) < 20
    assert sqnr(DIT.run(model, kwargs), second) >= MIN_SQNR


def test_fused_lora_after_repack():
    """fuse_lora writes through `.data`, which leaves no trace: `repack` tells the packed weights."""
    model, kwargs = with_lora(), DIT.make_inputs()
    reference = DIT.run(model, kwargs)
    model.disable_adapters()
    compiled = torch.compile(model, backend="viditq", fullgraph=True)
    before = DIT.run(compiled, kwargs)
    assert sqnr(reference, before) < 20
    model.enable_adapters()
    model.fuse_lora()
    assert sqnr(reference, DIT.run(model, kwargs)) > 80
    viditq_fx.repack(model)
    assert sqnr(reference, DIT.run(compiled, kwargs)) >= MIN_SQNR


def test_unfused_weights_come_back_after_repack():
    model, kwargs = with_lora(), DIT.make_inputs()
    plain = DIT.run(DIT.build(1), kwargs)
    model.fuse_lora()
    compiled = torch.compile(model, backend="viditq", fullgraph=True)
    assert sqnr(plain, DIT.run(compiled, kwargs)) < 20
    model.unfuse_lora()
    model.disable_adapters()
    viditq_fx.repack(model)
    assert sqnr(plain, DIT.run(compiled, kwargs)) >= MIN_SQNR


def test_quantize_in_place_under_lora():
    """quantize_ replaces what the adapters adapt; the adapters stay, eagerly and compiled."""
    model, kwargs = with_lora(), DIT.make_inputs()
    reference = DIT.run(model, kwargs)
    report = viditq_fx.quantize_(model, kwargs=kwargs)
    assert sum(site.done is not None for site in report.sites) == ADAPTED
    layers = [name for name, module in model.named_modules() if isinstance(module, viditq_fx.QuantLinear)]
    assert len(layers) == ADAPTED
    assert all(name.endswith(".base_layer") for name in layers)
    assert sqnr(reference, DIT.run(model, kwargs)) >= MIN_SQNR
    compiled = torch.compile(model, backend="viditq", fullgraph=True)
    assert sqnr(reference, DIT.run(compiled, kwargs)) >= MIN_SQNR


def test_lora_on_a_quantized_model():
    """Adapters added after quantize_ find a layer that they can wrap, or say that they cannot."""
    model, kwargs = DIT.build(1), DIT.make_inputs()
    viditq_fx.quantize_(model, kwargs=kwargs)
    with pytest.raises(ValueError, match="not supported"):
        model.add_adapter(peft.LoraConfig(r=RANK, target_modules=TARGETS))
