"""Lower integer linears for CUDA: a Triton template where one fits, cuBLAS where all decline.

Templates from outside are asked before ours.

One config is chosen by an estimate of waves x tile work, which needs no device and no benchmark.
When the user asks Inductor to autotune and a device is there, all configs and cuBLAS are timed.
"""

from __future__ import annotations

from typing import Any

import torch

from viditq_fx.lowering import inductor_compat as inductor
from viditq_fx.lowering.extern_linear import viditq_int_mm_linear
from viditq_fx.lowering.kernel_log import KernelRecord, record
from viditq_fx.lowering.templates import outside_templates
from viditq_fx.plugins import Failure, attempt
from viditq_fx.triton_templates.base import GemmConfig, KernelTemplate, LinearProblem
from viditq_fx.triton_templates.linear_w8a8 import TEMPLATE, constants

EXTERN = "extern:int_mm"
EAGER = "eager reference"


def lower_linear(
    overload: Any, x_q: Any, x_scale: Any, w_q: Any, w_scale: Any, bias: Any, out_dtype: torch.dtype
) -> Any:
    """Inductor's lowering of `linear_w8a8`, `linear_w8a7` and ops like them: TensorBoxes in, TensorBox out."""
    device = x_q.get_device()
    if device.type != "cuda" or torch.version.hip:
        _record(overload, EAGER, f"no kernel of ours for device type {device.type}")
        return inductor.call_eager(overload, x_q, x_scale, w_q, w_scale, bias, out_dtype)
    size = [*x_q.get_size()[:-1], w_q.get_size()[0]]
    rows, width, depth = inductor.product(size[:-1]), size[-1], w_q.get_size()[1]
    if inductor.static_int(rows) == 0:
        _record(overload, "none", "the input has no rows")
        return inductor.zero_tensor(size, out_dtype, device)
    layout = inductor.output_layout(x_q, size, out_dtype)
    inputs = [inductor.contiguous(t) for t in (x_q, x_scale, w_q, w_scale, bias) if t is not None]
    ours = any(op.overload is overload for op in TEMPLATE.ops)
    problem = _problem(device, rows, width, depth, out_dtype)
    templates = (*outside_templates(overload), *([TEMPLATE] if ours else []))
    tuned, configs, declined = inductor.wants_autotuning(), {}, []
    for template in templates:
        fitting = _fitting(template, problem)
        if isinstance(fitting, str):
            declined.append(fitting if template is TEMPLATE else f"{template.name} declined: {fitting}")
        elif tuned or not configs:
            configs |= {_label(template, c): (template, c) for c in fitting[: None if tuned else 1]}
    named = {
        label: _choice(template, config, inputs, layout, size, bias is not None)
        for label, (template, config) in configs.items()
    }
    if ours and (tuned or not named):
        named[EXTERN] = inductor.extern_choice(viditq_int_mm_linear, inputs, layout, out_dtype=out_dtype)
    if not configs:
        _record(overload, EXTERN if ours else EAGER, "; ".join(declined))
        if ours:
            return named[EXTERN].output_node()
        return inductor.call_eager(overload, x_q, x_scale, w_q, w_scale, bias, out_dtype)
    result, winner = inductor.select(TEMPLATE.name, list(named.values()), inputs, layout)
    kernel = next((label for label, choice in named.items() if choice is winner), "autotuned")
    why = f"fastest of {len(named)} timed" if tuned else "estimated best tile"
    _record(overload, kernel, "; ".join([why, *declined]))
    return result


def _fitting(template: KernelTemplate, problem: LinearProblem | str) -> tuple[GemmConfig, ...] | str:
    """A template's configs for a problem, best first, or why it does not compute it."""
    if isinstance(problem, str):
        return problem
    if template is TEMPLATE:
        return template.supports(problem) or template.candidates(problem)
    fitting = attempt(lambda: template.supports(problem) or template.candidates(problem))
    return str(fitting) if isinstance(fitting, Failure) else fitting


def _problem(
    device: torch.device, rows: Any, width: Any, depth: Any, out_dtype: torch.dtype
) -> LinearProblem | str:
    """The LinearProblem, or the reason why there is none."""
    static_width, static_depth = inductor.static_int(width), inductor.static_int(depth)
    if static_width is None or static_depth is None:
        return f"N and K must be the same in every call; got N={width}, K={depth}"
    return LinearProblem(
        rows=inductor.size_hint(rows),
        width=static_width,
        depth=static_depth,
        out_dtype=out_dtype,
        capability=torch.cuda.get_device_capability(device),
        processors=torch.cuda.get_device_properties(device).multi_processor_count,
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
    depth = inputs[2].get_size()[1]
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
            **constants(config, inductor.static_int(rows), int(width), int(depth)),
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
    lines.append("    K = {{size('w_ptr', 1)}}")
    lines.append(template.body)
    for d in batch:
        stride = " * ".join(f"({sizes[e]})" for e in batch if e > d) or "1"
        lines.append(f"    idx_{d} = idx_m // ({stride})" + (f" % ({sizes[d]})" if d else ""))
    indices = [*(f"idx_{d}" for d in batch), "idx_n"]
    mask = "None if EVEN_M and EVEN_N else 'mask'"
    lines.append(f"    {{{{store_output({indices}, 'y_acc', {mask}, val_shape=('BLOCK_M', 'BLOCK_N'))}}}}")
    return "\n".join(lines) + "\n"


def _label(template: KernelTemplate, config: GemmConfig) -> str:
    return f"triton:{template.name} {config} s{config.num_stages} w{config.num_warps}"


def _record(overload: Any, kernel: str, reason: str) -> None:
    node = inductor.current_node()
    op = overload.name().removeprefix("viditq::").removesuffix(".default")
    record(node.name, KernelRecord(op=op, kernel=kernel, reason=reason, fqn=node.fqn))
