"""Lower integer linears for CUDA: a Triton template where one fits, cuBLAS where all decline.

Templates from outside are asked before ours.

One config is chosen by an estimate of waves x tile work, which needs no device and no benchmark, unless a file
says which was fastest (tuned_configs.py). When the user asks Inductor to autotune and a device is there, all configs
and cuBLAS are timed, and the winner is kept in such a file: but not those that split K, whose result has another
shape. Where the estimate prefers one of those it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from viditq_fx.lowering import inductor_compat as inductor
from viditq_fx.lowering.extern_linear import (
    viditq_int_mm_linear,
    viditq_scaled_mm_linear,
    why_no_scaled_mm,
)
from viditq_fx.lowering.kernel_log import KernelRecord, record
from viditq_fx.lowering.template_text import partial_sums_source, template_source
from viditq_fx.lowering.templates import outside_templates
from viditq_fx.lowering.tuned_configs import known_kernel, remember
from viditq_fx.ops.fp8 import LINEAR_W8A8_FP8
from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8
from viditq_fx.ops.linear_w4_block import LINEAR_W4A4, LINEAR_W4A8_BLOCK
from viditq_fx.ops.linear_w4a8 import LINEAR_W4A8
from viditq_fx.plugins import Failure, attempt
from viditq_fx.report import SIMULATION
from viditq_fx.scheme import group_of
from viditq_fx.triton_templates import (
    linear_fp8,
    linear_w4_block,
    linear_w4a8,
    linear_w8a8,
    linear_w8a8_persistent,
    linear_w8a8_split_k,
    linear_w8a8_tma,
)
from viditq_fx.triton_templates.base import (
    DESCRIPTOR_ALIGNMENT,
    GemmConfig,
    KernelTemplate,
    LinearProblem,
    generic_configs,
)

EXTERN = "extern:int_mm"
EAGER = "eager reference"
SIMULATED_FP8 = f"{SIMULATION} e4m3 values, fp32 arithmetic"


@dataclass(frozen=True, kw_only=True)
class Route:
    """What of ours computes an op."""

    templates: tuple[KernelTemplate, ...]
    extern: Callable[..., Any] | None = None
    """cuBLAS, with the op's arguments: the rival in autotuning, and the fall-back."""
    extern_name: str = ""
    extern_fits: Callable[[LinearProblem | str, Any], bool] = lambda problem, bias: True
    """Whether cuBLAS computes a problem with this bias (its dtype, or None)."""
    reference: str = EAGER
    """The report's name of the op's eager implementation."""
    note: str | None = None
    """What the report says of our template beside why it was chosen."""


def _scaled_mm_fits(problem: LinearProblem | str, bias: Any) -> bool:
    return not isinstance(problem, str) and why_no_scaled_mm(problem, bias) is None


_INT8 = Route(
    templates=(
        linear_w8a8.TEMPLATE,
        linear_w8a8_split_k.TEMPLATE,
        # Rated below the first, so that they are chosen where they are timed and not before.
        linear_w8a8_persistent.TEMPLATE,
        linear_w8a8_tma.TEMPLATE,
    ),
    extern=viditq_int_mm_linear,
    extern_name=EXTERN,
)
ROUTES: dict[Any, Route] = {
    LINEAR_W8A8.overload: _INT8,
    LINEAR_W8A7.overload: _INT8,
    # No cuBLAS: it would need the weight as int8 in memory.
    LINEAR_W4A8.overload: Route(templates=linear_w4a8.TEMPLATES),
    LINEAR_W4A8_BLOCK.overload: Route(templates=linear_w4_block.W4A8_BLOCK),
    LINEAR_W4A4.overload: Route(
        templates=linear_w4_block.W4A4,
        note="4-bit inputs are multiplied as int8: Triton has no int4 product",
    ),
    LINEAR_W8A8_FP8.overload: Route(
        templates=(linear_fp8.TEMPLATE,),
        extern=viditq_scaled_mm_linear,
        extern_name="extern:scaled_mm",
        extern_fits=_scaled_mm_fits,
        reference=SIMULATED_FP8,
    ),
}
_NOTHING_OF_OURS = Route(templates=())


def lower_linear(
    overload: Any,
    x_q: Any,
    x_scale: Any,
    w_q: Any,
    w_scale: Any,
    bias: Any,
    out_dtype: torch.dtype,
    *depth: Any,
) -> Any:
    """Inductor's lowering of the ops in ROUTES and ops like them: TensorBoxes in, TensorBox out.

    `depth` is K, where the op has it as an argument.
    """
    device, route = x_q.get_device(), ROUTES.get(overload, _NOTHING_OF_OURS)
    if device.type != "cuda" or torch.version.hip:
        _record(overload, route.reference, f"no kernel of ours for device type {device.type}")
        return inductor.call_eager(overload, x_q, x_scale, w_q, w_scale, bias, out_dtype, *depth)
    size = [*x_q.get_size()[:-1], w_q.get_size()[0]]
    if inductor.static_int(inductor.product(size[:-1])) == 0:
        _record(overload, "none", "the input has no rows")
        return inductor.zero_tensor(size, out_dtype, device)
    inputs = [inductor.contiguous(t) for t in (x_q, x_scale, w_q, w_scale, bias) if t is not None]
    outside = outside_templates(overload)
    templates = (*outside, *route.templates)
    problem = _problem(device, size, inputs, templates, out_dtype, *depth)
    configs, declined = _configs(templates, route.templates, problem)
    fits = route.extern is not None and route.extern_fits(problem, None if bias is None else bias.get_dtype())
    externs = (route.extern_name,) if fits else ()
    if not configs and not externs:
        _record(overload, route.reference, "; ".join(declined))
        return inductor.call_eager(overload, x_q, x_scale, w_q, w_scale, bias, out_dtype, *depth)
    labels, why = _shortlist(overload, device, problem, configs, externs, files=not outside)
    result, kernel = _computed(overload, route, labels, configs, inputs, size, out_dtype, device, *depth)
    if len(labels) > 1 and kernel in labels and not outside and not isinstance(problem, str):
        remember(_op_name(overload), problem, torch.cuda.get_device_name(device), kernel)
    mine = kernel in configs and any(configs[kernel][0] is template for template in route.templates)
    note = [route.note] if route.note and mine else []
    _record(overload, kernel, "; ".join([*why, *note, *declined]))
    return result


def _computed(
    overload: Any,
    route: Route,
    labels: Sequence[str],
    configs: Mapping[str, tuple[KernelTemplate, GemmConfig]],
    inputs: list[Any],
    size: list[Any],
    out_dtype: torch.dtype,
    device: torch.device,
    *depth: Any,
) -> tuple[Any, str]:
    """(the linear by the kernel of this label, or by the fastest of several; that one's label)."""
    if labels[0] in configs and configs[labels[0]][0].partial_sums:  # it comes alone
        return _split(*configs[labels[0]], inputs, size, out_dtype), labels[0]
    layout = inductor.output_layout(inputs[0], size, out_dtype)
    processors = _processors(device)
    named = {
        label: _choice(*configs[label], inputs, layout, size, len(inputs) == 5, processors, *depth)
        if label in configs
        else inductor.extern_choice(route.extern, inputs, layout, out_dtype=out_dtype)  # type: ignore[arg-type]
        for label in labels
    }
    result, winner = inductor.select(_op_name(overload), list(named.values()), inputs, layout)
    return result, next((label for label, choice in named.items() if choice is winner), "autotuned")


def _shortlist(
    overload: Any,
    device: torch.device,
    problem: LinearProblem | str,
    configs: Mapping[str, tuple[KernelTemplate, GemmConfig]],
    externs: tuple[str, ...],
    *,
    files: bool,
) -> tuple[tuple[str, ...], list[str]]:
    """(what is built, and timed if it is several; why). `configs` are of all templates, best estimate first.

    What splits K comes alone: where the estimate prefers it, timing or not, or where it was measured.
    `files`: whether what was measured before counts. It does not where templates from outside take part, which
    it may never have met.
    """
    if isinstance(problem, str) or not configs:
        return externs, []
    generic = [note] if (note := generic_configs(problem.capability)) else []
    timing, op, best = inductor.wants_autotuning(), _op_name(overload), next(iter(configs))
    if files:
        allowed, name = (*configs, *externs), torch.cuda.get_device_name(device)
        known = known_kernel(op, problem, name, allowed, timing=timing)
        if known is not None:
            return (known.kernel,), [known.source, *generic]
    if timing and not configs[best][0].partial_sums:
        whole = [label for label, (template, _) in configs.items() if not template.partial_sums]
        return (*whole, *externs), [f"fastest of {len(whole) + len(externs)} timed", *generic]
    return (best,), ["estimated best tile", *generic]


def _configs(
    templates: Sequence[KernelTemplate],
    ours: Sequence[KernelTemplate],
    problem: LinearProblem | str,
) -> tuple[dict[str, tuple[KernelTemplate, GemmConfig]], list[str]]:
    """(all that may be chosen by its label, best estimate first; why others declined).

    Templates from outside come before ours, in their order; ours by the cost of the best config of each.
    """
    accepted: list[tuple[bool, float, KernelTemplate, tuple[GemmConfig, ...]]] = []
    declined: list[str] = []
    mine: list[str] = []
    for template in templates:
        own = any(template is known for known in ours)
        fitting = _fitting(template, problem, own)
        if isinstance(fitting, str):
            (mine if own else declined).append(fitting if own else f"{template.name} declined: {fitting}")
            continue
        cost = template.cost(fitting[0], problem) if own and not isinstance(problem, str) else 0.0
        accepted.append((own, cost, template, fitting))
    accepted.sort(key=lambda entry: entry[:2])
    configs = {kernel_label(t, config): (t, config) for *_, t, fitting in accepted for config in fitting}
    # Of kernels of ours for other scales, shapes or devices some always decline: no news where one serves.
    return configs, declined if len(mine) < len(ours) else [*declined, *dict.fromkeys(mine)]


def _fitting(
    template: KernelTemplate, problem: LinearProblem | str, ours: bool
) -> tuple[GemmConfig, ...] | str:
    """A template's configs for a problem, best first, or why it does not compute it."""
    if isinstance(problem, str):
        return problem
    if ours:
        return template.supports(problem) or template.candidates(problem)
    fitting = attempt(lambda: template.supports(problem) or template.candidates(problem))
    return str(fitting) if isinstance(fitting, Failure) else fitting


def _problem(
    device: torch.device,
    size: Sequence[Any],
    inputs: Sequence[Any],
    templates: Sequence[KernelTemplate],
    out_dtype: torch.dtype,
    given_depth: Any = None,
) -> LinearProblem | str:
    """The LinearProblem, or the reason why there is none."""
    x_q, _, w_q, w_scale, *_ = inputs
    width, depth = size[-1], (x_q if any(t.depth_of == "x" for t in templates) else w_q).get_size()[-1]
    depth = depth if given_depth is None else given_depth
    static_width, static_depth = inductor.static_int(width), inductor.static_int(depth)
    if static_width is None or static_depth is None:
        return f"N and K must be the same in every call; got N={width}, K={depth}"
    group = None
    if len(w_scale.get_size()) == 2:
        scales = inductor.static_int(w_scale.get_size()[0])
        group = 0 if scales is None else group_of(scales, static_depth) or 0
    return LinearProblem(
        rows=inductor.size_hint(inductor.product(size[:-1])),
        width=static_width,
        depth=static_depth,
        out_dtype=out_dtype,
        capability=torch.cuda.get_device_capability(device),
        processors=_processors(device),
        group=group,
        why_no_descriptors=inductor.why_no_descriptors((x_q, w_q), DESCRIPTOR_ALIGNMENT),
    )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _choice(
    template: KernelTemplate,
    config: GemmConfig,
    inputs: list[Any],
    layout: Any,
    size: list[Any],
    has_bias: bool,
    processors: int,
    depth: Any = None,
) -> Any:
    rows, width = inductor.product(size[:-1]), size[-1]
    if depth is None:
        depth = inputs[{"x": 0, "w": 2}[template.depth_of]].get_size()[-1]
    name = f"viditq_{template.name}_{len(size)}d{'_bias' if has_bias else ''}"
    constants = template.constants(config, inductor.static_int(rows), int(width), int(depth))
    if template.persistent:
        constants["PROGRAMS"] = processors
    return inductor.triton_choice(
        inductor.triton_template(name, template_source(template, len(size), has_bias)),
        inputs,
        layout,
        rows=rows,
        columns=width,
        num_stages=config.num_stages,
        num_warps=config.num_warps,
        constants={**constants, "HAS_BIAS": has_bias},
    )


def _split(
    template: KernelTemplate, config: GemmConfig, inputs: list[Any], size: list[Any], out_dtype: torch.dtype
) -> Any:
    """The linear in two steps: int32 sums of parts of K, then an expression that adds and scales them."""
    x_q, x_scale, w_q, w_scale, *bias = inputs
    rows, width = inductor.product(size[:-1]), size[-1]
    choice = inductor.triton_choice(
        inductor.triton_template(f"viditq_{template.name}", partial_sums_source(template)),
        [x_q, w_q],
        inductor.output_layout(x_q, [config.split_k, rows, width], torch.int32),
        rows=rows,
        columns=width,
        num_stages=config.num_stages,
        num_warps=config.num_warps,
        constants=template.constants(config, inductor.static_int(rows), int(width), int(w_q.get_size()[-1])),
        value="tl.int32",
    )
    return inductor.dequantized_sum(
        choice.output_node(),
        x_scale,
        w_scale,
        bias[0] if bias else None,
        parts=config.split_k,
        size=size,
        out_dtype=out_dtype,
    )


def kernel_label(template: KernelTemplate, config: GemmConfig) -> str:
    """The name of a kernel in reports and in files of tuned kernels."""
    return f"triton:{template.name} {config} s{config.num_stages} w{config.num_warps}"


def _record(overload: Any, kernel: str, reason: str) -> None:
    node = inductor.current_node()
    record(node.name, KernelRecord(op=_op_name(overload), kernel=kernel, reason=reason, fqn=node.fqn))


def _op_name(overload: Any) -> str:
    return overload.name().partition("::")[2].removesuffix(".default")
