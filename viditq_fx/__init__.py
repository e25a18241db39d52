"""viditq_fx: run diffusion transformers quantized through torch.compile(model, backend="viditq")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viditq_fx.calibration.allocate import allocate
    from viditq_fx.calibration.findings import Findings
    from viditq_fx.calibration.run import calibrate, collect
    from viditq_fx.calibration.sensitivity import measure_sensitivity
    from viditq_fx.calibration.sensitivity_table import SensitivityTable
    from viditq_fx.errors import (
        OptionError,
        RecipeError,
        ReleasedWeightError,
        SchemeError,
        StrictError,
        ViditqError,
        WeightError,
    )
    from viditq_fx.inspection import ExplainReport, explain
    from viditq_fx.ops.packed_weights import repack
    from viditq_fx.quant_conv import QuantPointwiseConv
    from viditq_fx.quant_linear import QuantLinear
    from viditq_fx.quantize import quantize_
    from viditq_fx.recipe import Recipe, SitePlan
    from viditq_fx.scheme import QuantScheme, available_schemes
    from viditq_fx.switching import generation
    from viditq_fx.switching_graph import forced_bits, reset, step_records, switch_bits

__version__ = "0.1.0"

_HOMES = {
    "ExplainReport": "viditq_fx.inspection",
    "Findings": "viditq_fx.calibration.findings",
    "OptionError": "viditq_fx.errors",
    "QuantLinear": "viditq_fx.quant_linear",
    "QuantPointwiseConv": "viditq_fx.quant_conv",
    "QuantScheme": "viditq_fx.scheme",
    "Recipe": "viditq_fx.recipe",
    "RecipeError": "viditq_fx.errors",
    "ReleasedWeightError": "viditq_fx.errors",
    "SchemeError": "viditq_fx.errors",
    "SensitivityTable": "viditq_fx.calibration.sensitivity_table",
    "SitePlan": "viditq_fx.recipe",
    "StrictError": "viditq_fx.errors",
    "ViditqError": "viditq_fx.errors",
    "WeightError": "viditq_fx.errors",
    "allocate": "viditq_fx.calibration.allocate",
    "available_schemes": "viditq_fx.scheme",
    "calibrate": "viditq_fx.calibration.run",
    "collect": "viditq_fx.calibration.run",
    "explain": "viditq_fx.inspection",
    "measure_sensitivity": "viditq_fx.calibration.sensitivity",
    "quantize_": "viditq_fx.quantize",
    "repack": "viditq_fx.ops.packed_weights",
    "forced_bits": "viditq_fx.switching_graph",
    "generation": "viditq_fx.switching",
    "reset": "viditq_fx.switching_graph",
    "step_records": "viditq_fx.switching_graph",
    "switch_bits": "viditq_fx.switching_graph",
}
__all__ = [
    "ExplainReport",
    "Findings",
    "OptionError",
    "QuantLinear",
    "QuantPointwiseConv",
    "QuantScheme",
    "Recipe",
    "RecipeError",
    "ReleasedWeightError",
    "SchemeError",
    "SensitivityTable",
    "SitePlan",
    "StrictError",
    "ViditqError",
    "WeightError",
    "__version__",
    "allocate",
    "available_schemes",
    "calibrate",
    "collect",
    "explain",
    "forced_bits",
    "generation",
    "measure_sensitivity",
    "quantize_",
    "repack",
    "reset",
    "step_records",
    "switch_bits",
]


def __getattr__(name: str) -> Any:
    # Dynamo imports this package to look backends up, even for other backends: keep that light.
    if name not in _HOMES:
        raise AttributeError(f"module 'viditq_fx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
