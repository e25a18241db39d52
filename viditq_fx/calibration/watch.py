"""Watch what reaches every site while a model runs: the compiler's own passes put observers into its graphs.

For as long as it lasts the model is compiled in place with a backend that runs its graphs as they are, observers
included: the same passes find the same sites under the same names as in `torch.compile(backend="viditq")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import FunctionType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import OptimizedModule

from viditq_fx.calibration.ledger import InputKey
from viditq_fx.calibration.sightings import Sightings
from viditq_fx.calibration.timesteps import TimestepArgument
from viditq_fx.errors import RecipeError
from viditq_fx.graph_edit import copy_graph_module, example
from viditq_fx.ops.linear import without_autocast
from viditq_fx.passes.annotate_sites import AnnotateSites
from viditq_fx.passes.base import PassContext
from viditq_fx.passes.cross_attention import cross_attention_linears
from viditq_fx.passes.dataflow import weight_parameter
from viditq_fx.passes.effects import is_mutation, may_write
from viditq_fx.passes.linearize_convolutions import LinearizeConvolutions
from viditq_fx.passes.normalize import Normalize
from viditq_fx.quant_conv import is_linear_layer
from viditq_fx.report import SiteReport
from viditq_fx.scheme import QuantScheme
from viditq_fx.site import site_of_module

_PLANNING_SCHEME = QuantScheme.parse("w8a8")
"""Which sites the policy quantizes depends on no scheme; fp8 alone asks for a device that multiplies it."""
_LIMITS = {
    "recompile_limit": 1 << 16,
    "accumulated_recompile_limit": 1 << 16,
    "fail_on_recompile_limit_hit": True,
}
"""Of Dynamo's graphs for one code object: at its own limit the model would run on unobserved."""


class Sink(Protocol):
    """What hears of every call and every input."""

    def begin_call(self, timestep: float | None) -> None:
        """A call of the model begins."""

    def expect(self, key: InputKey, dtype: torch.dtype, device: torch.device) -> None:
        """A graph that is about to run for the first time has such an input: make room for what is kept of it."""

    def see(self, key: InputKey, x: Tensor) -> None:
        """The linears that `key` names are about to read x [..., K]."""


class Watch:
    """Watches a model inside a `with` block; see the module's first lines.

    Raises RecipeError on entering for a model that is none, or has no such timestep argument.
    """

    def __init__(self, model: nn.Module, *, keep: tuple[str, ...], timestep: str | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise RecipeError(f"calibrate: expected a torch.nn.Module, got {type(model).__name__}")
        self._wrapper, self.model = model, model
        while isinstance(self.model, OptimizedModule):
            self.model = self.model._orig_mod
        self.argument = TimestepArgument.of(self.model, timestep)
        self.sightings = Sightings(self.model)
        self.calls = 0
        self.first_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """Arguments of the first call."""
        self.sink: Sink | None = None
        self.on_call: Callable[[], None] = lambda: None
        self._backend = _Backend(keep, self.sightings, self._see, self._expect)
        self._compiled = torch.compile(_fresh_call(self.model), backend=self._backend)
        self._stack = ExitStack()

    @property
    def graphs(self) -> int:
        """How many graphs were made."""
        return self._backend.count

    def __enter__(self) -> Watch:
        with ExitStack() as stack:
            stack.callback(self._backend.forget)
            quiet_own_compilation(stack, [self._wrapper, *self.model.modules()])
            self._intercept(stack)
            stack.enter_context(torch._dynamo.config.patch(dict(_LIMITS)))
            stack.enter_context(torch.no_grad())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def unseen(self) -> list[str]:
        """Paths of the linear layers that no graph showed."""
        return [
            site_of_module(path).fqn
            for path, module in self.model.named_modules()
            if is_linear_layer(module) and not self.sightings.saw(module._parameters.get("weight"))
        ]

    def _intercept(self, stack: ExitStack) -> None:
        """Let every call of the model, compiled before or not, come here."""
        observed = torch.compiler.disable(self._call, recursive=False)
        _put(stack, self.model, "_compiled_call_impl", observed)
        wrapper: Any = self._wrapper
        while isinstance(wrapper, OptimizedModule):
            _put(stack, wrapper, "forward", self.model)
            wrapper = wrapper._orig_mod

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        assert self.sink is not None
        self.calls += 1
        self.first_call = self.first_call or (args, kwargs)
        self.sink.begin_call(self.argument.read(args, kwargs))
        with ExitStack() as stack:
            # After a graph break the model is called by name once more: by then it is itself again.
            _put(stack, self.model, "_compiled_call_impl", None)
            result = self._compiled(*args, **kwargs)
        self.on_call()
        return result

    def _expect(self, key: InputKey, example: Tensor) -> None:
        assert self.sink is not None
        with torch.inference_mode(False), torch.no_grad():
            self.sink.expect(key, example.dtype, example.device)

    def _see(self, key: InputKey, x: Tensor) -> None:
        assert self.sink is not None
        # What is kept must be writable outside of the user's inference_mode too.
        with torch.inference_mode(False), torch.no_grad(), without_autocast(x):
            self.sink.see(key, x)


def quiet_own_compilation(stack: ExitStack, modules: Iterable[nn.Module]) -> None:
    """Let blocks that were compiled apart run as part of the whole model: their own backend would hide them."""
    for module in modules:
        if module.__dict__.get("_compiled_call_impl") is not None:
            _put(stack, module, "_compiled_call_impl", None)
        if isinstance(module, OptimizedModule):
            _put(stack, module, "forward", module._orig_mod)


def _put(stack: ExitStack, owner: nn.Module, name: str, value: Any) -> None:
    """Set an attribute until the stack closes."""
    own = owner.__dict__
    old, was_set = own.get(name), name in own
    own[name] = value
    stack.callback(lambda: own.__setitem__(name, old) if was_set else own.pop(name, None))


def _fresh_call(model: nn.Module) -> Callable[..., Any]:
    """A function that calls `model`, with code of its own: what Dynamo keeps for it goes when it goes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)


class _Observe(nn.Module):
    """A node that shows an input [..., K], and the weights of the linears that read it.

    One graph may run with the weights of many blocks, so which linears they are is asked at every call.
    """

    def __init__(self, backend: _Backend, entries: list[SiteReport]) -> None:
        super().__init__()
        self._backend, self._entries = backend, entries
        self._keys: dict[tuple[int, ...], InputKey] = {}

    def forward(self, x: Tensor, *weights: Tensor) -> None:
        self._backend.see(self.key(*weights), x)

    def key(self, *weights: Tensor) -> InputKey:
        """Which linears these weights are of."""
        identity = tuple(map(id, weights))
        if identity not in self._keys:
            sightings = self._backend.sightings
            paths = {sightings.path_of(w, e.fqn) for w, e in zip(weights, self._entries, strict=True)}
            self._keys[identity] = InputKey(tuple(sorted(paths)), self._entries[0].depth)
        return self._keys[identity]


class _Register(nn.Module):
    """A node that notes which linears a graph has, kept ones too, for the weights of this call."""

    def __init__(self, backend: _Backend, entries: list[SiteReport], crossing: list[SiteReport]) -> None:
        super().__init__()
        self._backend, self._entries = backend, entries
        self._crosses = [any(entry is one for one in crossing) for entry in entries]
        self._known: set[tuple[int, ...]] = set()

    def forward(self, *weights: Tensor) -> None:
        identity = tuple(map(id, weights))
        if identity not in self._known:
            self._known.add(identity)
            for entry, weight, crosses in zip(self._entries, weights, self._crosses, strict=True):
                self._backend.sightings.add(entry, weight, crosses=crosses)


class _Backend:
    """Runs Dynamo's graphs with observers in them.

    Dynamo keeps a backend for as long as the process lives, so it gives everything up afterwards.
    """

    def __init__(
        self,
        keep: tuple[str, ...],
        sightings: Sightings,
        see: Callable[[InputKey, Tensor], None],
        expect: Callable[[InputKey, Tensor], None],
    ) -> None:
        self._keep, self.see, self._expect = keep, see, expect
        self._sightings: Sightings | None = sightings
        self._graphs: list[fx.GraphModule] = []
        self.count = 0

    @property
    def sightings(self) -> Sightings:
        """What the graphs showed, while the calibration lasts."""
        assert self._sightings is not None, "a graph of a calibration that is over ran"
        return self._sightings

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        watched = copy_graph_module(gm)
        ctx = PassContext(scheme=_PLANNING_SCHEME, keep=self._keep)
        for step in (Normalize(), AnnotateSites()):
            step.run(watched, ctx)
        positions = {n.name: i for i, n in enumerate(m for m in gm.graph.nodes if m.op == "placeholder")}
        for node in watched.graph.nodes:
            entry = ctx.sites.get(node.name)
            if entry is None:
                continue
            parameter = _parameter_of(node)
            if parameter is None:
                self.sightings.add(entry, None)
            elif not self.sightings.knows(_value(parameter, gm, positions, example_inputs)):
                entry.reason = entry.reason or "its weight is no parameter of the model"
        found = cross_attention_linears(watched.graph)
        crossing = [ctx.sites[node.name] for node in found if node.name in ctx.sites]
        LinearizeConvolutions().run(watched, ctx)
        self._insert_observers(
            watched, ctx, crossing, lambda node: _value(node, gm, positions, example_inputs)
        )
        watched.recompile()
        index = len(self._graphs)
        self._graphs.append(watched)
        self.count += 1
        return lambda *args: self._graphs[index].forward(*args)

    def forget(self) -> None:
        """Hold nothing of the model any longer."""
        self._graphs, self._sightings = [], None
        self.see = self._expect = _nobody

    def _insert_observers(
        self,
        gm: fx.GraphModule,
        ctx: PassContext,
        crossing: list[SiteReport],
        value: Callable[[fx.Node], Any],
    ) -> None:
        found = [(_parameter_of(n), ctx.sites[n.name]) for n in gm.graph.nodes if n.name in ctx.sites]
        known = [(parameter, entry) for parameter, entry in found if parameter is not None]
        gm.add_submodule("viditq_register", _Register(self, [entry for _, entry in known], crossing))
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.call_module("viditq_register", tuple(parameter for parameter, _ in known))
        for number, linears in enumerate(shared_inputs(gm.graph, ctx)):
            x = linears[0].args[0]
            assert isinstance(x, fx.Node)
            name = f"viditq_observe_{number}"
            observer = _Observe(self, [ctx.sites[node.name] for node in linears])
            gm.add_submodule(name, observer)
            weights = [_parameter_of(node) for node in linears]
            with gm.graph.inserting_before(linears[0]):
                gm.graph.call_module(name, (x, *weights))
            self._expect(observer.key(*(value(node) for node in weights if node is not None)), example(x))


def _nobody(key: InputKey, x: Tensor) -> None:
    raise AssertionError(f"{key.sites[0]}: a graph of a calibration that is over ran")


def _parameter_of(node: fx.Node) -> fx.Node | None:
    """The parameter that a linear of the graph multiplies by; None where the graph computes its weight."""
    weight = node.args[1] if len(node.args) > 1 else None
    return weight_parameter(weight) if isinstance(weight, fx.Node) else None


def _value(parameter: fx.Node, gm: fx.GraphModule, positions: dict[str, int], inputs: list[Any]) -> Any:
    if parameter.name in positions:
        return inputs[positions[parameter.name]]
    value: Any = gm
    for step in str(parameter.target).split("."):
        value = getattr(value, step)
    return value


def shared_inputs(graph: fx.Graph, ctx: PassContext) -> list[list[fx.Node]]:
    """The planned linears of a graph by the value that they read: those that share one quantize, as insert_qdq does."""
    groups: list[list[fx.Node]] = []
    current: dict[fx.Node, list[fx.Node]] = {}
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in order:
        if is_mutation(node):
            for x in [x for x in current if may_write(node, x, order)]:
                del current[x]
        entry = ctx.sites.get(node.name)
        if entry is None or entry.planned is None or entry.reason is not None:
            continue
        x = node.args[0]
        if node.target is not nn.functional.linear or not isinstance(x, fx.Node):
            continue
        if x not in current:
            current[x] = []
            groups.append(current[x])
        current[x].append(node)
    return groups
