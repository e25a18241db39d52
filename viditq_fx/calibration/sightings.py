"""Which linears the graphs showed, and where their weights live in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from viditq_fx.errors import RecipeError
from viditq_fx.ops.packed_weights import is_released
from viditq_fx.report import SiteReport
from viditq_fx.site import site_of_module


@dataclass(frozen=True, eq=False, kw_only=True)
class WatchedLinear:
    """One planned linear, as the graphs showed it."""

    fqn: str
    role: str
    parameter: str
    """Name of its weight in `named_parameters()`."""
    weight: Tensor
    """The model's own parameter [N, K], or [N, K, 1, ...] of a convolution."""

    @property
    def matrix(self) -> Tensor:
        """The weight [N, K], without gradients: a view."""
        return self.weight.detach().flatten(1)


class Sightings:
    """Of one model. As plain values they can be saved and sent: weights go by name.

    A linear is named by the module that owns its weight. The graph's own name for it is taken where that module has
    several paths; it is no path of the model where a block was traced alone, after a graph break.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[int, list[str]] = {}
        for module_path, module in model.named_modules(remove_duplicate=False):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    path = f"{module_path}.{name}".removeprefix(".")
                    self._tensors[path] = tensor
                    self._names.setdefault(id(tensor), []).append(path)
        self.linears: dict[tuple[str, str], WatchedLinear] = {}
        """Planned ones, by path and name of the weight."""
        self.shapes: dict[str, set[tuple[int, int]]] = {}
        """(N, K) of all, the kept ones too."""
        self.refused: dict[str, str] = {}
        """Path -> reason, of those that were planned and cannot be quantized."""
        self.crossing: set[str] = set()
        """Paths of linears that serve cross-attention alone."""
        self._weights: set[str] = set()

    def knows(self, weight: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the model."""
        return id(weight) in self._names

    def saw(self, weight: object) -> bool:
        """Whether a graph showed a linear with this weight."""
        return any(name in self._weights for name in self._names.get(id(weight), ()))

    def path_of(self, weight: Tensor, fqn: str) -> str:
        """Path of the linear with this weight, which the graph calls `fqn`."""
        return self._owner(weight, fqn)[0]

    def add(self, entry: SiteReport, weight: Tensor | None, *, crosses: bool = False) -> None:
        """Note one linear of a graph, and the tensor that it multiplies by; None where the graph computes that.

        crosses: it serves cross-attention and no other.
        """
        path, name = (entry.fqn, None) if weight is None else self._owner(weight, entry.fqn)
        if entry.width and entry.depth:
            self.shapes.setdefault(path, set()).add((entry.width, entry.depth))
        if name is not None:
            self._weights.add(name)
        if crosses:
            self.crossing.add(path)
        if entry.planned is not None and entry.reason is not None:
            self.refused[path] = entry.reason
        elif entry.planned is not None and name is not None:
            self._put(path, entry.role, name)

    def _owner(self, weight: Tensor, fqn: str) -> tuple[str, str | None]:
        """(path, name of the weight) of a linear."""
        names = {
            site_of_module(name.rpartition(".")[0]).fqn: name for name in self._names.get(id(weight), ())
        }
        if not names:
            return fqn, None
        return (fqn, names[fqn]) if fqn in names else next(iter(names.items()))

    def not_finite(self) -> str | None:
        """The first weight or bias of a seen linear that holds NaN or infinity; None where all are finite."""
        owners = {name.rpartition(".")[0] for name in self._weights}
        for name, tensor in self._tensors.items():
            of_linear = name in self._weights or (name.endswith("bias") and name.rpartition(".")[0] in owners)
            readable = tensor.is_floating_point() and tensor.device.type != "meta" and not is_released(tensor)
            if of_linear and readable and not bool(torch.isfinite(tensor.detach()).all()):
                return name
        return None

    def dump(self) -> dict[str, Any]:
        """Plain JSON values that `absorb` takes."""
        return {
            "linears": [[linear.fqn, linear.role, linear.parameter] for linear in self.linears.values()],
            "shapes": {fqn: sorted(map(list, shapes)) for fqn, shapes in self.shapes.items()},
            "refused": self.refused,
            "weights": sorted(self._weights),
            "crossing": sorted(self.crossing),
        }

    def absorb(self, other: Mapping[str, Any]) -> None:
        """Note what another noted. Raises RecipeError for a weight that this model has not."""
        for fqn, role, parameter in other["linears"]:
            self._put(fqn, role, parameter)
        for fqn, shapes in other["shapes"].items():
            self.shapes.setdefault(fqn, set()).update((int(n), int(k)) for n, k in shapes)
        self.refused |= other["refused"]
        self._weights |= set(other["weights"])
        self.crossing |= set(other["crossing"])

    def _put(self, fqn: str, role: str, parameter: str) -> None:
        if parameter not in self._tensors:
            raise RecipeError(f"calibrate: the model has no parameter {parameter!r}, which site {fqn!r} had")
        linear = WatchedLinear(fqn=fqn, role=role, parameter=parameter, weight=self._tensors[parameter])
        self.linears.setdefault((fqn, parameter), linear)
