"""Seventeen diffusion transformers of diffusers, tiny and with random weights, to run the backend on.

    dit = TINY_DITS["wan"]
    model = dit.build(layers=3)
    output = dit.run(model, dit.make_inputs(size=2, batch=1))

Weights and inputs depend on seeds alone. Random weights have no activation outliers: these models
serve matching, numerics and shape tests, never claims about quality. The entries themselves stand
in `tiny_dit_entries`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, HEAD_DIM = 128, 4, 32
SIZES = 5
"""Resolutions (or lengths) that every entry can draw inputs of: `size` is 0 .. SIZES - 1."""
_BLANK_STD = 0.1
_GAIN = 3**0.5
"""Undoes torch's default initialisation, which shrinks values by this factor at every linear."""
_NOT_CAST = re.compile(r"ids$|rotary|mask|shapes|padding|meta_size")

Counts = Mapping[str, int]


@dataclass(kw_only=True)
class Draw:
    """Draws the inputs of one call: a seeded generator, a noise level, a size and a batch."""

    generator: torch.Generator
    t: float
    size: int
    batch: int

    @property
    def height(self) -> int:
        """Latent height: even, at least 12."""
        return 12 + 2 * self.size

    @property
    def width(self) -> int:
        """Latent width: even, and not the height, so that mixing the two up shows."""
        return 14 + 4 * self.size

    @property
    def text(self) -> int:
        """Tokens of text; 34 or more, so that a text linear is never batch-sized."""
        return 34 + 3 * self.size

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self.generator)

    def classes(self, count: int) -> Tensor:
        """One class label for each sample."""
        return torch.randint(0, count, (self.batch,), generator=self.generator)

    def time(self, scale: float = 1000.0, dtype: torch.dtype = torch.long) -> Tensor:
        """One timestep for each sample: noise level x scale."""
        return torch.full((self.batch,), self.t * scale).to(dtype)

    def mask(self, tokens: int, dtype: torch.dtype = torch.bool, padded: int = 3) -> Tensor:
        """Ones, with `padded` zeros at the end of each row."""
        mask = torch.ones(self.batch, tokens)
        mask[:, tokens - padded :] = 0
        return mask.to(dtype)


@dataclass(frozen=True, kw_only=True)
class TinyDit:
    """One class of diffusers in a tiny configuration."""

    name: str
    class_name: str
    config: Callable[[int], dict[str, Any]]
    """Layers -> constructor arguments."""
    inputs: Callable[[Draw], dict[str, Any]]
    roles: Callable[[int], Counts]
    """Layers -> linears by role; conditioning, stems and heads included."""
    batches: tuple[int, ...] = (1, 2)
    """Batches that `make_inputs` accepts; the last one is the default."""
    prepare: Callable[[], None] | None = None
    """Called before the class is used."""

    @property
    def model_class(self) -> type[nn.Module]:
        """The class in diffusers."""
        return getattr(diffusers, self.class_name)

    def build(self, layers: int = 2, seed: int = 0) -> nn.Module:
        """The model in eval mode, fp32, without zero-initialised parameters (they would hide blocks)."""
        if self.prepare is not None:
            self.prepare()
        with _deterministic(seed):
            model = self.model_class(**self.config(layers)).float().eval().requires_grad_(False)
        _strengthen(model, seed)
        return model

    def make_inputs(
        self, seed: int = 0, t: float = 0.5, size: int = 0, batch: int | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of one call; `size` grows tokens of image and text, `t` in [0, 1) is the noise."""
        batch = self.batches[-1] if batch is None else batch
        if batch not in self.batches or not 0 <= size < SIZES:
            raise ValueError(f"{self.name}: batch in {self.batches} and 0 <= size < {SIZES}")
        generator = torch.Generator().manual_seed(seed)
        kwargs = self.inputs(Draw(generator=generator, t=t, size=size, batch=batch))
        if "return_dict" in inspect.signature(self.model_class.forward).parameters:
            kwargs["return_dict"] = False
        return kwargs

    def run(self, model: Callable[..., Any], kwargs: Mapping[str, Any]) -> Tensor:
        """All outputs of one call without gradients, flattened into one vector."""
        with torch.no_grad():
            return torch.cat([t.flatten() for t in tensors_of(model(**kwargs))])


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors_of(item)] if isinstance(value, list | tuple) else []


def cast(model: nn.Module, kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Turn the model to `dtype` in place as pipelines do, and return the inputs that suit it.

    What the class keeps in fp32 stays so, and so do positions, rotary tables and masks.
    """
    keep = set(getattr(type(model), "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not keep & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return {key: _cast_value(key, value, dtype) for key, value in kwargs.items()}


def _cast_value(key: str, value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast_value(key, item, dtype) for item in value]
    if isinstance(value, Tensor) and value.is_floating_point() and not _NOT_CAST.search(key):
        return value.to(dtype)
    return value


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB; infinite when both are equal."""
    reference, other = reference.double(), other.double()
    noise = (reference - other).square().mean()
    return float(10 * torch.log10(reference.square().mean() / noise)) if noise > 0 else float("inf")


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seed the global generator, and fill torch.empty with NaN so that what a class leaves blank shows."""
    state, strict = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.set_rng_state(state)


def _strengthen(model: nn.Module, seed: int) -> None:
    """Let every branch count in the output, so that a wrong linear anywhere shows in it.

    Parameters that a class leaves zero (adaLN-zero) or uninitialised get small values; linears keep
    the variance of their input.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if not parameter.isfinite().all() or not parameter.any():
                parameter.copy_(_BLANK_STD * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(_GAIN)


def without_torchvision() -> None:
    """Stand in for the one function of torchvision that Cosmos calls, where it is not installed."""
    from diffusers.models.transformers import transformer_cosmos as module

    def resize(image: Tensor, size: tuple[int, int], interpolation: Any = None) -> Tensor:
        return F.interpolate(image, size=tuple(size), mode="nearest")

    if not hasattr(module, "transforms"):
        modes = SimpleNamespace(NEAREST="nearest")
        module.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=modes
        )


def grid_positions(frames: int, height: int, width: int) -> Tensor:
    """Position (frame, row, column) of every token of a video: fp32 [frames * height * width, 3]."""
    axes = torch.meshgrid(*(torch.arange(n) for n in (frames, height, width)), indexing="ij")
    return torch.stack(axes, -1).reshape(-1, 3).float()


def __getattr__(name: str) -> Any:
    if name != "TINY_DITS":
        raise AttributeError(name)
    from tests.models.tiny_dit_entries import ENTRIES

    return {entry.name: entry for entry in ENTRIES}
