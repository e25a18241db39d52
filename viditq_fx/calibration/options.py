"""What a calibration is asked for, checked before the model runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from viditq_fx.errors import RecipeError
from viditq_fx.options import split_options
from viditq_fx.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """See `calibrate` for what each means. Raises RecipeError for a value that cannot be."""

    scheme: QuantScheme
    keep: tuple[str, ...] = ()
    timestep: str | None = None
    max_buckets: int = 20
    branches: int = 1
    rows: int = 64
    seed: int = 0
    balance: str | float = "search"
    """"search", "off", or SmoothQuant's alpha."""
    rotation: str = "search"
    """"search", "on" or "off"."""
    random_signs: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_buckets", 1), ("branches", 1), ("rows", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError(f"calibrate: {name}={value!r}; give a whole number from {least} up")
        if not isinstance(self.timestep, str | None):
            raise RecipeError(f"calibrate: timestep={self.timestep!r}; give the name of an argument")
        if self.rotation not in ("search", "on", "off"):
            raise RecipeError(f"calibrate: rotation={self.rotation!r}; choose 'search', 'on' or 'off'")
        number = isinstance(self.balance, int | float) and not isinstance(self.balance, bool)
        if self.balance not in ("search", "off") and not (number and 0.0 <= float(self.balance) <= 1.0):
            raise RecipeError(
                f"calibrate: balance={self.balance!r}; choose 'search', 'off' or an alpha in 0..1"
            )
        if self.scheme.floating and (self.rotation == "on" or number):
            raise RecipeError(
                "calibrate: scheme fp8 is neither balanced nor rotated; leave both to 'search' or 'off'"
            )
        if self.searches and not self.rows:
            raise RecipeError(
                "calibrate: rows=0 keeps no rows to measure errors on; give balance=0.5 (or 'off') and "
                "rotation='on' or 'off' with it"
            )

    @property
    def searches(self) -> bool:
        """Whether candidates are compared by their error."""
        return not self.scheme.floating and "search" in (self.balance, self.rotation)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(dataclasses.replace(self, scheme=QuantScheme.parse("w8a8")))
        return values | {"scheme": str(self.scheme), "keep": list(self.keep)}


def read_options(
    scheme: str | QuantScheme,
    keep: str | Sequence[str],
    balance: str | float | None,
    rotation: str | None,
    alpha: float | None = None,
    alpha_repo: float | None = None,
    **rest: Any,
) -> CalibrationOptions:
    """Options from the arguments of `calibrate`. Raises RecipeError, SchemeError or OptionError for wrong ones."""
    ours, _ = split_options({"scheme": scheme, "keep": keep})
    if ours.low_scheme is not None:
        raise RecipeError(
            f"calibrate: scheme {scheme!r} changes the input's bits from step to step, which calibration has no part "
            f"in; calibrate(..., scheme={str(ours.scheme)!r}), then compile with options="
            f"{{'recipe': recipe, 'scheme': {scheme!r}}}"
        )
    given = {"balance": balance, "alpha": alpha, "alpha_repo": alpha_repo}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise RecipeError(
            f"calibrate: {' and '.join(named)} say the same in different ways; give one of them"
        )
    for name in ("alpha", "alpha_repo"):
        value = given[name]
        if value is not None and (not isinstance(value, int | float) or not 0.0 <= value <= 1.0):
            raise RecipeError(f"calibrate: {name}={value!r}; give a number in 0..1")
    if alpha_repo is not None:
        alpha = 1.0 - alpha_repo
    chosen = alpha if alpha is not None else balance if balance is not None else "search"
    turn = rotation if rotation is not None else "on" if ours.scheme.rotate else "search"
    return CalibrationOptions(scheme=ours.scheme, keep=ours.keep, balance=chosen, rotation=turn, **rest)
