"""Inductor's template text of an integer linear: the kernel's own body between Inductor's signature and store."""

from __future__ import annotations

from viditq_fx.triton_templates.base import KernelTemplate


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
    if template.depth_of != "argument":  # else it is one of the constants
        dim = 1 if template.depth_of == "w" else rank - 1
        lines.append(f"    K = {{{{size('{template.depth_of}_ptr', {dim})}}}}")
    lines.append(template.body)
    for d in batch:
        stride = " * ".join(f"({sizes[e]})" for e in batch if e > d) or "1"
        modulo = f" % ({sizes[d]})" if d else ""
        lines.append(f"{' ' * template.store_indent}idx_{d} = idx_m // ({stride}){modulo}")
    indices = [*(f"idx_{d}" for d in batch), "idx_n"]
    lines.append(_store(indices, "y_acc", template.store_indent))
    return _text(lines, template)


def partial_sums_source(template: KernelTemplate) -> str:
    """Inductor's template text of a kernel that writes int32 sums [split_k, M, N] of x [..., K] and w [N, K]."""
    lines = [
        "{{def_kernel('x_ptr', 'w_ptr')}}",
        "    M = {{size(None, 1)}}",
        "    N = {{size(None, 2)}}",
        "    K = {{size('w_ptr', 1)}}",
        template.body,
        _store(["idx_s", "idx_m", "idx_n"], "acc", 4),
    ]
    return _text(lines, template)


def _text(lines: list[str], template: KernelTemplate) -> str:
    """The kernel, and behind it the functions that it calls."""
    return "\n".join([*lines, *(["", "", template.helpers] if template.helpers else [])]) + "\n"


def _store(indices: list[str], value: str, indent: int) -> str:
    mask = "None if EVEN_M and EVEN_N else 'mask'"
    options = f"indent_width={indent}, val_shape=('BLOCK_M', 'BLOCK_N')"
    return f"{' ' * indent}{{{{store_output({indices}, {value!r}, {mask}, {options})}}}}"
