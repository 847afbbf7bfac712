"""``w2v-models``: what can be exported, what is exported, and whether it still equals PyTorch."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from w2v_models.catalogue import CATALOGUE
from w2v_models.errors import BundleError
from w2v_models.parity import TOLERANCES, ParityRow, worst
from w2v_runtime import library, terminal

if TYPE_CHECKING:
    from rich.table import Table

NAME: Final = "w2v-models"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def models() -> None:
    """List, show and verify exported models."""


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """The catalogue, and the bundles exported on this machine."""
    with terminal.command(NAME):
        bundles = library.exported()
        if as_json:
            catalogue = [{"id": v.id, "licence": v.licence, "description": v.description} for v in CATALOGUE]
            found = [{"folder": str(b.folder), "model": b.manifest.source.model} for b in bundles]
            print(json.dumps({"catalogue": catalogue, "exported": found, "home": str(library.home())}, indent=2))
            return
        from rich.table import Table

        table = Table("model", "layers", "size", "licence", "what", title="Known models")
        for variant in CATALOGUE:
            layers, size = variant.config["num_hidden_layers"], variant.config["hidden_size"]
            table.add_row(variant.id, str(layers), str(size), variant.licence, variant.description)
        _print(table)
        table = Table("model", "weights", "precisions", "exported", "folder", title=f"Exported to {library.home()}")
        for bundle in bundles:
            manifest = bundle.manifest
            weights = f"random, seed {manifest.source.seed}" if manifest.source.random else "checkpoint"
            precisions = ", ".join(manifest.precisions)
            table.add_row(manifest.source.model, weights, precisions, manifest.created[:10], bundle.folder.name)
        if bundles:
            _print(table)
        else:
            print(f"Nothing is exported to {library.home()} yet.")


@app.command()
def show(bundle: Annotated[str, typer.Argument(help="Bundle folder or exported id.")]) -> None:
    """A bundle's manifest, and its parity with PyTorch as measured at export."""
    with terminal.command(NAME):
        opened = library.find(bundle)
        manifest = opened.manifest
        from rich.table import Table

        table = Table("", "", title=str(opened.folder), show_header=False)
        source, architecture = manifest.source, manifest.architecture
        conv = architecture.conv
        for key, value in {
            "model": source.model,
            "revision": source.revision or "",
            "weights": f"random, seed {source.seed}" if source.random else "from the checkpoint",
            "licence": source.licence or "",
            "architecture": f"{architecture.model_type}, {architecture.layers} layers of {architecture.hidden_size}",
            "head": f"{manifest.head.kind}: {', '.join(manifest.head.labels)}" if manifest.head else "none",
            "sample rate": f"{architecture.sample_rate} Hz",
            "frames": f"one every {conv.stride} samples, each from {conv.receptive_field}",
            "precisions": ", ".join(
                f"{name} ({sum(record.size for record in entry.files) / 1e6:.0f} MB)"
                for name, entry in manifest.precisions.items()
            ),
            "bundle hash": manifest.sha256,
            "exported": f"{manifest.created} with " + ", ".join(f"{k} {v}" for k, v in manifest.packages.items()),
        }.items():
            table.add_row(key, value)
        _print(table)
        for name, entry in manifest.precisions.items():
            _print(parity_table(entry.parity, name))


@app.command()
def verify(bundle: Annotated[str, typer.Argument(help="Bundle folder or exported id.")]) -> None:
    """Check a bundle's files against their hashes, then its outputs against the stored reference vectors."""
    with terminal.command(NAME):
        from w2v_runtime.embedder import Embedder
        from w2v_runtime.parity import compare, load_references

        opened = library.find(bundle)
        terminal.note_random_weights(NAME, opened.manifest.source)
        for record in opened.manifest.files:
            opened.check(record)
        print(f"{len(opened.manifest.files)} files match their SHA-256.")
        references = load_references(opened.check(opened.manifest.reference))
        passed = True
        for precision in opened.manifest.precisions:
            rows = compare(Embedder(opened, device="cpu", precision=precision), references)
            passed = passed and all(row.within(precision) for row in rows)
            _print(parity_table(rows, precision))
        if not passed:
            raise VerificationError(f"{opened.folder} differs from its reference vectors; export the model again.")
        print(f"{opened.folder} equals its reference.")


class VerificationError(BundleError):
    """A bundle is intact but does not compute what it should."""

    exit_code = 1


def parity_table(rows: tuple[ParityRow, ...], precision: str) -> Table:
    """Rows of a comparison with PyTorch as a table, the worst of each output last."""
    from rich.table import Table

    table = Table("case", "output", title=f"{precision} against PyTorch")
    for column in ("max |Δ|", "allowed", "relative", "min cosine", ""):
        table.add_column(column, justify="right")
    totals = [row for output in TOLERANCES[precision] if (row := worst(rows, output))]
    for row in (*rows, *totals):
        if row is totals[0]:
            table.add_section()
        allowed = f"{TOLERANCES[precision][row.output].max_abs:.0e}"
        verdict = "ok" if row.within(precision) else "MISSED"
        numbers = (f"{row.max_abs:.1e}", allowed, f"{row.max_rel:.1e}", f"{row.min_cosine:.7f}", verdict)
        table.add_row(row.case, row.output, *numbers)
    return table


def _print(table: Table) -> None:
    """To standard output; as wide as it needs to be where that is not a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> None:
    """The console script."""
    app(prog_name=NAME)
