"""The command ``w2v-export``: options, progress and tables; the work is done by ``exporter``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Final

import typer

from w2v_models.errors import EngineError
from w2v_runtime.commands import terminal

NAME: Final = "w2v-export"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(no_args_is_help=True)
def export(
    model: Annotated[str, typer.Option(help="Hub id, or a checkpoint folder.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The bundle's folder. [default: <org>--<name> in $W2V_HOME or the user's cache]"
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of fp32, int8, fp16; several with commas in one bundle.")] = "fp32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    language: Annotated[
        str | None, typer.Option(metavar="LANG", help="Adapter and labels of an MMS checkpoint. [default: its own]")
    ] = None,
    no_head: Annotated[bool, typer.Option("--no-head", help="Export the encoder alone.")] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="The true architecture with seeded random weights; no network.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    check: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="AUDIO", exists=True, dir_okay=False, help="Prove the bundle on this recording too; repeatable."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what the hub's cache holds.")] = False,
    _version: Annotated[bool, terminal.version_option(NAME)] = False,
) -> None:
    """Export a wav2vec 2.0 checkpoint to an ONNX bundle, proven equal to PyTorch."""
    with terminal.command(NAME):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

        from w2v_export.refusals import refuse_early
        from w2v_runtime.commands.models import parity_table
        from w2v_runtime.commands.tables import width_of

        precisions = precision.split(",")
        refuse_early(model, output, precisions, revision, random_weights, overwrite, offline, language)
        console = Console(stderr=True)
        exporter = _import_exporter()
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            tasks: dict[str, TaskID] = {}

            def report(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    for task in tasks.values():
                        progress.update(task, completed=progress.tasks[task].total)
                    tasks[stage] = progress.add_task(terminal.printable(stage))
                    if not console.is_terminal:
                        terminal.say(NAME, stage)
                progress.update(tasks[stage], completed=done, total=total)

            try:
                bundle = exporter.export_bundle(
                    model,
                    output,
                    precision=precisions,
                    revision=revision,
                    language=language,
                    head=not no_head,
                    random_weights=random_weights,
                    seed=seed,
                    check=check or [],
                    overwrite=overwrite,
                    offline=offline,
                    report=report,
                )
            except exporter.UnprovenError as error:
                progress.stop()
                terminal.show(*parity_table(error.rows, error.precision).lines(width_of(sys.stderr)), file=sys.stderr)
                raise
        for name, entry in bundle.manifest.precisions.items():
            terminal.show(*parity_table(entry.parity, name).lines(width_of(sys.stderr)), file=sys.stderr)
        terminal.note_random_weights(NAME, bundle.manifest.source)
        terminal.show_path(bundle.folder)


def _import_exporter() -> ModuleType:
    """Import the exporter, and with it PyTorch.

    Raises:
        EngineError: a package of the extra ``export`` is not installed.
    """
    try:
        from w2v_export import exporter
    except ModuleNotFoundError as error:
        raise EngineError(
            f"{error.name} is not installed; exporting needs PyTorch and more: pip install 'w2v-onnx[export,cpu]'"
        ) from None
    return exporter


def main() -> None:
    """The console script."""
    terminal.main(app, NAME)
