"""The models that the demo compares: one in full precision and one for each scheme, each loaded afresh."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from viditq_fx.demo.config import DemoConfig, DemoError

ModelLoader = Callable[[torch.dtype], nn.Module]
"""Gives a new instance of the demo's model, on the CPU, in the dtype asked for."""

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(kw_only=True)
class Variant:
    """One compiled model under its name; calling it calls the model."""

    name: str
    """"fp32" (or "bf16"), or the scheme."""
    scheme: str | None
    """None for full precision, compiled by plain Inductor."""
    model: nn.Module
    dtype: torch.dtype
    device: torch.device
    compile_seconds: float = 0.0
    """Time of the first call: tracing, passes, code generation, C++ or Triton compilation."""
    recorded: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Inputs of the calls that `record` asked for, by the call's number."""
    record: frozenset[int] = frozenset()
    calls: int = 0

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        if self.calls in self.record:
            self.recorded[self.calls] = {"hidden_states": hidden_states.clone(), **kwargs}
        self.calls += 1
        return self.model(hidden_states, **kwargs)

    @torch.no_grad()
    def step(self, inputs: Mapping[str, Any]) -> Tensor:
        """Run the model once on recorded inputs; the prediction in float32 on the CPU."""
        given = {key: self.placed(value) for key, value in inputs.items()}
        return self.model(**given)[0].float().cpu()

    def placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.ndim == 4 else None)


def choose_device(name: str) -> torch.device:
    """The device of a run. Raises DemoError for CUDA where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def baseline_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs that have it, as such models are run there; float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def variant_names(config: DemoConfig, device: torch.device) -> tuple[str, ...]:
    """Full precision first, then the schemes: w8a7 exists for CPUs, so CUDA runs it only on demand."""
    schemes = config.schemes or (("w8a8",) if device.type == "cuda" else ("w8a8", "w8a7"))
    return (_DTYPE_NAMES[baseline_dtype(device)], *schemes)


def build_variant(name: str, load_model: ModelLoader, device: torch.device) -> Variant:
    """Load a model and mark its blocks for compilation; nothing is compiled before the first call.

    Each repeated block is compiled, as diffusers' `compile_repeated_blocks` does: the blocks share
    their code, which compiles in half the time of the whole model. Full precision goes through plain
    Inductor, a scheme through `backend="viditq"`, with its full-precision weights given back.
    """
    dtype = baseline_dtype(device)
    scheme = None if name in _DTYPE_NAMES.values() else name
    model = load_model(dtype).to(device).eval().requires_grad_(False)
    # The embedder gives a transposed view and the blocks plain tensors: as it is, the block would be
    # compiled twice, once for each memory layout.
    model.get_submodule("pos_embed").register_forward_hook(_contiguous)
    for block in model.get_submodule("transformer_blocks").children():
        if scheme is None:
            block.compile()
        else:
            block.compile(backend="viditq", options={"scheme": scheme, "weights": "release"})
    return Variant(name=name, scheme=scheme, model=model, dtype=dtype, device=device)


def _contiguous(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.contiguous()


def compile_variant(variant: Variant, inputs: Mapping[str, Any]) -> None:
    """Make the first call, which compiles, and note how long it took."""
    start = time.perf_counter()
    variant.step(inputs)
    variant.compile_seconds = time.perf_counter() - start


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of memory of a model's parameters and buffers, shared storage counted once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
