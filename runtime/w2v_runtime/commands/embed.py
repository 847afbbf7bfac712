"""``w2v-embed``: turns the command line into options, starts a run, prints its summary line, sets the exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple

import typer

from w2v_models.bundle import MANIFEST
from w2v_models.errors import RefusedError
from w2v_runtime.commands import terminal
from w2v_runtime.commands.sources import Sources, TableSources, passed_over_words

if TYPE_CHECKING:
    from w2v_runtime.embedding.results import Failure
    from w2v_runtime.files.outputs import Use
    from w2v_runtime.runs.options import RunOptions
    from w2v_runtime.runs.summary import Summary
    from w2v_runtime.stores import DType

NAME: Final = "w2v-embed"
FINISHED_WITH_FAILURES: Final = 3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(no_args_is_help=True)
def embed(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT", help="Audio files, folders to search, and - for a recording on standard input."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", help="Bundle folder, or exported or published id. [default: $W2V_MODEL, or the only one]"
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="By suffix .npz .csv .parquet .h5 .jsonl .scp; a folder (ends in / or exists) gets .npy files; "
            "- is JSON lines on standard output.",
        ),
    ] = "embeddings.npz",
    files_from: Annotated[
        str | None, typer.Option(metavar="LIST", help="Read more inputs from a file, one a line; - is standard input.")
    ] = None,
    null: Annotated[bool, typer.Option("--null", help="The list is separated by NUL bytes.")] = False,
    level: Annotated[str, typer.Option(help="utterance or frame.")] = "utterance",
    pooling: Annotated[
        str | None, typer.Option(help="mean, std, min, max, or several with commas. [default: mean]")
    ] = None,
    layer: Annotated[str, typer.Option(help="last, a number from 0, several with commas, or all.")] = "last",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, cuda:N,cuda:M or openvino.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="fp32, tf32, fp16, bf16 or int8: what bundle and device offer.")
    ] = "fp32",
    batch_seconds: Annotated[
        float | None, typer.Option(help="Padded audio in a batch. [default: by device]", show_default=False)
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Decoding threads. [default: by processors]", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads inside the engine. [default: by processors]", show_default=False)
    ] = None,
    whole: Annotated[
        float, typer.Option(help="Recordings up to so many seconds are embedded whole, longer ones in windows.")
    ] = 300.0,
    window: Annotated[float, typer.Option(help="Seconds of a window of longer audio.")] = 30.0,
    context: Annotated[float, typer.Option(help="Seconds of context on each side of a window.")] = 5.0,
    segments: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Embed the segments of a table: .csv .tsv .parquet .rttm .ctm .jsonl .TextGrid, or Kaldi's segments.",
        ),
    ] = None,
    segment_context: Annotated[
        str | None,
        typer.Option(help="What is heard around a segment: seconds on each side, or whole. [default: 0]"),
    ] = None,
    tier: Annotated[str | None, typer.Option(metavar="NAME", help="The tier of a TextGrid.")] = None,
    dtype: Annotated[str, typer.Option(help="What vectors are stored in: float32 or float16.")] = "float32",
    channel: Annotated[str, typer.Option(help="mean, or a channel number from 0.")] = "mean",
    pad_short: Annotated[bool, typer.Option("--pad-short", help="Pad audio shorter than one frame.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an existing output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    failures: Annotated[
        Path | None, typer.Option(help="Where failed inputs are listed. [default: OUT.failures.jsonl]")
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="With --resume: drop results whose inputs are gone.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings about an input become failures.")] = False,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only the I-th of N parts of the inputs.")] = "1/1",
    hash_: Annotated[bool, typer.Option("--hash", help="Resume compares contents, not size and time.")] = False,
    layer_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One vector from a weighted sum of all layers.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no hub for a bundle that is not here.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only errors.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress, but the summary.")] = False,
    _version: Annotated[bool, terminal.version_option(NAME)] = False,
) -> None:
    """Embed recordings with an exported wav2vec 2.0 model."""
    with terminal.command(NAME):
        from w2v_runtime.embedding.corpus import CorpusOptions
        from w2v_runtime.embedding.layer_weights import read_weights
        from w2v_runtime.embedding.results import Request
        from w2v_runtime.embedding.windows import Windowing
        from w2v_runtime.files.outputs import Use
        from w2v_runtime.runs.inputs import STANDARD_INPUT, Shard, check_list
        from w2v_runtime.runs.options import OutputOptions, RunOptions
        from w2v_runtime.stores import output_format
        from w2v_runtime.tables import Table

        if segments is None and (segment_context is not None or tier is not None):
            raise RefusedError("--segment-context and --tier go with --segments only.")
        if segments is not None and "-" in (*(inputs or []), segments):
            raise RefusedError("--segments reads files, not standard input; write it to a file first.")
        if segments is None and not inputs and files_from is None:
            raise RefusedError("nothing to embed: name audio files or folders, or give --files-from.")
        if threads is not None and threads < 1:
            raise RefusedError(f"threads must be at least 1, not {threads}.")
        if files_from is not None:
            check_list(files_from)
        if [*(inputs or []), files_from].count(STANDARD_INPUT) > 1:
            raise RefusedError("standard input, -, is named twice, and can be read once.")
        if output == "-" and terminal.was_closed("stdout"):
            raise RefusedError("standard output is closed, so no results can be written to it; name an --output.")
        if resume and overwrite:
            raise RefusedError("--resume and --overwrite exclude each other.")
        if prune and not resume:
            raise RefusedError("--prune drops results of an earlier run, so it goes with --resume only.")
        if level == "frame" and pooling is not None:
            raise RefusedError("--pooling makes one vector of all frames, so leave it or --level frame out.")
        heard = _context(segment_context)
        weights = None if layer_weights is None else read_weights(layer_weights)
        options = RunOptions(
            OutputOptions(
                Path(output), output_format(output), resume, overwrite, failures, hash_, prune, _dtype(dtype)
            ),
            Request.of(level, pooling or "mean", layer, weights, spans=bool(heard)),
            CorpusOptions(_channel(channel), pad_short, strict, batch_seconds, jobs, heard),
            Windowing(window, context, whole),
            Shard.of(shard),
            None if segments is None else Table(segments, tier),
        )
        engine = EngineOptions(model, device, precision, threads, offline)
        named = (inputs or [], files_from, null, options.shard)
        sources = Sources(*named) if options.segments is None else TableSources(options.segments, *named)
        reads = [Use(path, "an input") for path in inputs or [] if os.path.isfile(path)]
        reads += [
            Use(path, what)
            for path, what in (
                (files_from, "the list of inputs"),
                (layer_weights, "the file of layer weights"),
                (segments, "the table of segments"),
            )
            if path not in (None, "-")
        ]
        summary = _embed(options, engine, sources, reads, Shown(not quiet, not (quiet or no_progress)))
        if not quiet:
            for failure in summary.first_failures:
                terminal.say(NAME, f"failed: {failure.path}: {failure.reason}")
            if more := summary.failed - len(summary.first_failures):
                terminal.say(NAME, f"failed: … and {more} more")
            terminal.say(NAME, _summary_line(summary, options, sources.passed_over))
    sys.exit(FINISHED_WITH_FAILURES if summary.failed else 0)


def _tell(failure: Failure) -> None:
    terminal.say(NAME, f"{failure.path}: {failure.reason}")


def _tell_pull(line: str) -> None:
    terminal.say(NAME, line)


def _channel(text: str) -> int | None:
    if text == "mean":
        return None
    if not text.isdecimal():
        raise RefusedError(f"channel {text!r} is neither mean nor a channel number from 0.")
    return int(text)


def _dtype(text: str) -> DType:
    from w2v_runtime.stores import DTYPES

    for dtype in DTYPES:
        if text == dtype:
            return dtype
    raise RefusedError(f"dtype {text!r:.40} is unknown; choose one of: {', '.join(DTYPES)}.")


def _context(text: str | None) -> float | str:
    if text is None or text == "whole":
        return text or 0.0
    try:
        return float(text)
    except ValueError:
        raise RefusedError(f"segment context {text!r:.40} is neither whole nor seconds.") from None


class EngineOptions(NamedTuple):
    """Which model computes, and on what."""

    model: str | None
    device: str
    precision: str
    threads: int | None
    offline: bool


class Shown(NamedTuple):
    """What is shown on standard error beside errors."""

    notes: bool
    progress: bool


def _embed(
    options: RunOptions, engine: EngineOptions, sources: Sources | TableSources, reads: list[Use], told: Shown
) -> Summary:
    """Check first what is cheap to check, then open the model and embed."""
    from w2v_runtime.bundles import pulling
    from w2v_runtime.commands.progress import shown
    from w2v_runtime.embedder import Embedder
    from w2v_runtime.engines.base import stored_precision
    from w2v_runtime.files.lock import locked
    from w2v_runtime.files.outputs import Use, exists, resolved
    from w2v_runtime.runs.checks import check_earlier, written_files
    from w2v_runtime.runs.options import header_of
    from w2v_runtime.runs.run import run, stream
    from w2v_runtime.stores import check_place

    tell = _tell_pull if told.notes else None
    bundle = pulling.find(engine.model, stored_precision(engine.precision), engine.offline, tell)
    request = options.request.resolved(bundle.manifest.architecture.layers)
    options = dataclasses.replace(options, request=request)
    if options.output.format != "stdout":
        check_place(options.output.path, options.output.format, overwrite=True)
    held = [bundle.folder / MANIFEST, *(bundle.folder / record.path for record in bundle.manifest.files)]
    written = written_files(options, [*reads, *(Use(path, "a file of the model") for path in held)])
    if told.notes:
        terminal.note_random_weights(NAME, bundle.manifest.source)

    scratch = None if options.output.format == "stdout" else str(resolved(options.output.path).parent)

    def open_embedder() -> Embedder:
        return Embedder(
            bundle,
            engine.device,
            engine.precision,
            engine.threads,
            options.windowing,
            request,
            prepack=not sources.few,
            scratch=scratch,
        )

    if options.output.format == "stdout":
        with _list_locked(options.output.failures), sources.opened() as inputs:
            return stream(open_embedder(), inputs, options, _tell)
    header = header_of(bundle, engine.precision, options)
    with locked(options.output.path) as lock, _list_locked(options.output.failures):
        check_earlier(options, header)
        replaced = options.output.overwrite and exists(options.output.path)
        shown_progress = shown(NAME, sources, hidden=not told.progress)
        with sources.opened(written if replaced else None) as inputs, shown_progress as progress:
            return run(open_embedder, inputs, options, header, written, progress, lock.check)


def _list_locked(failures: Path | None) -> contextlib.AbstractContextManager[object]:
    """Hold the lock of a list of failures that ``--failures`` names: two runs would replace each other's."""
    from w2v_runtime.files.lock import locked
    from w2v_runtime.runs.failures import is_stream

    return contextlib.nullcontext() if failures is None or is_stream(failures) else locked(failures)


def _summary_line(summary: Summary, options: RunOptions, passed_over: int) -> str:
    place = "" if options.output.format == "stdout" else f" → {options.output.path}"
    were = "was" if summary.recalled == 1 else "were"
    finished = f"{terminal.count_of(summary.recalled, summary.one)} {were} finished already"
    if not summary.embedded + summary.failed + summary.written:
        empty = f"shard {options.shard.index}/{options.shard.count} holds none of the inputs"
        parts = [finished if summary.recalled else empty, *passed_over_words(passed_over)]
        return f"nothing to do: {', '.join(parts)}{place}"
    parts = [finished] if summary.recalled else []
    if summary.pruned:
        parts.append(f"{terminal.count_of(summary.pruned, 'result')} dropped")
    if summary.damaged:
        parts.append(f"{terminal.count_of(summary.damaged, 'damaged line')} of the journal skipped")
    if summary.embedded or not summary.pruned:
        parts.append(f"{terminal.count_of(summary.embedded, summary.one)} embedded")
    if summary.embedded:
        audio, wall = summary.audio_seconds, max(summary.wall_seconds, 1e-9)
        parts.append(f"{_duration(audio)} of audio in {_duration(wall)} ({audio / wall:.1f} × real time)")
        if summary.padded_samples:
            parts.append(f"padding {summary.padding:.1%}")
        parts.append(f"engine busy {summary.engine_seconds / wall:.0%}")
    if summary.windowed:
        parts.append(f"{summary.windowed} in windows, being longer than {options.windowing.whole:g} s")
    if summary.warned:
        where = "" if options.output.format == "stdout" else ", listed in its metadata"
        parts.append(f"{summary.warned} with warnings{where}")
    if summary.failed:
        where = f" (see {options.output.failures_path})" if options.output.failures_path else ""
        parts.append(f"{summary.failed} failed{where}")
    return ", ".join([*parts, *passed_over_words(passed_over)]) + place


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s"


def main() -> None:
    """The console script."""
    terminal.main(app, NAME)
