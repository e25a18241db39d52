"""Reading the values of a recipe's JSON object: each is of the kind it has to be, or the error says which is not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from viditq_fx.errors import RecipeError, SchemeError
from viditq_fx.scheme import QuantScheme

_KINDS = {str: "a string", dict: "an object", list: "a list", int: "a whole number", float: "a number"}


class Fields:
    """An object of the JSON file; `where` names it in errors. Raises RecipeError from every reader."""

    def __init__(self, where: str, values: Any) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise self.error(f"is {_kind(values)}, not an object")
        self._values: dict[str, Any] = values

    def error(self, problem: str) -> RecipeError:
        """The error that something here is wrong."""
        return RecipeError(f"{self.where}: {problem}; calibrate again, or copy the recipe again")

    def only(self, *names: str) -> None:
        """Refuse what this version does not know: it may change what a recipe means."""
        unknown = sorted(self._values.keys() - set(names))
        if unknown:
            raise self.error(f"has the unknown entries {', '.join(map(repr, unknown[:5]))}")

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        """A value of a kind; null and a missing one are `default`, where there is one."""
        value = self._values.get(name)
        if value is None and default is not ...:
            return default
        fits = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
        if not fits:
            raise self.error(f"{name!r} is {_kind(value)}, not {_KINDS[kind]}")
        return value

    def list_of(self, name: str, kind: type) -> list[Any]:
        """A list of values of one kind; a missing one is empty."""
        values = self.get(name, list, [])
        for value in values:
            if not isinstance(value, int | float if kind is float else kind) or isinstance(value, bool):
                raise self.error(f"{name!r} holds {_kind(value)}, not {_KINDS[kind]}")
        return values

    def rising(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers, each above the one before."""
        try:
            values = tuple(map(float, self.list_of(name, float)))
        except OverflowError as error:
            raise self.error(f"{name!r} holds a number that is too large") from error
        rises = all(a < b for a, b in itertools.pairwise(values))
        if not rises or not all(map(math.isfinite, values)):
            raise self.error(f"{name!r} are finite numbers in rising order")
        return values

    def scheme(self, name: str, *, required: bool) -> QuantScheme | None:
        """A scheme by its name."""
        text = self.get(name, str, ... if required else None)
        try:
            return None if text is None else QuantScheme.parse(text)
        except SchemeError as error:
            raise self.error(str(error)) from error

    def schemes(self, name: str) -> tuple[QuantScheme, ...]:
        """Schemes by their names, one or more."""
        try:
            found = tuple(QuantScheme.parse(text) for text in self.list_of(name, str))
        except SchemeError as error:
            raise self.error(str(error)) from error
        if not found:
            raise self.error(f"{name!r} is empty")
        return found

    def tensor(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The fp32 tensor that a value names; its numbers are finite."""
        key = self.get(name, str, None)
        if key is None:
            return None
        if key not in tensors:
            raise self.error(f"{name!r} names a tensor {key!r} that recipe.safetensors does not hold")
        value = tensors[key]
        if value.dtype != torch.float32:
            raise self.error(f"{name!r} is {value.dtype}, not torch.float32")
        if not bool(torch.isfinite(value).all()):
            raise self.error(f"{name!r} holds NaN or infinity")
        return value

    def items(self) -> list[tuple[str, Any]]:
        """All entries."""
        return list(self._values.items())


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    return "true or false" if isinstance(value, bool) else _KINDS.get(type(value), type(value).__name__)
