"""What `explain` and `calibrate` look at: the demo's model, or a function of the user's that makes model and calls."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from viditq_fx.errors import ViditqError

DEMO_TARGET = "digits"


class TargetError(ViditqError):
    """TARGET names nothing that gives a model and an example call."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model and one example call of it."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_target(text: str) -> Target:
    """Find and make what TARGET names: "digits", or "package.module:function".

    The function takes nothing and returns (model, args, kwargs) or (model, kwargs). Modules are found
    in the current folder too. Raises TargetError for anything else; what the function itself raises
    comes through as it is.
    """
    if text == DEMO_TARGET:
        return _digits()
    return _checked(text, _function(text)())


def _function(text: str) -> Any:
    path, colon, name = text.partition(":")
    if not colon or not path or not name:
        raise TargetError(f"TARGET {text!r}: give {DEMO_TARGET!r} or package.module:function")
    function = getattr(_import(text, path), name, None)
    if not callable(function):
        what = "has no" if function is None else "has a value, not a function, under"
        raise TargetError(f"TARGET {text!r}: module {path!r} {what} {name!r}")
    return function


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A model, and samples that make it be called: what `vq.calibrate` takes."""

    model: Any
    run: Any


def load_sampling(text: str, samples: int, steps: int, seed: int) -> Sampling:
    """What `viditq calibrate` runs: "digits" draws ten digits a sample, in `steps` steps.

    A function may return (model, run), `run` as `vq.calibrate` takes it, instead of one call. Raises TargetError.
    """
    if text == DEMO_TARGET:
        return _digits_sampling(samples, steps, seed)
    made = _function(text)()
    if _is_sampling(made):
        return Sampling(model=made[0], run=made[1])
    target = _checked(text, made)
    return Sampling(model=target.model, run=[(target.args, target.kwargs)])


def load_both(text: str, samples: int, steps: int, seed: int) -> tuple[Sampling, Target | None]:
    """What `viditq explain --errors` runs: samples, and an example call of the same model.

    The call is None where the function returned (model, run): then the first one of a sample is the example. Raises
    TargetError.
    """
    if text == DEMO_TARGET:
        sampling = _digits_sampling(samples, steps, seed)
        return sampling, _digits(sampling.model)
    made = _function(text)()
    if _is_sampling(made):
        return Sampling(model=made[0], run=made[1]), None
    target = _checked(text, made)
    return Sampling(model=target.model, run=[(target.args, target.kwargs)]), target


def _is_sampling(made: Any) -> bool:
    return isinstance(made, tuple) and len(made) == 2 and (callable(made[1]) or isinstance(made[1], list))


def _digits_sampling(samples: int, steps: int, seed: int) -> Sampling:
    from viditq_fx.demo.config import DemoError
    from viditq_fx.demo.model import CLASS_COUNT, load_digits_dit
    from viditq_fx.demo.sampling import balanced_labels, sample

    for name, value in (("samples", samples), ("steps", steps)):
        if value < 1:
            raise DemoError(f"--{name} {value}: give a whole number from 1 up")
    model = load_digits_dit()

    def one(index: int) -> Any:
        labels = balanced_labels(CLASS_COUNT)
        return sample(model, labels=labels, seed=seed + index, steps=steps, batch_size=CLASS_COUNT)

    return Sampling(model=model, run=[partial(one, index) for index in range(samples)])


def _import(text: str, path: str) -> Any:
    # A console script does not look in the current folder, where the user's module usually is.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(path)
    except (ImportError, SyntaxError, ValueError) as error:
        hint = "; give a module's name, not a file's: my_model:make for my_model.py here"
        raise TargetError(
            f"TARGET {text!r}: cannot import {path!r}: {error}{hint if path.endswith('.py') else ''}"
        ) from error


def _checked(text: str, made: Any) -> Target:
    form = "return (model, args, kwargs) or (model, kwargs)"
    if not isinstance(made, tuple) or len(made) not in {2, 3}:
        raise TargetError(f"TARGET {text!r}: it returned {_brief(made)}; {form}")
    model, args, kwargs = made if len(made) == 3 else (made[0], (), made[1])
    if not callable(model):
        raise TargetError(f"TARGET {text!r}: its model is {_brief(model)}, which cannot be called; {form}")
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise TargetError(f"TARGET {text!r}: args {_brief(args)} and kwargs {_brief(kwargs)}; {form}")
    return Target(model=model, args=tuple(args), kwargs=kwargs)


def _brief(value: Any) -> str:
    length = f" of {len(value)}" if isinstance(value, list | tuple | dict) else ""
    return f"{type(value).__name__}{length}"


def _digits(model: Any = None) -> Target:
    """One call of the demo's model: of `model`, if it is loaded already."""
    import torch

    from viditq_fx.demo.model import load_digits_dit
    from viditq_fx.demo.sampling import balanced_labels, initial_noise

    rows = 20
    kwargs = {
        "timestep": torch.full((rows,), 500.0),
        "class_labels": balanced_labels(rows),
        "return_dict": False,
    }
    return Target(model=model or load_digits_dit(), args=(initial_noise(rows, seed=0),), kwargs=kwargs)
