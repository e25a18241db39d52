"""Our options of torch.compile(..., options={...}), told apart from Inductor's and checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from viditq_fx.errors import OptionError
from viditq_fx.scheme import QuantScheme

WEIGHTS_MODES = ("keep", "release")
ATTENTION_MODES = ("auto", "int8", "keep")
SELECTION_MODES = ("auto", "always")


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """The options that viditq_fx itself understands; every other key is Inductor's."""

    scheme: QuantScheme = field(default_factory=lambda: QuantScheme.parse("w8a8"))
    """Scheme of every site that the policy quantizes, by name: "w8a8", "w8a7", "w4a8", "w4a8-g128" or "fp8"."""
    keep: tuple[str, ...] = ()
    """Sites to leave in full precision besides the policy's: globs over module paths, or roles."""
    strict: bool = False
    """Raise when a planned site is refused or the graph cannot be quantized."""
    weights: str = "keep"
    """"keep": full-precision weights stay as they are, packed ones are added. "release": their memory
    is given back once they are packed; the model then runs only through its compiled form."""
    attention: str = "auto"
    """"auto": quantize attention where a kernel of ours is faster than SDPA. "int8": wherever its form allows,
    by the reference where there is no kernel (slow). "keep": leave SDPA alone."""
    selection: str = "auto"
    """"auto": on a GPU, a site that is expected to be no faster quantized stays in full precision, unless memory is
    what was asked for (4-bit weights, or weights="release"). "always": quantize whatever the policy plans."""
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
        return self.selection == "auto" and self.weights == "keep" and self.scheme.weight_bits == 8

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of our options."""
        return tuple(f.name for f in fields(cls))


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
        "scheme": QuantScheme.parse,
        "keep": _patterns,
        "extra_passes": partial(_listed, "extra_passes"),
        "extra_templates": partial(_listed, "extra_templates"),
    }
    ours |= {key: read(ours[key]) for key, read in readers.items() if key in ours}
    for key in ("strict", "plugins"):
        if not isinstance(ours.get(key, False), bool):
            raise OptionError(f"option {key!r} is True or False, not {ours[key]!r}")
    choices = {"weights": WEIGHTS_MODES, "attention": ATTENTION_MODES, "selection": SELECTION_MODES}
    for key, allowed in choices.items():
        if ours.get(key, allowed[0]) not in allowed:
            raise OptionError(f"option {key!r} is one of {allowed}, not {ours[key]!r}")
    if not isinstance(ours.get("mode"), str | None):
        raise OptionError(f"option 'mode' is the name of an Inductor mode, not {ours['mode']!r}")
    return CompileOptions(**ours), rest


def unknown_option(key: str, inductor_names: Iterable[str]) -> OptionError:
    """The error for a key that is neither ours nor Inductor's, with the nearest names."""
    names = CompileOptions.names()
    near = difflib.get_close_matches(key, [*names, *inductor_names], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return OptionError(
        f"unknown option {key!r}{hint} viditq's options are {', '.join(names)}; "
        "every option of torch.compile's inductor backend is accepted too"
    )


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
