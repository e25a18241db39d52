"""Statistics on disk between samples, so that an interrupted calibration goes on where it was.

One file for each rank, written whole after each sample: safetensors, its description in the header's metadata.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from viditq_fx.calibration.ledger import Ledger
from viditq_fx.calibration.ranks import ranks
from viditq_fx.calibration.sightings import Sightings
from viditq_fx.errors import RecipeError
from viditq_fx.whole_file import write_whole

_FORMAT = "viditq_fx.calibration 2"


def fingerprint(model: nn.Module) -> str:
    """Changes with the model's class, its parameters' names, shapes and dtypes, and a few values of each."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if value.device.type != "meta" and value.numel():
            few = value.detach().flatten()[:: max(1, value.numel() // 8)][:8]
            digest.update(few.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


class Resume:
    """The file of one rank. `request` says what was asked for: another request does not go on with it."""

    def __init__(self, folder: str | Path, request: dict[str, Any]) -> None:
        rank, world = ranks()
        self.path = Path(folder) / f"statistics-{rank + 1}-of-{world}.safetensors"
        self.request = {key: json.dumps(value, sort_keys=True) for key, value in request.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"calibrate: resume={str(folder)!r}: {error.strerror or error}") from error

    def load(self, ledger: Ledger, sightings: Sightings) -> int:
        """Count what the file holds and which linears were seen; returns how many samples that is, 0 without a file.

        Raises RecipeError for a file of another request, or one that cannot be read.
        """
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                header = dict(file.metadata() or {})
                self._check(header)
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            ledger.absorb(json.loads(header["ledger"]), tensors)
            sightings.absorb(json.loads(header["sightings"]))
            return int(header["samples"])
        except RecipeError:
            raise
        except (
            SafetensorError,
            OSError,
            KeyError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
        ) as error:
            raise RecipeError(
                f"{self.path}: not the statistics of a calibration, or damaged ({error}); delete it to begin anew"
            ) from error

    def save(self, ledger: Ledger, sightings: Sightings, samples: int) -> None:
        """Write what was counted, whole or not at all. Raises RecipeError where that cannot be."""
        meta, tensors = ledger.dump()
        header = {"format": _FORMAT, "samples": str(samples), **self.request}
        header |= {"ledger": json.dumps(meta), "sightings": json.dumps(sightings.dump())}
        try:
            write_whole(self.path, save({k: v.contiguous() for k, v in tensors.items()}, header))
        except OSError as error:
            raise RecipeError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def _check(self, header: dict[str, str]) -> None:
        if header.get("format") != _FORMAT:
            raise RecipeError(f"{self.path}: holds no statistics of this version; delete it to begin anew")
        for key, value in self.request.items():
            if header.get(key) != value:
                raise RecipeError(
                    f"{self.path}: was begun with {key} {header.get(key)}, now {value} is asked for; give another "
                    "folder, or delete it to begin anew"
                )
