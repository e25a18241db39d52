"""Find out whether this machine can compile and run quantized models, and with which kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    state: Literal["ok", "note", "missing"]
    """"missing": nothing works without it; "note": worth knowing, or something optional is absent."""
    detail: str


def examine(compiler: str | None) -> list[Finding]:
    """Everything, in the order in which to repair it. `compiler` is the C++ compiler asked for, if any."""
    findings = [_version("viditq_fx"), _torch()]
    if findings[-1].state == "missing":
        return findings
    optional = {
        "triton": "kernels on NVIDIA GPUs need it",
        "diffusers": "the demo needs it: pip install viditq_fx[diffusers]",
    }
    findings += [_version(name, lack) for name, lack in optional.items()]
    findings += [_backend(), *_compiler(compiler), _cpu(), *_onednn(), *_kernels(), _gpu(), *_plugins()]
    return findings


def _version(package: str, lack: str | None = None) -> Finding:
    """The version of an installed package; `lack` says what goes without an optional one."""
    try:
        return Finding(name=package, state="ok", detail=importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        if lack is not None:
            return Finding(name=package, state="note", detail=f"not installed; {lack}")
        return Finding(name=package, state="missing", detail="not installed; run: pip install viditq_fx")


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(name="torch", state="missing", detail="not installed; run: pip install torch")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(name="torch", state="missing", detail=f"cannot be imported: {error}")
    return Finding(name="torch", state="ok", detail=torch.__version__)


def _backend() -> Finding:
    import torch._dynamo

    if "viditq" in torch._dynamo.list_backends():
        return Finding(
            name="backend", state="ok", detail='torch.compile(model, backend="viditq") is registered'
        )
    detail = "torch does not list the backend 'viditq'; install the package (pip install viditq_fx)"
    return Finding(name="backend", state="missing", detail=detail)


def _compiler(asked: str | None) -> list[Finding]:
    """A C++ compiler and Python's headers: Inductor builds every CPU kernel with them."""
    names = [asked] if asked else ["g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        detail = f"{' and '.join(names)} not found; install g++ or set CXX"
        findings = [Finding(name="C++ compiler", state="missing", detail=detail)]
    else:
        findings = [_run_compiler(found)]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.is_file():
        findings.append(Finding(name="Python headers", state="ok", detail=str(header.parent)))
    else:
        detail = f"{header} is missing; install Python's development package (python3-dev)"
        findings.append(Finding(name="Python headers", state="missing", detail=detail))
    return findings


def _run_compiler(path: str) -> Finding:
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name="C++ compiler", state="missing", detail=f"{path} does not run: {error}")
    first = told.stdout.partition("\n")[0]
    return Finding(name="C++ compiler", state="ok", detail=f"{path}: {first}")


def _cpu() -> Finding:
    import torch

    probes = {
        "AVX2": "_is_avx2_supported",
        "AVX512": "_is_avx512_supported",
        "VNNI": "_is_vnni_supported",
        "AMX": "_is_amx_tile_supported",
    }
    # torch's own probes are private and differ by version: one that is gone says nothing.
    found = [name for name, probe in probes.items() if getattr(torch.cpu, probe, bool)()]
    detail = f"{torch.backends.cpu.get_cpu_capability()}; {', '.join(found) or 'no integer extensions seen'}"
    return Finding(name="CPU", state="ok", detail=f"{detail}; {torch.get_num_threads()} threads")


def _onednn() -> list[Finding]:
    from viditq_fx.ops.onednn import ZERO_POINTS, onednn_is_exact

    findings = []
    for bits in ZERO_POINTS:
        exact = onednn_is_exact(bits)
        detail = "exact on this CPU (tried)" if exact else "saturates or is absent on this CPU (tried)"
        findings.append(Finding(name=f"oneDNN int{bits}", state="ok" if exact else "note", detail=detail))
    return findings


def _kernels() -> list[Finding]:
    from viditq_fx.cpu_kernels import reduce_rows
    from viditq_fx.lowering.select_cpu import choose_cpu_kernel
    from viditq_fx.scheme import QuantScheme, available_schemes

    reason = reduce_rows.unavailable()
    detail = f"torch's ops, slower with the same ranges: {reason}" if reason else "one read of the rows"
    findings = [Finding(name="calibration on the CPU", state="note" if reason else "ok", detail=detail)]
    for name in available_schemes():
        scheme = QuantScheme.parse(name)
        if scheme.floating:  # what a GPU computes
            continue
        bits = 8 if scheme.input_bits == 8 else 7
        choice = choose_cpu_kernel(bits, scheme.weight_form.nibbles, scheme.block is not None)
        detail = choice.kernel + (f": {choice.reason}" if choice.reason else "")
        findings.append(
            Finding(name=f"{name} on the CPU", state="note" if choice.reason else "ok", detail=detail)
        )
    return findings


def _plugins() -> list[Finding]:
    """What other packages add to every compile, and what of it cannot be imported."""
    from viditq_fx.plugins import PASSES_GROUP, TEMPLATES_GROUP, Failure, installed

    findings = []
    for group, what in ((PASSES_GROUP, "pass"), (TEMPLATES_GROUP, "template")):
        for plugin in installed(group):
            failed = isinstance(plugin.value, Failure)
            detail = f"{plugin.name}: left out, {plugin.value}" if failed else plugin.name
            findings.append(Finding(name=f"added {what}", state="note" if failed else "ok", detail=detail))
    return findings


def _gpu() -> Finding:
    import torch

    from viditq_fx.ops.fp8 import why_no_fp8

    if not torch.cuda.is_available():
        return Finding(name="GPU", state="note", detail="none that torch can use; models run on the CPU")
    major, minor = torch.cuda.get_device_capability()
    lack = why_no_fp8(torch.device("cuda"))
    detail = f"{torch.cuda.get_device_name()}, capability {major}.{minor}"
    return Finding(name="GPU", state="note" if lack else "ok", detail=detail + (f"; {lack}" if lack else ""))
