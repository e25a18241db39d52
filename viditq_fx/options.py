"""Our options of torch.compile(..., options={...}), told apart from Inductor's and checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from os import PathLike
from typing import Any

from viditq_fx.errors import OptionError
from viditq_fx.recipe import Recipe
from viditq_fx.scheme import SWITCHED, QuantScheme
from viditq_fx.switching import SwitchRule

WEIGHTS_MODES = ("keep", "release")
ATTENTION_MODES = ("auto", "int8", "int8-fp8", "int8-int8", "keep")
QUANTIZE_KERNELS = ("auto", "inductor", "triton")
SELECTION_MODES = ("auto", "always")


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """The options that viditq_fx itself understands; every other key is Inductor's."""

    scheme: QuantScheme = field(default_factory=lambda: QuantScheme.parse("w8a8"))
    """Scheme of every site that the policy quantizes, by name: "w8a8", "w8a7", "w4a8", "w4a8-g128" or "fp8"."""
    recipe: Recipe | None = None
    """What calibration decided, as a Recipe or the directory of a saved one; it brings its scheme along."""
    low_scheme: QuantScheme | None = None
    """Scheme of the steps that run at low bits; `scheme` is that of the others. "dvd-w4a6" sets both."""
    rule: SwitchRule = field(default_factory=SwitchRule)
    """When a step runs at low bits: from options delta, high_first, high_last, steps and bits_schedule."""
    keep: tuple[str, ...] = ()
    """Sites to leave in full precision besides the policy's: globs over module paths, or roles."""
    strict: bool = False
    """Raise when a planned site is refused or the graph cannot be quantized."""
    weights: str = "keep"
    """"keep": full-precision weights stay as they are, packed ones are added. "release": their memory
    is given back once they are packed; the model then runs only through its compiled form."""
    attention: str = "auto"
    """"auto": quantize attention where a kernel of ours is faster than SDPA. "int8": wherever its form allows,
    by the reference where there is no kernel (slow); P V stays in 16 bits. "int8-fp8", "int8-int8": P V in e4m3
    (refused where no hardware multiplies it) or int8. "keep": leave SDPA alone."""
    quantize_kernels: str = "auto"
    """What quantizes rows on CUDA. "auto": our kernel behind a rotation, else Inductor's fusion. "triton": ours also
    behind norms and activations. "inductor": never ours."""
    selection: str = "auto"
    """"auto": on a GPU, a site that is expected to be no faster quantized stays in full precision, unless memory is
    what was asked for (4-bit weights, or weights="release"), or a recipe or a switched pair says what to quantize.
    "always": quantize whatever the policy plans."""
    extra_passes: tuple[Any, ...] = ()
    """Passes of the user's, each alone or in before(name, pass) or after(name, pass) of passes/pipeline.py."""
    extra_templates: tuple[Any, ...] = ()
    """Kernel templates of the user's, asked before ours where a GPU computes an op that they serve."""
    plugins: bool = True
    """Use the passes and kernel templates that installed packages offer through entry points."""
    mode: str | None = None
    """Inductor's mode ("max-autotune", ...): torch.compile forbids `mode=` beside `options=`."""

    @property
    def weighs_speed(self) -> bool:
        """Whether a site that would run no faster quantized is to stay in full precision."""
        for_memory = self.weights == "release" or self.scheme.weight_form.nibbles
        asked = self.recipe is not None or self.low_scheme is not None  # for these very sites
        return self.selection == "auto" and not for_memory and not asked

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of our options, as a user gives them."""
        own = [f.name for f in fields(cls) if f.name != "rule"]
        return (*own, *_RULE_OPTIONS)


_RULE_OPTIONS = {
    "delta": "delta",
    "high_first": "high_first",
    "high_last": "high_last",
    "steps": "steps",
    "bits_schedule": "schedule",
}
"""Option -> field of SwitchRule."""


def split_options(options: Mapping[str, Any] | None) -> tuple[CompileOptions, dict[str, Any]]:
    """Split user options into ours (checked) and the rest (Inductor's, unchecked here).

    Raises OptionError (SchemeError for a bad scheme) for a value of a wrong type or range.
    """
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise OptionError(f"options must be a dict, not {type(options).__name__}")
    for key in options:
        if not isinstance(key, str):
            raise OptionError(f"option names are strings; got {key!r}")
    names = CompileOptions.names()
    ours = {key: value for key, value in options.items() if key in names}
    rest = {key: value for key, value in options.items() if key not in names}
    readers = {
        "scheme": _scheme,
        "low_scheme": QuantScheme.parse,
        "recipe": _recipe,
        "keep": _patterns,
        "extra_passes": partial(_listed, "extra_passes"),
        "extra_templates": partial(_listed, "extra_templates"),
    }
    ours |= {key: read(ours[key]) for key, read in readers.items() if key in ours}
    for key in ("strict", "plugins"):
        if not isinstance(ours.get(key, False), bool):
            raise OptionError(f"option {key!r} is True or False, not {ours[key]!r}")
    choices = {
        "weights": WEIGHTS_MODES,
        "attention": ATTENTION_MODES,
        "quantize_kernels": QUANTIZE_KERNELS,
        "selection": SELECTION_MODES,
    }
    for key, allowed in choices.items():
        if ours.get(key, allowed[0]) not in allowed:
            raise OptionError(f"option {key!r} is one of {allowed}, not {ours[key]!r}")
    if not isinstance(ours.get("mode"), str | None):
        raise OptionError(f"option 'mode' is the name of an Inductor mode, not {ours['mode']!r}")
    return CompileOptions(**_with_recipe(_switching(ours))), rest


def unknown_option(key: str, inductor_names: Iterable[str]) -> OptionError:
    """The error for a key that is neither ours nor Inductor's, with the nearest names."""
    names = CompileOptions.names()
    near = difflib.get_close_matches(key, [*names, *inductor_names], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return OptionError(
        f"unknown option {key!r}{hint} viditq's options are {', '.join(names)}; "
        "every option of torch.compile's inductor backend is accepted too"
    )


def _scheme(value: Any) -> Any:
    """A QuantScheme, or the name of a pair of them as it was given."""
    name = value.strip().lower() if isinstance(value, str) else value
    return name if isinstance(name, str) and name in SWITCHED else QuantScheme.parse(value)


def _switching(ours: dict[str, Any]) -> dict[str, Any]:
    """Take a switched pair of schemes and its rule out of the options. Raises OptionError."""
    asked = {key: value for key, value in ours.items() if key in _RULE_OPTIONS}
    ours = {key: value for key, value in ours.items() if key not in asked}
    name = ours.get("scheme")
    pair = SWITCHED.get(name) if isinstance(name, str) else None
    if pair is not None:
        ours |= {
            "scheme": QuantScheme.parse(pair[1]),
            "low_scheme": ours.get("low_scheme", QuantScheme.parse(pair[0])),
        }
    recipe = ours.get("recipe")
    default = QuantScheme.parse("w8a8") if recipe is None else recipe.scheme
    low, high = ours.get("low_scheme"), ours.get("scheme", default)
    if low is None:
        if asked:
            raise OptionError(
                f"options {sorted(asked)} are for a scheme that switches its bits: {sorted(SWITCHED)}"
            )
        return ours
    if (low.weight_form, low.rotate) != (high.weight_form, high.rotate):
        raise OptionError(
            f"low_scheme={str(low)!r} and scheme={str(high)!r} share no weights: they may differ in the input alone"
        )
    if "bits_schedule" in asked:
        asked["bits_schedule"] = _listed("bits_schedule", asked["bits_schedule"])
    return ours | {"rule": SwitchRule(**{_RULE_OPTIONS[key]: value for key, value in asked.items()})}


def _with_recipe(ours: dict[str, Any]) -> dict[str, Any]:
    """Take the scheme and what is kept from the recipe, if there is one. Raises OptionError for what contradicts it."""
    recipe = ours.get("recipe")
    if recipe is None:
        return ours
    scheme = ours.get("scheme", recipe.scheme)
    if scheme != recipe.scheme:
        raise OptionError(
            f"scheme={str(scheme)!r} beside a recipe for {str(recipe.scheme)!r}: give the recipe alone"
        )
    if recipe.ranges > 1 and ours.get("low_scheme") is not None:
        raise OptionError(
            "a recipe with ranges of the timestep chooses each step's bits, and so does a pair of schemes that "
            "switches them: give one of the two, or recipe.at_range(i) beside the pair"
        )
    return ours | {"scheme": recipe.scheme, "keep": (*ours.get("keep", ()), *recipe.keep)}


def _recipe(value: Any) -> Recipe | None:
    if value is None or isinstance(value, Recipe):
        return value
    if not isinstance(value, str | PathLike):
        raise OptionError(f"option 'recipe' is a Recipe or the directory of a saved one, not {value!r}")
    return Recipe.load(value)


def _listed(key: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise OptionError(f"option {key!r} is a list, not {value!r}")
    return tuple(value)


def _patterns(value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple | set | frozenset) or not all(
        isinstance(p, str) and p for p in patterns
    ):
        raise OptionError(f"option 'keep' is a pattern or a list of patterns (strings), not {value!r}")
    return tuple(patterns)
