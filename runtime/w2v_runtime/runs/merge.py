"""``w2v-merge``: the outputs of ``w2v-embed --shard`` runs joined into one, in the order of the inputs.

A part is the output of one shard, with its journal beside it. If the journal is damaged or gone, the output itself
tells the index of each of its inputs among the inputs of all parts. All parts are read side by side, so that memory
holds one result of each.
"""

from __future__ import annotations

import dataclasses
import heapq
import resource
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding, FrameTimes
from w2v_runtime.files.outputs import (
    FAILURES_SUFFIX,
    JOURNAL_SUFFIX,
    VALUES_SUFFIX,
    Use,
    Written,
    beside,
    exists,
    hidden,
)
from w2v_runtime.runs.checks import is_unfinished
from w2v_runtime.runs.failures import check_failures, is_failure
from w2v_runtime.runs.inputs import Shard
from w2v_runtime.runs.journal import Entry, Header, drop_earlier, earlier_journal, write_journal
from w2v_runtime.runs.readback import RUN, FinishedOutput, expected_results, run_record
from w2v_runtime.stores import (
    COLUMNS,
    Layout,
    OutputFormat,
    check_place,
    columns_of,
    companions,
    open_store,
    output_format,
)
from w2v_runtime.stores.pending import PendingFile

#: Metadata that follow from what a run computes: parts that differ in them do not belong together.
_LAYOUT_METADATA: Final = ("dim", "labels", "head_level", "frame_step_seconds", "frame_width_seconds")
#: Metadata of single inputs and of single runs, which are not merged: the merged output gets its own.
_PART_METADATA: Final = ("warnings", "durations", RUN)
#: The most files that one part holds open while it is read.
_FILES_PER_PART: Final = 5


@dataclass(frozen=True)
class Joined:
    """Inputs of all parts: those that are embedded, those that failed, and how many of these the joined list names.

    A list that a run wrote elsewhere, with ``--failures``, is not joined.
    """

    embedded: int
    failed: int
    listed: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Part:
    """One finished output of ``w2v-embed``, with its shard and its metadata."""

    output: FinishedOutput
    shard: Shard
    metadata: dict[str, Any]

    @classmethod
    def open(cls, output: str) -> Part:
        """Open an output as the user typed it.

        Raises:
            OutputError: the output is unfinished or damaged, does not describe its run, or has no known format.
        """
        finished = FinishedOutput.open(Path(output), output_format(output))
        metadata = {name: value for name, value in finished.metadata.items() if name not in _PART_METADATA}
        return cls(finished, Shard.of(finished.header.shard), metadata)

    @property
    def path(self) -> Path:
        return self.output.path

    @property
    def header(self) -> Header:
        return self.output.header

    @property
    def computes(self) -> dict[str, Any]:
        """What the run computes, which is equal in all parts that belong together."""
        return self.header.fingerprint | {name: self.metadata.get(name) for name in _LAYOUT_METADATA}

    def results(self) -> Generator[tuple[Entry, Embedding], None, None]:
        """Each input's journal line and result, in the output's order.

        Raises:
            OutputError: the output does not hold what its journal says.
        """
        yield from self.output.results()

    def failures(self) -> Iterator[bytes]:
        """The lines of the list of failed inputs beside the output; none where there is no list.

        Raises:
            OutputError: the list is damaged.
        """
        path = beside(self.path, FAILURES_SUFFIX)
        with suppress(FileNotFoundError), path.open("rb") as lines:
            for line in lines:
                if not is_failure(line):
                    raise OutputError(
                        f"{path} is no list of failures; repeat w2v-embed --shard {self.header.shard} --resume, "
                        "which writes it anew."
                    )
                yield line


def merge(
    outputs: Sequence[str],
    merged: Path,
    kind: OutputFormat,
    overwrite: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Joined:
    """Join ``outputs``, all parts of one whole in any order and of any formats.

    The lists of failures beside them are joined as well, shard by shard, into the one beside ``merged``; a list that a
    run wrote elsewhere, with ``--failures``, is not found. ``check`` raises if the lock on ``merged`` was lost.

    Raises:
        OutputError: a part is missing, repeated, unfinished, damaged or of another run, or ``merged`` exists or is
            a file of one of the parts.
        OSError: a part cannot be read or ``merged`` cannot be written; it then does not exist, or is as it was.
    """
    _refuse_output(outputs, merged, kind, overwrite)
    parts = [Part.open(output) for output in outputs]
    _check_same_run(parts)
    _check_complete(parts)
    header = _header(parts)
    layout = _layout(parts, header)
    _allow_open_files(len(parts))
    with ExitStack() as stack:
        failures = PendingFile(beside(merged, FAILURES_SUFFIX), overwrite=True)
        stack.callback(failures.discard)
        listed = _write_failures(parts, failures)
        _write_output(parts, layout, merged, kind, check)
        _check_unchanged(parts)
        # A list of failures is kept only where something failed, and never that of an output that was replaced.
        failures.path.unlink(missing_ok=True)
        if listed:
            failures.commit()
    entries = heapq.merge(*(part.output.entries() for part in parts), key=lambda entry: entry.index)
    write_journal(hidden(merged, JOURNAL_SUFFIX), header, entries)
    hidden(merged, VALUES_SUFFIX).unlink(missing_ok=True)
    drop_earlier(merged)
    failed = listed if header.failed is None else len(header.failed)
    return Joined(layout.count, failed, listed)


def _refuse_output(outputs: Sequence[str], merged: Path, kind: OutputFormat, overwrite: bool) -> None:
    written = Written(
        (
            Use(merged, "the merged output"),
            Use(beside(merged, FAILURES_SUFFIX), "its list of failures"),
            *(Use(path, f"its {what}") for what, path in companions(merged, kind).items()),
            Use(hidden(merged, JOURNAL_SUFFIX), "its journal"),
        )
    )
    for output in outputs:
        path = Path(output)
        written.refuse_reads(
            (
                Use(path, "one of the parts"),
                Use(beside(path, FAILURES_SUFFIX), "a part's list of failures"),
                *(Use(file, f"a part's {what}") for what, file in companions(path, output_format(output)).items()),
                Use(hidden(path, JOURNAL_SUFFIX), "a part's journal"),
                Use(earlier_journal(path), "a part's journal"),
            )
        )
    there = exists(merged)
    if not overwrite and (there or is_unfinished(merged)):
        state = "exists" if there else "has an unfinished run beside it"
        raise OutputError(f"{merged} {state}; replace it with --overwrite, or name another output.")
    check_place(merged, kind, overwrite=True)
    check_failures(beside(merged, FAILURES_SUFFIX))


def _check_same_run(parts: Sequence[Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        differences = [
            f"{name} is {part.computes.get(name)!r}, not {first.computes.get(name)!r}"
            for name in sorted(part.computes.keys() | first.computes.keys())
            if part.computes.get(name) != first.computes.get(name)
        ]
        if differences:
            raise OutputError(
                f"{part.path} is of another run than {first.path}: {'; '.join(differences)}. "
                "Name the parts of one run, made with equal options."
            )
        mine, theirs = part.header.inputs, first.header.inputs
        if mine != theirs:
            raise OutputError(
                f"{part.path} was made of another list of inputs than {first.path} ({_listed(mine)}, not "
                f"{_listed(theirs)}). Name the parts of one run, or bring each up to date with w2v-embed --resume."
            )


def _listed(inputs: Any) -> str:
    return "a list that is not known" if inputs is None else f"{inputs.count} inputs, {inputs.sha256[:12]}…"


def _check_complete(parts: Sequence[Part]) -> None:
    """Raise OutputError unless the parts are the shards 1 to N of the same N, each once."""
    known: dict[int, Part] = {}
    count = parts[0].shard.count
    for part in parts:
        if part.shard.count != count:
            raise OutputError(
                f"{part.path} is shard {part.header.shard}, but {parts[0].path} is shard {parts[0].header.shard}; "
                "name the parts of one run."
            )
        if (twin := known.setdefault(part.shard.index, part)) is not part:
            raise OutputError(f"{part.path} and {twin.path} are both shard {part.header.shard}; name only one of them.")
    if missing := [f"{index}/{count}" for index in range(1, count + 1) if index not in known]:
        shards = f"shard {missing[0]} is" if len(missing) == 1 else f"shards {', '.join(missing)} are"
        raise OutputError(f"{shards} missing; name the output of every shard.")


def _header(parts: Sequence[Part]) -> Header:
    """The journal's header of a run over all inputs."""
    failed = [part.header.failed for part in parts]
    known = [index for part in failed if part is not None for index in part]
    return dataclasses.replace(
        parts[0].header,
        shard="1/1",
        finished=True,
        failed=None if None in failed else tuple(sorted(known)),
        listed=parts[0].header.inputs.count if parts[0].header.by_rows and parts[0].header.inputs else None,
    )


def _layout(parts: Sequence[Part], header: Header) -> Layout:
    """The layout of the merged output; checks the entries of every part on the way."""
    fingerprint, metadata = header.fingerprint, _metadata(parts)
    count = rows = 0
    seen: dict[str, Path] = {}
    for part in parts:
        before = count
        for entry in _in_order(part):
            count += 1
            rows += entry.rows
            if header.inputs is None and (other := seen.setdefault(entry.path, part.path)) != part.path:
                raise OutputError(
                    f"{entry.path} is in {part.path} and in {other}, so they were made of different lists of inputs; "
                    "make them again from one list."
                )
        if expected_results(part.header) not in (None, count - before):
            raise OutputError(
                f"{part.path} lacks results: {count - before} of {expected_results(part.header)} are there. Complete "
                f"it first, with w2v-embed --shard {part.header.shard} --resume."
            )
    return Layout(
        count=count,
        frames=rows if fingerprint["level"] == "frame" else 0,
        dim=metadata["dim"],
        layers=tuple(fingerprint["layers"]),
        level=fingerprint["level"],
        labels=tuple(metadata["labels"]),
        times=FrameTimes(metadata["frame_step_seconds"], metadata["frame_width_seconds"]),
        metadata=metadata | {RUN: run_record(header)},
        head_level=metadata["head_level"] or "utterance",
        columns=columns_of(metadata) if COLUMNS in metadata else None,
        dtype=metadata.get("dtype", "float32"),
    )


def _metadata(parts: Sequence[Part]) -> dict[str, Any]:
    """The merged metadata: where the parts differ, as in their devices, a list of all their values."""
    merged = {}
    for name in parts[0].metadata:
        values: list[Any] = []
        for part in parts:
            if (value := part.metadata.get(name)) not in values:
                values.append(value)
        merged[name] = values[0] if len(values) == 1 else values
    return merged


def _in_order(part: Part) -> Iterator[Entry]:
    before = -1
    for entry in part.output.entries():
        if entry.index <= before or not (part.header.by_rows or part.shard.holds(entry.index)):
            raise OutputError(
                f"{part.path} was continued with other inputs than it was begun with, so the place of {entry.path} is "
                f"unknown; make it again with w2v-embed --shard {part.header.shard} --overwrite."
            )
        before = entry.index
        yield entry


def _write_failures(parts: Sequence[Part], failures: PendingFile) -> int:
    """Write the parts' lists of failures one after the other, and return the number of lines.

    A part whose journal says that nothing failed has no list: what lies beside it is of an earlier run.
    """
    count = 0
    with failures.create() as file:
        for part in sorted(parts, key=lambda part: part.shard.index):
            for line in part.failures() if part.header.failed != () else ():
                file.write(line)
                count += 1
    return count


def _write_output(
    parts: Sequence[Part], layout: Layout, merged: Path, kind: OutputFormat, check: Callable[[], None]
) -> None:
    with ExitStack() as stack:
        store = open_store(merged, layout, kind, overwrite=True)
        stack.callback(store.discard)
        results = [stack.enter_context(closing(part.results())) for part in parts]
        for _, embedding in heapq.merge(*results, key=lambda result: result[0].index):
            store.write(embedding)
        check()
        _check_unchanged(parts)
        # A kill after this leaves an output without a journal, never one beside the journal of what it replaced.
        hidden(merged, JOURNAL_SUFFIX).unlink(missing_ok=True)
        store.commit()


def _check_unchanged(parts: Sequence[Part]) -> None:
    for part in parts:
        part.output.check_unchanged()


def _allow_open_files(parts: int) -> None:
    """Raise the soft limit of open files, often 256 or 1024, so that every part can be read at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = soft + _FILES_PER_PART * parts
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
