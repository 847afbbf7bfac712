"""``export_bundle``: turn a checkpoint into a bundle, and prove the bundle equal to PyTorch.

The steps: describe the checkpoint, load it, run PyTorch on the parity cases, write the graphs of each precision (which
products go into int8 is decided in ``precision.int8``), compare the bundle with PyTorch, write the manifest.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from w2v_export.checkpoint import Checkpoint, draw, read_checkpoint
from w2v_export.description import describe, describe_architecture
from w2v_export.graph.inference import InferenceGraph
from w2v_export.hub import CONFIG, PREPROCESSOR, PROCESSOR
from w2v_export.memory import release
from w2v_export.precision import fp16
from w2v_export.precision.int8 import UNCHANGED, Plan, quantise
from w2v_export.recordings import read_recordings
from w2v_export.references import exact_outputs, reference_outputs, stored
from w2v_export.refusals import refuse_early
from w2v_export.writer import OPSET, export_graphs
from w2v_models import schema
from w2v_models.bundle import Bundle, record
from w2v_models.errors import CheckpointError, EngineError, ParityError
from w2v_models.manifest import FORMAT_VERSION, FileRecord, Manifest, PrecisionRecord
from w2v_models.tolerances import ParityRow
from w2v_runtime.bundles import library, placing
from w2v_runtime.embedder import Embedder
from w2v_runtime.embedding.parity import Reference, compare, compare_batches, save_references
from w2v_runtime.engines.base import CPU, OPENVINO
from w2v_runtime.engines.installed import check_installation, installed_version, is_here

REFERENCE: Final = "reference.npz"
#: The largest weights that are proven with OpenVINO too.
_OPENVINO_BYTES: Final = 2 << 30
#: The files of a checkpoint that are copied into the bundle, for its page on the hub.
_DESCRIPTIONS: Final = (CONFIG, PREPROCESSOR, PROCESSOR)
_PACKAGES: Final = ("w2v-onnx", "torch", "transformers", "optimum", "onnx", "onnxruntime", "numpy")

#: Called with a stage's name and how much of it is done, (stage, i, n).
Report = Callable[[str, int, int], None]


class UnprovenError(ParityError):
    """The exported bundle misses the tolerance of ``precision``; ``rows`` holds all comparisons."""

    def __init__(self, model: str, precision: str, rows: tuple[ParityRow, ...], failed: tuple[ParityRow, ...]) -> None:
        super().__init__(
            f"{model} was not exported: {len(failed)} of {len(rows)} comparisons with PyTorch miss their tolerance. "
            "Nothing was left behind. Please report this with the table above."
        )
        self.precision, self.rows = precision, rows


def export_bundle(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    precision: Sequence[str] = ("fp32",),
    revision: str | None = None,
    language: str | None = None,
    head: bool = True,
    random_weights: bool = False,
    seed: int = 0,
    check: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    offline: bool = False,
    report: Report = lambda stage, done, total: None,
) -> Bundle:
    """Export a checkpoint to a bundle that is proven equal to PyTorch; if the proof fails, nothing is left behind.

    Args:
        model: a hub id or a checkpoint folder.
        output: the bundle's folder; by default ``<org>--<name>`` in ``$W2V_HOME`` or the user's cache.
        precision: precisions to write, of fp32, int8 and fp16.
        revision: a branch, tag or commit of the hub's repository.
        language: the language of an MMS checkpoint, whose adapter and labels are exported; by default the one that its
            weights are set to.
        head: export the checkpoint's head too, if it has one; False exports the encoder alone.
        random_weights: take the architecture only, with random weights; needs no network.
        seed: seed of the random weights.
        check: recordings to prove the bundle on, in addition to the built-in signals.
        overwrite: replace an existing bundle; a folder that holds other files than a bundle's is never replaced.
        offline: use only what the hub's cache holds.
        report: called with a stage's name and how much of it is done, (stage, i, n).

    Raises:
        CheckpointError: the checkpoint cannot be found, read or understood, or does not have the language.
        RefusedError: a recording to check cannot be read, or is too short or too long.
        OutputError: the output exists and may not or cannot be replaced, or another process writes to it.
        W2VError: the disk is full.
        ParityError: int8 or fp16 cannot be had within its tolerance.
        UnprovenError: the bundle differs from PyTorch by more than the tolerance.

    Examples:
        >>> bundle = export_bundle("checkpoint", "bundle", precision=["fp32"])
        >>> max(row.max_abs for row in bundle.manifest.precisions["fp32"].parity if row.output == "pooled") < 2e-5
        True
    """
    model, folder = os.fspath(model), Path(output) if output is not None else library.default_folder(os.fspath(model))
    check_installation()
    refuse_early(model, folder, precision, revision, random_weights, overwrite, offline, language)
    described = describe_architecture(model) if random_weights else describe(model, revision, offline, language)
    recordings = read_recordings([Path(path) for path in check], described.architecture)
    with placing.placed(folder, overwrite) as staging:
        report("loading the checkpoint", 0, 1)

        def load() -> Checkpoint:
            return draw(described, seed, head) if random_weights else read_checkpoint(described, offline, head)

        checkpoint = load()
        _check_description(checkpoint)
        references = reference_outputs(
            checkpoint, recordings, lambda i, n: report("running PyTorch on the parity cases", i, n)
        )
        with placing.writing(folder):
            bundle = write_bundle(checkpoint, references, staging, precision, report, described.folder)
        del checkpoint  # the proof loads the weights again, and they may take gigabytes
        release()
        bundle = prove(bundle, references, load, report)
        with placing.writing(folder):
            bundle.save()
    return Bundle.open(folder)


def _check_description(checkpoint: Checkpoint) -> None:
    """Refuse a model whose description a manifest cannot hold, before the long work begins.

    Raises:
        CheckpointError: a field of the manifest would be invalid.
    """
    try:
        for part in (checkpoint.source, checkpoint.architecture, checkpoint.head_entry):
            if part is not None:
                schema.check(part, type(part).__name__.lower())
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source.model} cannot be described in a manifest: {error}.") from None


def write_bundle(
    checkpoint: Checkpoint,
    references: Sequence[Reference],
    folder: Path,
    precision: Sequence[str],
    report: Report,
    source: Path | None = None,
) -> Bundle:
    """Write the graphs and the stored references into ``folder``; the returned bundle's manifest is not yet written.

    The descriptions of the checkpoint are copied from the folder ``source``, if there is one.

    Raises:
        ParityError: int8 or fp16 cannot be had within its tolerance.
    """
    (folder / "onnx").mkdir()
    architecture = checkpoint.architecture
    graph = checkpoint.graph()
    records = {}
    if "fp32" in precision:
        report("writing the graph", 0, 1)
        records["fp32"] = _write_precision(checkpoint, graph, folder, "")
    if "int8" in precision:
        stage = "choosing what goes into int8"
        plan = quantise(graph, references, architecture.sample_rate, lambda i, n: report(stage, i, n))
        report("writing the int8 graph", 0, 1)
        records["int8"] = _write_precision(checkpoint, graph, folder, "_int8", plan)
        graph = checkpoint.graph()
    if "fp16" in precision:
        stage = "trying float16"
        fp16.convert(graph, references, architecture.sample_rate, lambda i, n: report(stage, i, n))
        report("writing the fp16 graph", 0, 1)
        records["fp16"] = _write_precision(checkpoint, graph, folder, "_fp16")
    save_references(folder / REFERENCE, stored(references, architecture.sample_rate))
    return Bundle(
        folder,
        Manifest(
            format_version=FORMAT_VERSION,
            source=checkpoint.source,
            architecture=architecture,
            head=checkpoint.head_entry,
            opset=OPSET,
            precisions=records,
            reference=record(folder, folder / REFERENCE),
            sources=() if source is None else _copied(source, folder),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            packages={name: version for name in _PACKAGES if (version := installed_version(name))},
        ),
    )


def _copied(checkpoint: Path, folder: Path) -> tuple[FileRecord, ...]:
    """Copy a checkpoint's descriptions into the bundle."""
    names = [name for name in _DESCRIPTIONS if (checkpoint / name).is_file()]
    return tuple(record(folder, Path(shutil.copyfile(checkpoint / name, folder / name))) for name in names)


def _write_precision(
    checkpoint: Checkpoint, graph: InferenceGraph, folder: Path, suffix: str, plan: Plan = UNCHANGED
) -> PrecisionRecord:
    graphs = export_graphs(graph, checkpoint.architecture, checkpoint.head_entry, folder / "onnx", suffix)
    return PrecisionRecord(
        graph=record(folder, graphs.graph),
        layers=record(folder, graphs.layers),
        features=record(folder, graphs.features),
        encoder=record(folder, graphs.encoder),
        head=None if graphs.head is None else record(folder, graphs.head),
        mel=None if graphs.mel is None else record(folder, graphs.mel),
        data=(record(folder, graphs.data),),
        kept=plan.kept,
        smoothed=plan.smoothed,
        parity=(),
    )


def prove(bundle: Bundle, references: Sequence[Reference], load: Callable[[], Checkpoint], report: Report) -> Bundle:
    """Compare every precision with PyTorch, through :class:`Embedder`, and return the bundle with its parity rows.

    That is on the processor with ONNX Runtime; fp32 also with OpenVINO where that is installed. Where fp32 misses
    its tolerance, the checkpoint is loaded again for its answers in float64, which then judge, and are stored in the
    bundle.

    Raises:
        UnprovenError: a comparison misses its tolerance.
    """
    stage = "comparing the bundle with PyTorch"
    precisions = {}
    for name, entry in bundle.manifest.precisions.items():
        rows = _rows(bundle, name, references, lambda i, n: report(stage, i, n))
        if name == "fp32" and not all(row.within(name) for row in rows):
            references = exact_outputs(load(), references, lambda i, n: report("running PyTorch in float64", i, n))
            rows = _rows(bundle, name, references, lambda i, n: report(f"{stage} in float64", i, n))
            bundle = _with_references(bundle, references)
        if failed := tuple(row for row in rows if not row.within(name)):
            raise UnprovenError(bundle.manifest.source.model, name, rows, failed)
        precisions[name] = dataclasses.replace(entry, parity=rows)
    return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, precisions=precisions))


def _rows(
    bundle: Bundle, precision: str, references: Sequence[Reference], done: Callable[[int, int], None]
) -> tuple[ParityRow, ...]:
    # Weights that are rearranged for the processor would be a copy of the mapped file.
    rows = compare(Embedder(bundle, device=CPU, precision=precision, prepack=False), references, done)
    release()
    return rows + _openvino_rows(bundle, references) if precision == "fp32" else rows


def _with_references(bundle: Bundle, references: Sequence[Reference]) -> Bundle:
    """The bundle with its stored references replaced."""
    path = bundle.folder / REFERENCE
    save_references(path, stored(references, bundle.manifest.architecture.sample_rate))
    return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, reference=record(bundle.folder, path)))


def _openvino_rows(bundle: Bundle, references: Sequence[Reference]) -> tuple[ParityRow, ...]:
    """The rows of OpenVINO; none where it is not installed, does not load, or lacks what the model needs.

    It holds a copy of the weights, and more while it compiles, so models of gigabytes are not run.
    """
    weights = sum(record.size for record in bundle.manifest.precisions["fp32"].data)
    if not is_here(OPENVINO) or weights > _OPENVINO_BYTES:
        return ()
    try:
        embedder = Embedder(bundle, device=OPENVINO)
    except EngineError:
        return ()
    return compare_batches(embedder, references, ", OpenVINO")
