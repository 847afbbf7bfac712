"""``w2v-models``: lists, shows and verifies bundles, pulls one from the hub and pushes one to it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Annotated, Final

import typer

from w2v_models.catalogue import CATALOGUE
from w2v_models.errors import BundleError
from w2v_models.origin import Origin
from w2v_models.tolerances import ROUNDING_FACTOR, TOLERANCES, ParityRow, Tolerance, worst
from w2v_runtime.bundles import library
from w2v_runtime.commands import terminal
from w2v_runtime.commands.tables import Table, pairs, width_of

NAME: Final = "w2v-models"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def models(_version: Annotated[bool, terminal.version_option(NAME)] = False) -> None:
    """List, show and verify bundles; pull and push them."""


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """The catalogue, and the bundles exported on this machine."""
    with terminal.command(NAME):
        bundles = library.exported()
        if as_json:
            catalogue = [{"id": v.id, "licence": v.licence, "description": v.description} for v in CATALOGUE]
            found = [
                {
                    "folder": str(bundle.folder),
                    "model": bundle.manifest.source.model,
                    "precisions": list(bundle.held),
                    "origin": dataclasses.asdict(origin) if (origin := Origin.read(bundle.folder)) else None,
                }
                for bundle in bundles
            ]
            print(json.dumps({"catalogue": catalogue, "exported": found, "home": str(library.home())}, indent=2))
            return
        known = [
            (
                variant.id,
                str(variant.config["num_hidden_layers"]),
                str(variant.config["hidden_size"]),
                variant.licence,
                variant.description,
            )
            for variant in CATALOGUE
        ]
        header = ("model", "layers", "size", "licence", "about")
        terminal.show(*Table("Known models", header, known, right=frozenset({1, 2})).lines(width_of(sys.stdout)))
        terminal.show("")
        if not bundles:
            terminal.show(f"Nothing is exported to {library.home()} yet.")
            return
        found_here = [
            (
                bundle.manifest.source.model,
                f"random (seed {bundle.manifest.source.seed})" if bundle.manifest.source.random else "checkpoint",
                ",".join(bundle.held),
                bundle.manifest.created[:10],
                origin.repository if (origin := Origin.read(bundle.folder)) else "here",
                bundle.folder.name,
            )
            for bundle in bundles
        ]
        columns = ("model", "weights", "precisions", "exported", "from", "folder")
        terminal.show(*Table(f"Exported to {library.home()}", columns, found_here).lines(width_of(sys.stdout)))


@app.command()
def show(bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Bundle folder or exported id.")]) -> None:
    """A bundle's manifest, and its parity with PyTorch as measured at export."""
    with terminal.command(NAME):
        opened = library.find(bundle)
        manifest = opened.manifest
        source, architecture = manifest.source, manifest.architecture
        conv = architecture.conv
        described = {
            "model": source.model,
            "revision": source.revision or "none",
            "pulled from": str(Origin.read(opened.folder) or "nowhere, exported"),
            "weights": f"random (seed {source.seed})" if source.random else "checkpoint",
            "licence": source.licence or "unknown",
            **({"language": source.language} if source.language else {}),
            "architecture": f"{architecture.model_type}, {architecture.layers} layers of {architecture.hidden_size}",
            "head": f"{manifest.head.kind}: {', '.join(manifest.head.labels)}" if manifest.head else "none",
            "sample rate": f"{architecture.sample_rate} Hz",
            "frames": f"one every {conv.stride} samples, each from {conv.receptive_field}",
            "precisions": ", ".join(
                f"{name} ({sum(record.size for record in entry.files) / 1e6:.0f} MB"
                f"{'' if name in opened.held else ', not pulled'})"
                for name, entry in manifest.precisions.items()
            ),
            "bundle hash": manifest.sha256,
            "exported": f"{manifest.created} with " + ", ".join(f"{k} {v}" for k, v in manifest.packages.items()),
        }
        terminal.show(*pairs(str(opened.folder), described, width_of(sys.stdout)))
        for name, entry in manifest.precisions.items():
            terminal.show("")
            terminal.show(*parity_table(entry.parity, name).lines(width_of(sys.stdout)))


@app.command()
def verify(bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Bundle folder or exported id.")]) -> None:
    """Check a bundle's files against their hashes, then its outputs against the stored reference vectors."""
    with terminal.command(NAME):
        from w2v_runtime.embedder import Embedder
        from w2v_runtime.embedding.parity import compare, load_references

        opened = library.find(bundle)
        terminal.note_random_weights(NAME, opened.manifest.source)
        for record in opened.files:
            opened.check(record, remembered=False)
        terminal.show(f"{len(opened.files)} files match their SHA-256.")
        references = load_references(opened.check(opened.manifest.reference))
        passed = True
        for precision in opened.held:
            rows = compare(Embedder(opened, device="cpu", precision=precision), references)
            passed = passed and all(row.within(precision) for row in rows)
            terminal.show(*parity_table(rows, precision).lines(width_of(sys.stdout)))
        if not passed:
            raise VerificationError(f"{opened.folder} differs from its reference vectors; export the model again.")
        terminal.show(f"{opened.folder} equals its reference.")


@app.command()
def pull(
    model: Annotated[str, typer.Argument(metavar="ID", help="A bundle's repository on the hub, such as org/name.")],
    revision: Annotated[str | None, typer.Option(metavar="REV", help="A branch, tag or commit.")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P,…", help="Precisions, with commas. [default: fp32, or what there is]")
    ] = None,
) -> None:
    """Download a published bundle, checked by its hashes; what is here already is kept."""
    with terminal.command(NAME):
        from w2v_runtime.bundles import pulling

        pulled = pulling.pull(model, revision, precision.split(",") if precision else (), _tell)
        terminal.show_path(pulled.folder)


@app.command()
def push(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Bundle folder or exported id.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Its repository on the hub; created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="The branch to push to.")] = None,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="The checkpoint's licence, where it is unknown.")
    ] = None,
) -> None:
    """Publish a bundle on the hub, with a model card, in one commit."""
    with terminal.command(NAME):
        from w2v_runtime.bundles import publishing

        terminal.show(publishing.push(library.find(bundle), repository, private, revision, license_, _tell))


def _tell(line: str) -> None:
    terminal.say(NAME, line)


class VerificationError(BundleError):
    """A bundle is intact but does not compute what it should."""

    exit_code = 1


def parity_table(rows: tuple[ParityRow, ...], precision: str) -> Table:
    """Rows of a comparison with PyTorch as a table, the worst of each output last."""
    totals = [row for output in TOLERANCES[precision] if (row := worst(rows, output))]
    missed = {row.output for row in rows if not row.within(precision)}
    cells = []
    for row in (*rows, *totals):
        allowed = _allowed(TOLERANCES[precision][row.output], row.rounding)
        within = row.output not in missed if row in totals else row.within(precision)
        verdict = "ok" if within else "MISSED"
        numbers = (f"{row.max_abs:.1e}", f"{row.max_rel:.1e}", f"{row.min_cosine:.7f}", allowed)
        cells.append((row.case, row.output, *numbers, verdict))
    header = ("case", "output", "max |Δ|", "relative", "cosine", "allowed", "")
    exact = " in float64" if any(row.rounding for row in rows) else ""
    return Table(f"{precision} against PyTorch{exact}", header, cells, right=frozenset({2, 3, 4}))


def _allowed(tolerance: Tolerance, rounding: float) -> str:
    """A tolerance as text: the bounds of the difference, of which either is enough, or that of the cosine; short.

    Where PyTorch's own rounding is what decides, it is that of a row that was compared with float64.
    """
    if math.isinf(tolerance.max_abs):
        return f"cosine {tolerance.min_cosine:g}"
    if ROUNDING_FACTOR * rounding > tolerance.max_abs > 0:
        return f"{ROUNDING_FACTOR:g} × {rounding:.1e} of PyTorch".replace("e-0", "e-")
    bounds = {"": tolerance.max_abs, " rel": tolerance.max_rel}
    return ", ".join(f"{bound:.0e}{kind}".replace("e-0", "e-") for kind, bound in bounds.items() if bound)


def main() -> None:
    """The console script."""
    terminal.main(app, NAME)
