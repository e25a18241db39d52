"""Passes from outside: their place, what happens when they are wrong, and that caches tell them apart."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from tests.small_models import capture, context, relative_error, tiny_dit, tiny_inputs
from viditq_fx.errors import OptionError, StrictError, VerifyError
from viditq_fx.lowering.inductor_compat import cache_fingerprint
from viditq_fx.options import CompileOptions
from viditq_fx.passes.base import Match, Pass
from viditq_fx.passes.pipeline import after, before, build_pipeline, default_passes
from viditq_fx.plugins import class_files, identity
from viditq_fx.report import CompileReport
from viditq_fx.runtime import executions
from viditq_fx.site import Site

NAMES = [step.name for step in default_passes()]


@dataclass(frozen=True, kw_only=True)
class Look(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "look"
    changes_numerics: ClassVar[bool] = False

    def run(self, gm, ctx):
        return ()


class Other(Look):
    name = "other"


class Third(Look):
    name = "third"


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiplies each GELU by a number."""

    name: ClassVar[str] = "scale"
    changes_numerics: ClassVar[bool] = True
    by: float = field(repr=False)
    """Not in the pass's identity: only the graph tells two of these apart."""

    def run(self, gm, ctx):
        results = []
        for node in [n for n in gm.graph.nodes if n.target is F.gelu]:
            with gm.graph.inserting_after(node):
                scaled = gm.graph.call_function(torch.mul, (node, self.by))
            scaled.meta = dict(node.meta)
            node.replace_all_uses_with(scaled, lambda user, scaled=scaled: user is not scaled)
            results.append(Match(site=Site("")))
        return tuple(results)


class Raises(Look):
    """Spoils graph and report, then raises."""

    name = "raises"

    def run(self, gm, ctx):
        for node in gm.graph.nodes:
            if node.op == "call_function":
                node.replace_input_with(node.all_input_nodes[0], next(iter(gm.graph.nodes)))
        gm.graph.erase_node(next(n for n in reversed(gm.graph.nodes) if n.op != "output" and not n.users))
        for entry in ctx.sites.values():
            entry.planned = entry.reason = "spoiled"
        ctx.sites.clear()
        ctx.report.rejects.append("spoiled")
        raise KeyError("no such thing")


class Orphan(Look):
    """Leaves a quantize that nothing reads."""

    name = "orphan"

    def run(self, gm, ctx):
        node = next(n for n in gm.graph.nodes if "quantize_per_token" in str(n.target))
        with gm.graph.inserting_after(node):
            gm.graph.call_function(node.target, node.args).meta.update(node.meta)
        return ()


class Backwards(Look):
    """Moves a node before what it reads."""

    name = "backwards"

    def run(self, gm, ctx):
        first, last = next(iter(gm.graph.nodes)), gm.graph.output_node().all_input_nodes[0]
        first.prepend(last)
        return ()


class Widens(Look):
    """Changes what the graph returns."""

    name = "widens"

    def run(self, gm, ctx):
        (node,) = gm.graph.output_node().all_input_nodes
        with gm.graph.inserting_after(node):
            wide = gm.graph.call_method("double", (node,))
        wide.meta["example_value"] = node.meta["example_value"].double()
        gm.graph.output_node().replace_input_with(node, wide)
        return ()


class Invents(Look):
    """Adds an input that nobody passes."""

    name = "invents"

    def run(self, gm, ctx):
        with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
            gm.graph.placeholder("invented")
        return ()


def order(*extra):
    options = CompileOptions(extra_passes=extra, plugins=False)
    return [step.name for step in build_pipeline(options, CompileReport(scheme="", device="")).passes]


def placed(anchor, *names, shift=0):
    at = NAMES.index(anchor) + shift
    return [*NAMES[:at], *names, *NAMES[at:]]


def test_places():
    assert order() == NAMES
    assert order(Look()) == placed("place_weights", "look")
    assert order(before("fuse_linear", Look())) == placed("fuse_linear", "look")
    assert order(after("insert_qdq", Look())) == placed("insert_qdq", "look", shift=1)
    assert order(after(NAMES[-1], Look())) == [*NAMES, "look"]


def test_order_at_one_anchor_is_the_order_given():
    assert order(Look(), Other()) == placed("place_weights", "look", "other")
    both = [after("insert_qdq", Look()), after("insert_qdq", Other())]
    assert order(*both) == placed("insert_qdq", "look", "other", shift=1)
    chained = [after("insert_qdq", Look()), after("look", Third()), after("insert_qdq", Other())]
    assert order(*chained) == placed("insert_qdq", "look", "third", "other", shift=1)


def compiled(model, *extra, **options):
    settings = {"extra_passes": list(extra), "plugins": False, **options}
    return torch.compile(model, backend="viditq", options=settings)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (Look(), "is a list"),
        ([Look], r"give an instance, Look\(\)"),
        ([before("fuse_linear", Look)], r"give an instance, Look\(\)"),
        ([lambda gm: gm], "instance of viditq_fx.passes.base.Pass"),
        ([after("insert_qdc", Look())], "did you mean 'insert_qdq'.*'place_weights'"),
        ([after("other", Look()), Other()], "which is no pass"),
        ([before(3, Look())], "which is no pass"),
        ([Look(), Look()], "'look' has the name of another"),
        ([type("Mine", (Look,), {"name": "fuse_linear"})()], "'fuse_linear' has the name of another"),
        ([type("Mine", (Look,), {"name": ""})()], "needs `name: ClassVar"),
    ],
)
def test_a_wrong_extra_pass_is_an_option_error(extra, message):
    call = torch.compile(nn.Linear(64, 64), backend="viditq", options={"extra_passes": extra})
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        call(torch.randn(40, 64))
    assert isinstance(caught.value.inner_exception, OptionError)


def ffn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)


def test_an_extra_pass_changes_what_runs_and_is_in_the_report():
    model, x = ffn(), torch.randn(40, 64)
    want = model[2](2 * F.gelu(model[0](x)))
    with executions() as ran:
        got = compiled(model, after("normalize", Scale(by=2.0)))(x)
    assert relative_error(got, want) < 0.02
    trace = ran[0].report.passes[1]
    assert (trace.name, trace.matches) == ("scale", 1)
    assert ran[0].report.rejects == []


@pytest.mark.slow
def test_two_extra_passes_share_no_cached_code():
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    model, x, seen = ffn(), torch.randn(40, 64), []
    with fresh_cache():
        for step in (Scale(by=2.0), Scale(by=3.0), Scale(by=2.0), Look(), Other(), Look()):
            torch._dynamo.reset()
            counters.clear()
            got = compiled(model, after("normalize", step))(x)
            by = step.by if isinstance(step, Scale) else 1.0
            assert relative_error(got, model[2](by * F.gelu(model[0](x)))) < 0.02
            seen.append(counters["aot_autograd"]["autograd_cache_hit"])
    # The graph tells the scales apart; what does nothing is told apart by its name and source.
    assert seen == [0, 0, 1, 0, 0, 1]


def test_code_without_a_source_file_is_kept_out_of_caches():
    typed = type("Typed", (Look,), {"name": "typed", "__module__": "nowhere"})
    assert Path(__file__) in class_files(Look)
    assert class_files(typed) == []
    assert identity([("look", class_files(Look))]) == identity([("look", class_files(Other))])
    assert identity([("look", class_files(Look))]) != identity([("other", class_files(Other))])
    assert identity([("look", class_files(Look)), ("typed", [])]) is None
    assert cache_fingerprint(None, None).uuid() is None
    assert cache_fingerprint(None, ("a",)).uuid() != cache_fingerprint(None, ("b",)).uuid()


def raising(strict=False):
    return {"extra_passes": [before("fuse_linear", Raises())], "plugins": False, "strict": strict}


def test_a_pass_that_raises_is_left_out():
    model, x = ffn(), torch.randn(40, 64)
    plain = torch.compile(model, backend="viditq", options={"plugins": False})(x)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="'raises' raised KeyError"), executions() as ran:
        got = torch.compile(model, backend="viditq", options=raising())(x)
    torch.testing.assert_close(got, plain, rtol=0, atol=0)
    report = ran[0].report
    assert report.rejects == ["extra pass 'raises' raised KeyError: 'no such thing'; compiled without it"]
    assert [site.done for site in report.sites] == ["w8a8"] * 2
    assert [trace.name for trace in report.passes] == NAMES


@pytest.mark.parametrize("returned", [None, 3, [None], (Look(),)])
def test_a_pass_that_returns_something_else_is_left_out(returned):
    step = type("Says", (Look,), {"name": "says", "run": lambda self, gm, ctx: returned})()
    with pytest.warns(UserWarning, match="'says' raised TypeError: run returns a tuple"), executions() as ran:
        compiled(nn.Linear(64, 64).requires_grad_(False), step)(torch.randn(40, 64))
    assert [trace.name for trace in ran[0].report.passes] == NAMES


@pytest.mark.slow
def test_the_graph_is_as_it_was_wherever_a_pass_raises():
    def graph(*extra):
        gm, ctx = capture(tiny_dit(1), *tiny_inputs()), context()
        ctx.attention = "int8"
        build_pipeline(CompileOptions(extra_passes=extra, plugins=False), ctx.report).run(gm, ctx)
        return str(gm.graph), ctx

    want, plain = graph()
    for name in NAMES:
        torch._dynamo.reset()
        with pytest.warns(UserWarning, match="compiled without it"):
            got, ctx = graph(after(name, Raises()))
        assert got == want, name
        assert ctx.report.sites == plain.report.sites
        assert ctx.weight_slots == plain.weight_slots


def test_strict_names_a_pass_that_raises():
    with pytest.raises(BackendCompilerFailed, match="'raises' raised KeyError") as caught:
        torch.compile(ffn(), backend="viditq", options=raising(strict=True))(torch.randn(40, 64))
    assert isinstance(caught.value.inner_exception, StrictError)
    assert isinstance(caught.value.inner_exception.__cause__, KeyError)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Orphan(), "after pass 'orphan': .*quantize_per_token.*nothing reads"),
        (Backwards(), "after pass 'backwards': the graph is not well formed: .*'input_3' was used before"),
        (Widens(), r"after pass 'widens': output double.*float64 \[40, 64\].*float32"),
        (Invents(), "after pass 'invents': .*'invented'"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_verify_names_the_pass_that_breaks_an_invariant(step, message):
    with pytest.raises(BackendCompilerFailed, match=message) as caught:
        compiled(ffn(), before("fuse_linear", step))(torch.randn(40, 64))
    assert isinstance(caught.value.inner_exception, VerifyError)


def test_a_pass_of_ours_still_raises(monkeypatch):
    def broken(self, gm, ctx):
        raise KeyError("ours")

    monkeypatch.setattr(type(default_passes()[3]), "run", broken)
    with pytest.raises(BackendCompilerFailed, match="ours") as caught:
        compiled(ffn(), Look())(torch.randn(40, 64))
    assert isinstance(caught.value.inner_exception, KeyError)
