"""A recipe's two files: recipe.json, to be read and compared, and recipe.safetensors; see docs/recipe_format.md.

Nothing in them is trusted: whatever does not hold is a RecipeError that names the file. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from viditq_fx.errors import RecipeError
from viditq_fx.whole_file import write_whole

FORMAT, VERSION, WITH_RANGES = "viditq_fx.recipe", 1, 2
"""A recipe with schemes by range of the timestep is of another version: who knows no ranges must not apply it."""
JSON_FILE, TENSOR_FILE = "recipe.json", "recipe.safetensors"
_LARGEST_JSON = 64 << 20
_LARGEST_TENSORS = 4 << 30
_AGAIN = "calibrate again, or copy the recipe again"


def write_recipe(
    folder: str | os.PathLike[str], document: Mapping[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Write both files of a recipe into a folder, which is made; each whole, under its final name at once.

    The document's "version" is VERSION unless it has one.
    Raises RecipeError where they cannot be written.
    """
    path = Path(folder)
    content = save({name: value.contiguous() for name, value in sorted(tensors.items())})
    head = {"format": FORMAT, "version": VERSION, "tensors_sha256": hashlib.sha256(content).hexdigest()}
    try:
        text = json.dumps({**head, **document}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        encoded = f"{text}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"cannot write the recipe {path}: it holds what JSON has not ({error})") from error
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Last the one that names the other by its digest: what is read half-way does not fit, and says so.
        write_whole(path / TENSOR_FILE, content)
        write_whole(path / JSON_FILE, encoded)
    except OSError as error:
        raise RecipeError(f"cannot write the recipe {path}: {error.strerror or error}") from error
    return path


def read_recipe(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(recipe.json's object, tensors by name) of a recipe's folder. Raises RecipeError for anything else."""
    path = Path(folder)
    if not path.is_dir():
        what = "is a file, not a recipe's folder" if path.exists() else "does not exist"
        raise RecipeError(f"recipe {path}: {what}; give the folder that Recipe.save wrote")
    document = _json(path / JSON_FILE)
    if document.get("format") != FORMAT:
        raise RecipeError(f"{path / JSON_FILE}: format {document.get('format')!r} is not {FORMAT!r}")
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version not in (VERSION, WITH_RANGES):
        raise RecipeError(
            f"{path / JSON_FILE}: version {version!r}; this viditq_fx reads versions {VERSION} and {WITH_RANGES}: "
            "upgrade it, or calibrate again"
        )
    content = _read(path / TENSOR_FILE, _LARGEST_TENSORS)
    if hashlib.sha256(content).hexdigest() != document.get("tensors_sha256"):
        raise RecipeError(
            f"{path / TENSOR_FILE}: is damaged, or of another recipe than {JSON_FILE}; {_AGAIN}"
        )
    try:
        return document, load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise RecipeError(f"{path / TENSOR_FILE}: is no safetensors file ({error}); {_AGAIN}") from error


def _read(path: Path, largest: int) -> bytes:
    if not path.is_file():
        what = "is no plain file" if path.exists() else "is missing"
        raise RecipeError(f"{path}: {what}; a recipe is {JSON_FILE} and {TENSOR_FILE}: {_AGAIN}")
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) > largest:
        raise RecipeError(f"{path}: has more than {largest} bytes, which no recipe has; {_AGAIN}")
    return content


def _json(path: Path) -> dict[str, Any]:
    content = _read(path, _LARGEST_JSON)
    try:
        document = json.loads(
            content.decode(), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_no_repeats
        )
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: is no JSON text that a recipe could be ({error}); {_AGAIN}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: holds {type(document).__name__}, not an object; {_AGAIN}")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found
