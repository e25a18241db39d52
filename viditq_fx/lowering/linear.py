"""Lower integer linears for CUDA: a Triton template where one fits, cuBLAS where all decline.

Templates from outside are asked before ours.

One config is chosen by an estimate of waves x tile work, which needs no device and no benchmark, unless a file
says which was fastest (tuned_configs.py). When the user asks Inductor to autotune and a device is there, all configs
and cuBLAS are timed, and the winner is kept in such a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from viditq_fx.lowering.templates import outside_templates
from viditq_fx.lowering.tuned_configs import known_kernel, remember
from viditq_fx.ops.fp8 import LINEAR_W8A8_FP8
from viditq_fx.ops.linear import LINEAR_W8A7, LINEAR_W8A8
from viditq_fx.ops.linear_w4a8 import LINEAR_W4A8
from viditq_fx.plugins import Failure, attempt
from viditq_fx.report import SIMULATION
from viditq_fx.triton_templates import linear_fp8, linear_w4a8, linear_w8a8
from viditq_fx.triton_templates.base import (
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


def _scaled_mm_fits(problem: LinearProblem | str, bias: Any) -> bool:
    return not isinstance(problem, str) and why_no_scaled_mm(problem, bias) is None


_INT8 = Route(templates=(linear_w8a8.TEMPLATE,), extern=viditq_int_mm_linear, extern_name=EXTERN)
ROUTES: dict[Any, Route] = {
    LINEAR_W8A8.overload: _INT8,
    LINEAR_W8A7.overload: _INT8,
    # No cuBLAS: it would need the weight as int8 in memory.
    LINEAR_W4A8.overload: Route(templates=(linear_w4a8.TEMPLATE, linear_w4a8.TEMPLATE_GROUPED)),
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
    overload: Any, x_q: Any, x_scale: Any, w_q: Any, w_scale: Any, bias: Any, out_dtype: torch.dtype
) -> Any:
    """Inductor's lowering of the ops in ROUTES and ops like them: TensorBoxes in, TensorBox out."""
    device, route = x_q.get_device(), ROUTES.get(overload, _NOTHING_OF_OURS)
    if device.type != "cuda" or torch.version.hip:
        _record(overload, route.reference, f"no kernel of ours for device type {device.type}")
        return inductor.call_eager(overload, x_q, x_scale, w_q, w_scale, bias, out_dtype)
    size = [*x_q.get_size()[:-1], w_q.get_size()[0]]
    if inductor.static_int(inductor.product(size[:-1])) == 0:
        _record(overload, "none", "the input has no rows")
        return inductor.zero_tensor(size, out_dtype, device)
    layout = inductor.output_layout(x_q, size, out_dtype)
    inputs = [inductor.contiguous(t) for t in (x_q, x_scale, w_q, w_scale, bias) if t is not None]
    outside = outside_templates(overload)
    templates = (*outside, *route.templates)
    problem = _problem(device, size, inputs, templates, out_dtype)
    configs, declined = _configs(templates, route.templates, problem)
    fits = route.extern is not None and route.extern_fits(problem, None if bias is None else bias.get_dtype())
    externs = (route.extern_name,) if fits else ()
    if not configs and not externs:
        _record(overload, route.reference, "; ".join(declined))
        return inductor.call_eager(overload, x_q, x_scale, w_q, w_scale, bias, out_dtype)
    labels, why = _shortlist(overload, device, problem, tuple(configs), externs, files=not outside)
    named = {
        label: _choice(*configs[label], inputs, layout, size, bias is not None)
        if label in configs
        else inductor.extern_choice(route.extern, inputs, layout, out_dtype=out_dtype)  # type: ignore[arg-type]
        for label in labels
    }
    result, winner = inductor.select(_op_name(overload), list(named.values()), inputs, layout)
    kernel = next((label for label, choice in named.items() if choice is winner), "autotuned")
    if len(named) > 1 and kernel in named and not outside and not isinstance(problem, str):
        remember(_op_name(overload), problem, torch.cuda.get_device_name(device), kernel)
    _record(overload, kernel, "; ".join([*why, *declined]))
    return result


def _shortlist(
    overload: Any,
    device: torch.device,
    problem: LinearProblem | str,
    configs: tuple[str, ...],
    externs: tuple[str, ...],
    *,
    files: bool,
) -> tuple[tuple[str, ...], list[str]]:
    """(what is built, and timed if it is several; why). `configs` are of all templates, best estimate first.

    `files`: whether what was measured before counts. It does not where templates from outside take part, which
    it may never have met.
    """
    if isinstance(problem, str) or not configs:
        return externs, []
    generic = [note] if (note := generic_configs(problem.capability)) else []
    timing, op, everything = inductor.wants_autotuning(), _op_name(overload), (*configs, *externs)
    if files:
        known = known_kernel(op, problem, torch.cuda.get_device_name(device), everything, timing=timing)
        if known is not None:
            return (known.kernel,), [known.source, *generic]
    if timing:
        return everything, [f"fastest of {len(everything)} timed", *generic]
    return configs[:1], ["estimated best tile", *generic]


def _configs(
    templates: Sequence[KernelTemplate],
    ours: Sequence[KernelTemplate],
    problem: LinearProblem | str,
) -> tuple[dict[str, tuple[KernelTemplate, GemmConfig]], list[str]]:
    """(all that may be chosen by its label, in the order of templates and estimates; why others declined)."""
    configs: dict[str, tuple[KernelTemplate, GemmConfig]] = {}
    declined: list[str] = []
    mine: list[str] = []
    for template in templates:
        own = any(template is known for known in ours)
        fitting = _fitting(template, problem, own)
        if isinstance(fitting, str):
            (mine if own else declined).append(fitting if own else f"{template.name} declined: {fitting}")
        else:
            configs |= {kernel_label(template, c): (template, c) for c in fitting}
    # Of two kernels of ours for two kinds of scales one always declines: no news where the other serves.
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
) -> LinearProblem | str:
    """The LinearProblem, or the reason why there is none."""
    x_q, _, w_q, w_scale, *_ = inputs
    width, depth = size[-1], (x_q if any(t.depth_of == "x" for t in templates) else w_q).get_size()[-1]
    static_width, static_depth = inductor.static_int(width), inductor.static_int(depth)
    if static_width is None or static_depth is None:
        return f"N and K must be the same in every call; got N={width}, K={depth}"
    return LinearProblem(
        rows=inductor.size_hint(inductor.product(size[:-1])),
        width=static_width,
        depth=static_depth,
        out_dtype=out_dtype,
        capability=torch.cuda.get_device_capability(device),
        processors=torch.cuda.get_device_properties(device).multi_processor_count,
        grouped=len(w_scale.get_size()) == 2,
    )


def _choice(
    template: KernelTemplate,
    config: GemmConfig,
    inputs: list[Any],
    layout: Any,
    size: list[Any],
    has_bias: bool,
) -> Any:
    rows, width = inductor.product(size[:-1]), size[-1]
    depth = inputs["xw".index(template.depth_of) * 2].get_size()[-1]
    name = f"viditq_{template.name}_{len(size)}d{'_bias' if has_bias else ''}"
    return inductor.triton_choice(
        inductor.triton_template(name, template_source(template, len(size), has_bias)),
        inputs,
        layout,
        rows=rows,
        columns=width,
        num_stages=config.num_stages,
        num_warps=config.num_warps,
        constants={
            **template.constants(config, inductor.static_int(rows), int(width), int(depth)),
            "HAS_BIAS": has_bias,
        },
    )


def template_source(template: KernelTemplate, rank: int, has_bias: bool) -> str:
    """Inductor's template text of an integer linear whose result has `rank` dimensions.

    The kernel's own body between Inductor's signature and store. The result keeps its leading
    dimensions ([B, S, N], not [B * S, N]): on torch 2.11 an epilogue that broadcasts over S, such as
    a gate [B, 1, N], fuses only then.
    """
    pointers = ["x_ptr", "x_scale_ptr", "w_ptr", "w_scale_ptr", *(["bias_ptr"] if has_bias else [])]
    batch = range(rank - 1)
    sizes = {d: f"{{{{size(None, {d})}}}}" for d in batch}
    lines = [f"{{{{def_kernel({', '.join(map(repr, pointers))})}}}}"]
    if not has_bias:
        lines.append("    bias_ptr = w_scale_ptr  # never read")
    lines.append(f"    M = {' * '.join(f'({s})' for s in sizes.values()) or '1'}")
    lines.append(f"    N = {{{{size(None, {rank - 1})}}}}")
    lines.append(
        f"    K = {{{{size('{template.depth_of}_ptr', {1 if template.depth_of == 'w' else rank - 1})}}}}"
    )
    lines.append(template.body)
    for d in batch:
        stride = " * ".join(f"({sizes[e]})" for e in batch if e > d) or "1"
        lines.append(f"    idx_{d} = idx_m // ({stride})" + (f" % ({sizes[d]})" if d else ""))
    indices = [*(f"idx_{d}" for d in batch), "idx_n"]
    mask = "None if EVEN_M and EVEN_N else 'mask'"
    lines.append(f"    {{{{store_output({indices}, 'y_acc', {mask}, val_shape=('BLOCK_M', 'BLOCK_N'))}}}}")
    return "\n".join(lines) + "\n"


def kernel_label(template: KernelTemplate, config: GemmConfig) -> str:
    """The name of a kernel in reports and in files of tuned kernels."""
    return f"triton:{template.name} {config} s{config.num_stages} w{config.num_warps}"


def _record(overload: Any, kernel: str, reason: str) -> None:
    node = inductor.current_node()
    record(node.name, KernelRecord(op=_op_name(overload), kernel=kernel, reason=reason, fqn=node.fqn))


def _op_name(overload: Any) -> str:
    return overload.name().partition("::")[2].removesuffix(".default")
