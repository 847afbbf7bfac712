"""The options of a run, and what is kept of them: in its journal's header, for ``--resume``, and in its output."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from w2v_models.bundle import Bundle
from w2v_runtime.audio import ffmpeg
from w2v_runtime.embedder import Embedder
from w2v_runtime.embedding.corpus import CorpusOptions
from w2v_runtime.embedding.results import Request
from w2v_runtime.embedding.windows import DEFAULT_WINDOWING, Windowing
from w2v_runtime.engines.installed import installed_version
from w2v_runtime.files.outputs import FAILURES_SUFFIX, beside
from w2v_runtime.runs.inputs import ALL, Shard
from w2v_runtime.runs.journal import SEGMENTS, Header
from w2v_runtime.runs.readback import RUN, run_record
from w2v_runtime.stores import COLUMNS, DTYPES, DType, Layout, OutputFormat
from w2v_runtime.tables import Table

STDOUT: Final = "stdout"
_PACKAGES: Final = ("w2v-onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy", "soundfile", "soxr")


@dataclass(frozen=True)
class OutputOptions:
    """Where a run writes, and what becomes of an earlier output there.

    ``path`` is as the user typed it. ``failures`` None means the list beside the output. With ``resume``, ``hash``
    compares contents, and ``prune`` drops results whose inputs are gone. ``dtype`` is what vectors are stored in.
    """

    path: Path
    format: OutputFormat
    resume: bool = False
    overwrite: bool = False
    failures: Path | None = None
    hash: bool = False
    prune: bool = False
    dtype: DType = "float32"

    @property
    def failures_path(self) -> Path | None:
        """Where failed inputs are listed; None on standard output unless a file was named."""
        if self.failures is not None or self.format == STDOUT:
            return self.failures
        return beside(self.path, FAILURES_SUFFIX)


@dataclass(frozen=True)
class RunOptions:
    """All options of a run: what it writes, computes and reads; ``segments`` is None for whole recordings."""

    output: OutputOptions
    request: Request
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    windowing: Windowing = DEFAULT_WINDOWING
    shard: Shard = ALL
    segments: Table | None = None


def header_of(bundle: Bundle, precision: str, options: RunOptions) -> Header:
    """The journal's header of a run; a later ``--resume`` must match its fingerprint and shard."""
    request = options.request
    fingerprint = {
        "model": bundle.manifest.source.model,
        "bundle": bundle.manifest.sha256,
        "precision": precision,
        "level": request.level,
        "pooling": list(request.pooling) if request.level == "utterance" else [],
        "layers": list(request.layers),
        "layer_weights": list(request.layer_weights or []),
        "channel": "mean" if options.corpus.channel is None else options.corpus.channel,
        "pad_short": options.corpus.pad_short,
        "window": options.windowing.window,
        "context": options.windowing.context,
        "whole": options.windowing.whole,
    }
    if options.segments is not None:
        fingerprint[SEGMENTS] = options.corpus.segment_context
    if options.output.dtype != DTYPES[0]:
        fingerprint["dtype"] = options.output.dtype
    return Header(fingerprint, f"{options.shard.index}/{options.shard.count}", finished=False)


def metadata(embedder: Embedder, options: RunOptions, header: Header | None) -> dict[str, Any]:
    """The metadata of an output and, with ``header``, of the run that made it."""
    manifest, request, windowing = embedder.manifest, options.request, options.windowing
    head, times, channel = embedder.head(request), embedder.times_of(request), options.corpus.channel
    described: dict[str, Any] = {
        "model": manifest.source.model,
        "revision": manifest.source.revision,
        "bundle": manifest.sha256,
        "random_weights": manifest.source.random,
        "layer": list(request.layers),
        "layer_weights": None if request.layer_weights is None else list(request.layer_weights),
        "pooling": list(request.pooling) if request.level == "utterance" else None,
        "level": request.level,
        "precision": embedder.precision,
        "dtype": options.output.dtype,
        "device": embedder.engine.device,
        "channel": "mean" if channel is None else channel,
        "window_seconds": windowing.window,
        "context_seconds": windowing.context,
        "whole_seconds": windowing.whole,
        "labels": list(head.labels) if head else [],
        "head_level": head.level if head else None,
        "frame_step_seconds": times.step,
        "frame_width_seconds": times.width,
        "packages": {name: version for name in _PACKAGES if (version := installed_version(name))},
    }
    if ffmpeg.used_version is not None:
        described["packages"] |= {"av": ffmpeg.used_version}
    if options.segments is not None:
        described[SEGMENTS] = options.corpus.segment_context
        described[COLUMNS] = [vars(column) for column in options.segments.columns]
    return described if header is None else described | {RUN: run_record(header)}


def layout(embedder: Embedder, options: RunOptions, header: Header | None, count: int = 0, rows: int = 0) -> Layout:
    """The layout of an output of ``count`` inputs with ``rows`` frames in all."""
    request = options.request
    head = embedder.head(request)
    return Layout(
        count=count,
        frames=rows if request.level == "frame" else 0,
        dim=embedder.dimension(request),
        layers=request.layers,
        level=request.level,
        labels=head.labels if head else (),
        times=embedder.times_of(request),
        metadata=metadata(embedder, options, header),
        head_level="frame" if head and head.level == "frame" else "utterance",
        columns=None if options.segments is None else options.segments.columns,
        dtype=options.output.dtype,
    )
