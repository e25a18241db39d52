"""What `run` of a calibration may be: something to call, or many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from viditq_fx.errors import RecipeError

_FORMS = (
    "run is a function without arguments that makes the model be called, such as lambda: pipe(prompt), or an iterable "
    "of such functions or of the model's own arguments: a tuple of two, (args, kwargs), a list of positional arguments "
    "or a dict of keyword arguments"
)


class Samples:
    """The samples of a calibration, in order; each is run by calling it. Raises RecipeError for what is none."""

    def __init__(self, model: Callable[..., Any], run: Any) -> None:
        if not callable(run) and not isinstance(run, Iterable):
            raise RecipeError(f"calibrate: {_FORMS}; got {type(run).__name__}")
        if isinstance(run, str | bytes | Mapping):
            raise RecipeError(f"calibrate: {_FORMS}; got {type(run).__name__}")
        self._model = model
        self._run: Any = run
        self.single = callable(run)
        """One function: then every rank of a distributed run calls its own."""

    def __iter__(self) -> Iterator[Callable[[], Any]]:
        if self.single:
            yield self._run
            return
        for index, sample in enumerate(self._run):
            yield self._function(index, sample)

    @property
    def count(self) -> int | None:
        """How many there are; None where that is not known."""
        if self.single:
            return 1
        return len(self._run) if isinstance(self._run, Sized) else None

    @property
    def once(self) -> bool:
        """Whether they can be gone through only once, as a generator."""
        return not self.single and isinstance(self._run, Iterator)

    def _function(self, index: int, sample: Any) -> Callable[[], Any]:
        if callable(sample):
            return sample
        args: Any = ()
        kwargs: Any = {}
        if isinstance(sample, tuple):
            if (
                len(sample) != 2
                or not isinstance(sample[0], tuple | list)
                or not isinstance(sample[1], Mapping)
            ):
                kinds = ", ".join(type(part).__name__ for part in sample)
                raise RecipeError(
                    f"calibrate: sample {index} is a tuple ({kinds}), which means (args, kwargs), a tuple and a dict: "
                    "write positional arguments as a list, [x, t], or as ((x, t), {})"
                )
            args, kwargs = sample
        elif isinstance(sample, Mapping):
            kwargs = sample
        elif isinstance(sample, list):
            args = sample
        else:
            raise RecipeError(f"calibrate: sample {index} is {type(sample).__name__}: {_FORMS}")
        return lambda: self._model(*args, **kwargs)
