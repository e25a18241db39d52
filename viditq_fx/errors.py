"""Errors that a user can cause, each a ValueError that says what to do."""

from __future__ import annotations


class ViditqError(ValueError):
    """Base of every error that viditq_fx raises for a user's mistake."""


class OptionError(ViditqError):
    """An option of `torch.compile(..., backend="viditq", options=...)` is unknown or has a wrong value."""


class SchemeError(ViditqError):
    """A quantization scheme cannot be parsed or is not available."""


class StrictError(ViditqError):
    """`strict=True` and a planned site was refused."""


class ReleasedWeightError(ViditqError):
    """A weight whose full-precision storage was released is used in full precision."""


class WeightError(ViditqError):
    """A weight cannot be packed: on `meta`, not finite, or otherwise unusable."""


class RecipeError(ViditqError):
    """A recipe cannot be read, does not fit the model, or calibration cannot be carried out."""


class KernelBuildError(RuntimeError):
    """A kernel of ours cannot be compiled or loaded on this machine; another one computes in its place."""


class VerifyError(AssertionError):
    """A pass left the graph in a state that breaks an invariant: a bug of ours or of an extra pass."""


def other_positions(where: str, known: int, read: object) -> RecipeError:
    """The error of a site that reads sequences of other lengths than its scheme `-position` has scales for."""
    return RecipeError(
        f"{where}: the recipe has input scales for {known} positions of a token, and here it reads {read}; "
        "calibrate at the resolution, number of frames and text length that you run, or choose a scheme with '-static' "
        "or with scales found at run time"
    )
