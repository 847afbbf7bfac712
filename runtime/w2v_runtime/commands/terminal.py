"""What the commands share: errors as one sentence and an exit code, signals that stop a run, the version."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO

from w2v_models.errors import W2VError

if TYPE_CHECKING:
    import typer

    from w2v_models.manifest import Source

DISTRIBUTION: Final = "w2v-onnx"
INTERRUPTED: Final = 130


def main(app: typer.Typer, name: str) -> NoReturn:
    """Run a command as its console script, and exit with its code.

    A usage error comes from typer, which quotes the arguments; they may be names of files, so they are made printable.
    """
    import typer

    _open_closed_streams()
    usage_error: Any = typer.BadParameter.__bases__[0]  # click's class, or that of typer's own copy of click
    try:
        code = app(prog_name=name, standalone_mode=False)
    except usage_error as error:
        told = io.StringIO()
        error.show(told)
        show(*told.getvalue().rstrip("\n").split("\n"), file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


#: Standard streams that whoever started the command had closed.
_CLOSED = set[str]()


def was_closed(name: str) -> bool:
    """Whether ``stdin``, ``stdout`` or ``stderr`` was closed when the command began, as daemons close them."""
    return name in _CLOSED


def _open_closed_streams() -> None:
    """Let closed standard streams lead nowhere: a file of ours would get their descriptor, and what libraries print."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        _CLOSED.add(name)
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        if name != "stdin":
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the process


@contextlib.contextmanager
def command(name: str) -> Iterator[None]:
    """Run a command's body: whatever goes wrong becomes one sentence on standard error and the command's exit code.

    SIGTERM and SIGHUP stop it like Ctrl-C. A traceback is shown only with ``W2V_DEBUG=1``.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(name, "interrupted")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except W2VError as error:
        _raise_in_debug()
        say(name, f"error: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        _raise_in_debug()
        where = f"{error.filename}: " if error.filename else ""
        say(name, f"error: {where}{error.strerror or error}.")
        sys.exit(1)
    except Exception as error:
        _raise_in_debug()
        say(name, f"error: unexpected {type(error).__name__}: {error} (W2V_DEBUG=1 shows where)")
        sys.exit(1)


def _raise_in_debug() -> None:
    if os.environ.get("W2V_DEBUG") == "1":
        raise  # noqa: PLE0704 - called from an except clause only


def version_option(name: str) -> Any:
    """The option ``--version`` of a command: prints its name and the distribution's version, and exits."""
    import typer

    def show(wanted: bool) -> None:
        if wanted:
            print(f"{name} {importlib.metadata.version(DISTRIBUTION)}")
            raise typer.Exit

    return typer.Option("--version", callback=show, is_eager=True, help="Show the version and exit.")


def count_of(number: int, noun: str) -> str:
    """A number of things: ``1 file``, ``5 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    r"""Escape what a terminal would obey or not show: such a character becomes an escape such as ``\x1b``.

    These are the characters that Unicode calls neither printable nor a space: controls and newlines, marks that turn
    the direction of writing, characters without width, and the bytes of paths that are not UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text)


def show(*lines: str, file: TextIO | None = None) -> None:
    """Print lines on standard output, or on ``file``; a character that its encoding lacks is escaped."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    for line in lines:
        print(printable(line).encode(encoding, "backslashreplace").decode(encoding), file=file)


def show_path(path: Path) -> None:
    """Print a path alone on standard output: escaped on a terminal, else as its exact bytes, for scripts."""
    if sys.stdout.isatty():
        show(str(path))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")


def say(name: str, message: str) -> None:
    """Print the line ``name: message`` on standard error."""
    text = f"{printable(f'{name}: {message}')}\n".encode(sys.stderr.encoding or "utf-8", "backslashreplace")
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), text)


def note_random_weights(name: str, source: Source) -> None:
    """Say plainly that a bundle's weights are random."""
    if source.random:
        say(name, f"note: {source.model} here has seeded random weights (seed {source.seed}); embeddings mean nothing.")
