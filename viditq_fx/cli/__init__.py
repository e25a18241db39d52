"""The command line: `viditq demo`, `viditq explain`, `viditq doctor`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; entry point of the `viditq` script."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f'viditq: the command line needs {error.name}; run: pip install "viditq_fx[cli]"', file=sys.stderr
        )
        raise SystemExit(1) from None
    from viditq_fx.cli.app import app

    app()
