"""`viditq explain --errors`: the samples that it runs before the call that is explained."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from viditq_fx.calibration.findings import Findings
from viditq_fx.calibration.run import collect
from viditq_fx.cli.target import Target, load_both
from viditq_fx.demo.config import DEFAULT_STEPS


def load_and_collect(
    text: str,
    console: Console,
    *,
    keep: Sequence[str],
    samples: int = 1,
    steps: int = DEFAULT_STEPS,
    branches: int = 1,
) -> tuple[Target, Findings]:
    """Load what TARGET names, run its samples once, and say what was seen; raises ViditqError for mistakes."""
    with console.status(f"loading {text} ..."):
        sampling, call = load_both(text, samples, steps, seed=0)
    # rows=0: nothing is compared by its error here, so no row is kept.
    findings = collect(sampling.model, sampling.run, keep=keep, branches=branches, rows=0, progress=True)
    if call is None:
        assert findings.first_call is not None, "collect raises where the model was not called"
        args, kwargs = findings.first_call
        call = Target(model=sampling.model, args=args, kwargs=kwargs)
    return call, findings
