"""Kernel templates from outside, on a fake GPU: who is asked, who declines, and what is refused."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from nogpu.fake_cuda import missing
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

from nogpu.fake_cuda import cuda_code

from viditq_fx.backend import viditq_backend
from viditq_fx.errors import OptionError, StrictError
from viditq_fx.graph_edit import call
from viditq_fx.lowering import templates
from viditq_fx.lowering.templates import check_template
from viditq_fx.ops import LINEAR_W8A8, NORM_MODULATE_QUANTIZE
from viditq_fx.ops.base import register
from viditq_fx.options import CompileOptions
from viditq_fx.passes.annotate_sites import move_site
from viditq_fx.passes.base import Match, Pass
from viditq_fx.plugins import Failure, Plugin
from viditq_fx.report import CompileReport
from viditq_fx.triton_templates.linear_w8a8 import TEMPLATE as OURS

pytestmark = pytest.mark.slow


def template(**changes):
    return replace(OURS, **{"name": "theirs", **changes})


def kernel_of(*extra, **options):
    """(kernel, reason, generated code) of one linear."""
    reports = []

    def make():
        with torch.device("cuda"):
            return nn.Linear(256, 256).requires_grad_(False), torch.empty(512, 256)

    def compiler(gm, inputs):
        settings = {"extra_templates": list(extra), "plugins": False, "selection": "always", **options}
        reports.append(viditq_backend(gm, inputs, options=settings).report)

    code = cuda_code(make, compiler=compiler)
    (site,) = reports[0].sites
    return site.kernel, site.reason, code.text


def test_one_from_outside_goes_before_ours_for_as_long_as_it_is_asked_for():
    assert kernel_of(template())[0].startswith("triton:theirs ")
    assert kernel_of()[0].startswith("triton:linear_w8a8 ")


def test_the_first_that_accepts_is_taken():
    declines = template(name="shy", supports=lambda problem: "shy")
    kernel, why, _ = kernel_of(declines, template())
    assert kernel.startswith("triton:theirs ")
    assert why == "estimated best tile; shy declined: shy"


def explode(problem):
    raise ZeroDivisionError("no luck")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"supports": explode}, "ZeroDivisionError: no luck"), ({"configs": ()}, "theirs has no config")],
    ids=["raises", "no config"],
)
def test_one_that_fails_declines(wrong, reason):
    kernel, why, _ = kernel_of(template(**wrong))
    assert kernel.startswith("triton:linear_w8a8 ")
    assert "theirs declined: " in why
    assert reason in why


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "KernelTemplate, not 3"),
        (template(name="linear_w8a8"), "has the name of another"),
        (
            template(ops=(NORM_MODULATE_QUANTIZE,)),
            "serves norm_modulate_quantize.*only ops with the arguments",
        ),
        (template(kernel="nowhere"), "defined 0 times"),
    ],
)
def test_a_wrong_template_is_an_option_error(value, message):
    with pytest.raises(OptionError, match=message):
        check_template(value)
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        kernel_of(value)
    assert isinstance(caught.value.inner_exception, OptionError)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "OptionError: a template is"),
        (Failure(error=ImportError("no such file")), "ImportError: no such file"),
    ],
)
def test_a_wrong_plugin_is_left_out_with_a_reason(monkeypatch, value, message):
    found = [Plugin(name="plugin 'wrong'", value=value), Plugin(name="plugin 'right'", value=template())]
    monkeypatch.setattr(templates, "installed", lambda group: found)
    options, report = CompileOptions(), CompileReport(scheme="w8a8", device="cuda")
    with pytest.warns(UserWarning, match="plugin 'wrong' was left out"):
        assert [t.name for t in templates.extra_templates(options, report)] == ["theirs"]
    assert message in report.rejects[0]
    with pytest.raises(StrictError, match="plugin 'wrong' was left out"):
        templates.extra_templates(CompileOptions(strict=True), report)
    on_cpu = CompileReport(scheme="w8a8", device="cpu")
    assert templates.extra_templates(options, on_cpu) == ()
    assert on_cpu.rejects == []


@pytest.fixture(scope="module")
def own_op():
    """An op from outside that means the same as linear_w8a8."""
    return register(replace(LINEAR_W8A8, name="linear_from_outside"))


def use(op):
    @dataclass(frozen=True, kw_only=True)
    class UseOwnOp(Pass):
        name: ClassVar[str] = "use_own_op"
        changes_numerics: ClassVar[bool] = False

        def run(self, gm, ctx):
            results = []
            for node in [n for n in gm.graph.nodes if n.target is LINEAR_W8A8.overload]:
                with gm.graph.inserting_before(node):
                    mine = call(gm.graph, op.overload, node.args, node)
                move_site(node, mine, ctx)
                node.replace_all_uses_with(mine)
                gm.graph.erase_node(node)
                results.append(Match(site=mine.meta["viditq_site"]))
            return tuple(results)

    return UseOwnOp()


def test_an_op_from_outside(own_op):
    theirs = template(ops=(own_op,))
    kernel, _, code = kernel_of(theirs, extra_passes=[use(own_op)])
    assert kernel.startswith("triton:theirs ")
    assert "ops.viditq.linear_from_outside.default(" not in code


def test_an_op_from_outside_that_no_template_accepts_runs_its_reference(own_op):
    shy = template(ops=(own_op,), supports=lambda problem: "shy")
    kernel, why, code = kernel_of(shy, extra_passes=[use(own_op)])
    assert (kernel, why) == ("eager reference", "theirs declined: shy")
    assert "torch.ops.viditq.linear_from_outside.default(" in code
