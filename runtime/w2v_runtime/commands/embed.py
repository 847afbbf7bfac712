"""``w2v-embed``: turns the command line into options, starts a run, prints its summary line, sets the exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final, NamedTuple

import typer

from w2v_models.bundle import MANIFEST
from w2v_models.errors import RefusedError
from w2v_runtime.commands import terminal

if TYPE_CHECKING:
    from w2v_runtime.embedding.results import Failure
    from w2v_runtime.files.outputs import Use
    from w2v_runtime.runs.options import RunOptions
    from w2v_runtime.runs.summary import Summary

NAME: Final = "w2v-embed"
FINISHED_WITH_FAILURES: Final = 3
#: Places without audio, of which an error message names at most this many.
_NAMED_PLACES: Final = 3
#: For at most this many files, all named on the command line, prepacking the weights takes longer than it saves.
_FEW_FILES: Final = 4

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
            help="By suffix .npz .csv .parquet .h5 .jsonl; a folder (ends in / or exists) gets .npy files; "
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

        if not inputs and files_from is None:
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
        options = RunOptions(
            OutputOptions(Path(output), output_format(output), resume, overwrite, failures, hash_, prune),
            Request.of(level, pooling or "mean", layer, None if layer_weights is None else read_weights(layer_weights)),
            CorpusOptions(_channel(channel), pad_short, strict, batch_seconds, jobs),
            Windowing(window, context, whole),
            Shard.of(shard),
        )
        engine = EngineOptions(model, device, precision, threads, offline)
        sources = Sources(inputs or [], files_from, null)
        reads = [Use(path, "an input") for path in inputs or [] if os.path.isfile(path)]
        reads += [
            Use(path, what)
            for path, what in ((files_from, "the list of inputs"), (layer_weights, "the file of layer weights"))
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


def _embed(options: RunOptions, engine: EngineOptions, sources: Sources, reads: list[Use], told: Shown) -> Summary:
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
        with _list_locked(options.output.failures):
            first_lines = sources.begun()
            with sources.standard_input() as recording:
                return stream(open_embedder(), first_lines, options, _tell, recording)
    header = header_of(bundle, engine.precision, options)
    with locked(options.output.path) as lock, _list_locked(options.output.failures):
        check_earlier(options, header)
        inputs: Iterable[str] = sources.begun()
        if options.output.overwrite and exists(options.output.path) and not sources.piped:
            inputs = list(inputs)
            written.refuse_inputs(inputs)
        shown_progress = shown(NAME, sources, options.shard, hidden=not told.progress)
        with sources.standard_input() as recording, shown_progress as progress:
            return run(open_embedder, inputs, options, header, written, progress, lock.check, recording)


def _list_locked(failures: Path | None) -> contextlib.AbstractContextManager[object]:
    """Hold the lock of a list of failures that ``--failures`` names: two runs would replace each other's."""
    from w2v_runtime.files.lock import locked
    from w2v_runtime.runs.failures import is_stream

    return contextlib.nullcontext() if failures is None or is_stream(failures) else locked(failures)


def _summary_line(summary: Summary, options: RunOptions, passed_over: int) -> str:
    place = "" if options.output.format == "stdout" else f" → {options.output.path}"
    were = "was" if summary.recalled == 1 else "were"
    finished = f"{terminal.count_of(summary.recalled, 'file')} {were} finished already"
    if not summary.embedded + summary.failed + summary.written:
        empty = f"shard {options.shard.index}/{options.shard.count} holds none of the inputs"
        parts = [finished if summary.recalled else empty, *_passed_over(passed_over)]
        return f"nothing to do: {', '.join(parts)}{place}"
    parts = [finished] if summary.recalled else []
    if summary.pruned:
        parts.append(f"{terminal.count_of(summary.pruned, 'result')} dropped")
    if summary.damaged:
        parts.append(f"{terminal.count_of(summary.damaged, 'damaged line')} of the journal skipped")
    if summary.embedded or not summary.pruned:
        parts.append(f"{terminal.count_of(summary.embedded, 'file')} embedded")
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
    return ", ".join([*parts, *_passed_over(passed_over)]) + place


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s"


class Sources:
    """The inputs that the command line names, listed once, and the number of files that were passed over."""

    def __init__(self, arguments: list[str], files_from: str | None, null: bool) -> None:
        from w2v_runtime.runs.inputs import Listing, list_inputs

        self._arguments, self._files_from = arguments, files_from
        self.passed_over = 0
        self.piped = files_from is not None and not os.path.isfile(files_from)
        self._listing = Listing(list_inputs(arguments, files_from, null, self._pass_over), ahead=not self.piped)

    @property
    def few(self) -> bool:
        """Whether the inputs are a few files; finished ones count too, so that a resumed run gives equal results."""
        files = all(os.path.isfile(name) or name == "-" for name in self._arguments)
        return self._files_from is None and len(self._arguments) <= _FEW_FILES and files

    def standard_input(self) -> contextlib.AbstractContextManager[BinaryIO | None]:
        """The recording on standard input as a file that can be read again; None unless ``-`` is an input.

        Raises:
            AudioError: there is no room for the recording.
        """
        from w2v_runtime.audio.source import spooled
        from w2v_runtime.runs.inputs import STANDARD_INPUT

        if STANDARD_INPUT not in self._arguments:
            return contextlib.nullcontext()
        if sys.stdin is None:
            raise RefusedError("standard input is closed, so no recording can be read from it.")
        return spooled(sys.stdin.buffer)

    def total(self) -> int | None:
        """Wait until all inputs are listed, and return their number; None if the run ends before."""
        return self._listing.total()

    def begun(self) -> Iterator[str]:
        """Wait for the first input, which for a piped list is its first line, and return an iterator over all inputs.

        Raises:
            RefusedError: there is no input; the message names the places that were searched.
        """
        inputs = iter(self._listing)
        first = next(inputs, None)
        if first is None:
            places = self._arguments[:_NAMED_PLACES]
            if len(self._arguments) > _NAMED_PLACES:
                places.append("…")
            if self._files_from is not None:
                places.append(f"the list {'on standard input' if self._files_from == '-' else self._files_from}")
            found = f"no audio was found in {', '.join(places)}"
            others = "".join(f" ({words})" for words in _passed_over(self.passed_over))
            raise RefusedError(f"{found}; name recordings, or folders that hold some{others}.")
        return itertools.chain([first], inputs)

    def _pass_over(self, path: str) -> None:  # noqa: ARG002
        self.passed_over += 1


def _passed_over(files: int) -> list[str]:
    """The words of the summary line on files in folders that are not recordings; empty if there are none."""
    return [f"{terminal.count_of(files, 'other file')} passed over"] if files else []


def main() -> None:
    """The console script."""
    terminal.main(app, NAME)
