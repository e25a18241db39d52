"""How the command line fails: one line on stderr and a fixed exit code, never a traceback for a user's mistake."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from viditq_fx.errors import ViditqError

USER_ERROR = 2
INTERRUPTED = 130
# typer's own errors, under the one name that is the same whether typer brings click or imports it.
_UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


class OneLineErrors(TyperGroup):
    """Commands whose usage errors take one line instead of a panel."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **settings: Any) -> Any:
        """Run and leave with the exit code, as click's standalone mode does."""
        settings["standalone_mode"] = False
        code: Any = USER_ERROR
        try:
            code = super().main(args, *rest, **settings)
        except _UsageError as error:
            message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
            if message:  # none when the help was printed for want of a command
                fail(message)
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def fail(message: str) -> NoReturn:
    """Say what is wrong and leave with the exit code of a user's error."""
    line = " ".join(message.split())
    print(f"viditq: {line}", file=sys.stderr)
    raise SystemExit(USER_ERROR)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can cause inside the block into one line on stderr and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        print("viditq: interrupted, nothing was written", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except ViditqError as error:
        fail(str(error))
    except ImportError as error:
        hint = '; run: pip install "viditq_fx[demo]"' if error.name in _EXTRAS else ""
        fail(f"{error}{hint}")
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise SystemExit(1) from None
        if error.errno is None or (error.filename is None and error.errno != errno.ENOSPC):
            fail(str(error))
        fail(f"cannot write {error.filename or 'the results'}: {error.strerror}")
    except Exception as error:
        # torch.compile wraps what a backend raises; its classes are not imported for this.
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, ViditqError):
            fail(str(inner))
        if isinstance(inner, OSError) and inner.errno == errno.ENOSPC:
            fail(
                f"cannot write compiled code (TORCHINDUCTOR_CACHE_DIR names another folder): {inner.strerror}"
            )
        if type(inner).__name__ == "InvalidCxxCompiler":
            fail(f"{inner}; install g++ or set CXX; viditq doctor says what is found")
        raise


_EXTRAS = {"diffusers", "jinja2", "matplotlib"}
