"""``w2v-merge``: turns the command line into a merge of shards, prints its summary line, sets the exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from w2v_runtime.commands import terminal
from w2v_runtime.commands.embed import FINISHED_WITH_FAILURES

NAME: Final = "w2v-merge"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(no_args_is_help=True)
def merge(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="PART", help="Outputs of w2v-embed --shard, all of one run, in any order."),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="By suffix .npz .csv .parquet .h5 .jsonl .scp; a folder (ends in / or exists) gets .npy files.",
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    _version: Annotated[bool, terminal.version_option(NAME)] = False,
) -> None:
    """Join the outputs of w2v-embed --shard runs into one, in the order of the inputs."""
    with terminal.command(NAME):
        from w2v_models.errors import RefusedError, StorageError
        from w2v_runtime.files.lock import locked
        from w2v_runtime.files.outputs import FAILURES_SUFFIX, beside
        from w2v_runtime.runs import merge as merging
        from w2v_runtime.stores import output_format

        kind = output_format(output)
        if kind == "stdout":
            raise RefusedError("a merged output cannot go to standard output; name a file or folder.")
        path = Path(output)
        with locked(path) as lock:
            try:
                joined = merging.merge(parts, path, kind, overwrite, lock.check)
            except OSError as error:
                where = error.filename or f"while writing {path}"
                raise StorageError(f"{where}: {error.strerror or error}. The parts are as they were.") from error
        where = f"see {beside(path, FAILURES_SUFFIX)}" if joined.listed else "listed where --failures said"
        failed = f", {joined.failed} failed ({where})" if joined.failed else ""
        terminal.say(NAME, f"{joined.embedded} inputs from {len(parts)} parts{failed} → {path}")
    sys.exit(FINISHED_WITH_FAILURES if joined.failed else 0)


def main() -> None:
    """The console script."""
    terminal.main(app, NAME)
