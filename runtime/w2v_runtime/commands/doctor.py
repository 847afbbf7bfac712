"""``w2v-doctor``: shows what works on this machine, and for what does not, how to fix it."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from w2v_runtime.commands import terminal

if TYPE_CHECKING:
    from w2v_runtime.commands.examination import Check

NAME: Final = "w2v-doctor"
_STYLES: Final = {"ok": "green", "note": "yellow", "problem": "bold red"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="A list of the checks, for scripts.")] = False,
    _version: Annotated[bool, terminal.version_option(NAME)] = False,
) -> None:
    """Examine the engine, its devices, threads, folders, bundles and decoders. Exit code 1 if there is a problem."""
    with terminal.command(NAME):
        from w2v_runtime.commands.examination import examine

        checks = examine()
        if as_json:
            print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
        else:
            _show(checks)
    sys.exit(1 if any(check.state == "problem" for check in checks) else 0)


def _show(checks: list[Check]) -> None:
    """Print the checks as a table; below it the fixes, on lines of their own that can be copied."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a C locale lacks most letters
    table = Table("state", "what", "detail", box=None, pad_edge=False)
    for check in checks:
        table.add_row(Text(check.state, _STYLES[check.state]), check.name, Text(terminal.printable(check.detail)))
    Console(width=None if sys.stdout.isatty() else _longest(checks)).print(table)
    for title, state in (("To fix:", "problem"), ("Where it is wanted:", "note")):
        fixes = [f"  {check.name}: {check.fix}" for check in checks if check.state == state and check.fix]
        if fixes:
            terminal.show("", title, *fixes)


def _longest(checks: list[Check]) -> int:
    """The width in columns at which no row is wrapped, for a file or a pipe."""
    return max(len(terminal.printable(check.detail)) for check in checks) + 40


def main() -> None:
    """The console script."""
    terminal.main(app, NAME)
