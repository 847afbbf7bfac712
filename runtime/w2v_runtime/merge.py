"""``w2v-merge``: the outputs of ``w2v-embed --shard`` runs joined into one, in the order of the inputs.

A part is an output and the journal beside it, whose lines tell where each input stood among the inputs of all parts.
All parts are read side by side, so memory holds one result of each.
"""

from __future__ import annotations

import heapq
import json
import os
import resource
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from w2v_models.errors import OutputError
from w2v_runtime.inputs import Shard
from w2v_runtime.journal import (
    FAILURES_SUFFIX,
    JOURNAL_SUFFIX,
    VALUES_SUFFIX,
    Entry,
    Header,
    beside,
    exists,
    read_back,
    read_entries,
    write_journal,
)
from w2v_runtime.results import Embedding, Failure, FrameTimes
from w2v_runtime.stores import Layout, OutputFormat, open_store, output_format, read_metadata
from w2v_runtime.stores import check_output as check_place
from w2v_runtime.stores.pending import PendingFile

#: Metadata that follow from what a run computes, so that parts which differ in them do not belong together.
_OF_THE_LAYOUT: Final = ("dim", "labels", "head_level", "frame_step_seconds", "frame_width_seconds")
#: Metadata of single inputs; every store writes those that its own inputs have.
_WARNINGS: Final = "warnings"
#: Files that a part holds open while it is read, at most.
_FILES_A_PART: Final = 5


@dataclass(frozen=True)
class Joined:
    """What was joined: inputs that are embedded, and inputs that the parts' lists of failures name."""

    embedded: int
    failed: int


@dataclass(frozen=True)
class Part:
    """One finished output of ``w2v-embed``, with what its journal and its metadata say."""

    path: Path
    kind: OutputFormat
    header: Header
    shard: Shard
    metadata: dict[str, Any]

    @classmethod
    def open(cls, output: str) -> Part:
        """Open an output as the user typed it.

        Raises:
            OutputError: it has no journal, is unfinished or damaged, or has no known format.
        """
        path, kind = Path(output), output_format(output)
        header = Header.read(beside(path, JOURNAL_SUFFIX))
        if header is None:
            raise OutputError(
                f"{path} has no journal beside it ({path.name}{JOURNAL_SUFFIX}); name outputs of w2v-embed --shard."
            )
        if not header.finished:
            raise OutputError(
                f"{path} is unfinished; continue it first, with w2v-embed --shard {header.shard} --resume."
            )
        metadata = read_metadata(path, kind)
        metadata.pop(_WARNINGS, None)
        return cls(path, kind, header, Shard.of(header.shard), metadata)

    @property
    def computes(self) -> dict[str, Any]:
        """What all parts of one output have in common."""
        return self.header.fingerprint | {name: self.metadata.get(name) for name in _OF_THE_LAYOUT}

    def entries(self) -> Iterator[Entry]:
        """The journal's lines, in the output's order."""
        return read_entries(beside(self.path, JOURNAL_SUFFIX))

    def results(self) -> Generator[tuple[Entry, Embedding], None, None]:
        """Each input's journal line and result, in the output's order.

        Raises:
            OutputError: the output does not hold what its journal says.
        """
        return read_back(self.path, self.kind)

    def failures(self) -> Iterator[bytes]:
        """The lines of the list of failed inputs beside the output; none where there is no list.

        Raises:
            OutputError: the list is damaged.
        """
        path = beside(self.path, FAILURES_SUFFIX)
        with suppress(FileNotFoundError), path.open("rb") as lines:
            for line in lines:
                if not _is_failure(line):
                    raise OutputError(
                        f"{path} is no list of failures; repeat w2v-embed --shard {self.header.shard} --resume, "
                        "which writes it anew."
                    )
                yield line


def merge(outputs: Sequence[str], merged: Path, kind: OutputFormat, overwrite: bool = False) -> Joined:
    """Join ``outputs``, all parts of one whole in any order and of any formats.

    The lists of failures beside them are joined as well, shard by shard, into the one beside ``merged``; a list that a
    run wrote elsewhere, with ``--failures``, is not known here.

    Raises:
        OutputError: a part is missing, repeated, unfinished, damaged or of another run, or ``merged`` exists.
        OSError: a part cannot be read or ``merged`` cannot be written; it then does not exist, or is as it was.
    """
    _check_output(outputs, merged, kind, overwrite)
    parts = [Part.open(output) for output in outputs]
    _check_same_run(parts)
    _check_complete(parts)
    layout = _layout(parts)
    _allow_open_files(len(parts))
    with ExitStack() as stack:
        failures = PendingFile(beside(merged, FAILURES_SUFFIX), overwrite=True)
        stack.callback(failures.discard)
        failed = _write_failures(parts, failures)
        _write_output(parts, layout, merged, kind)
        # A list of failures is kept only where something failed, and never that of an output that was replaced.
        failures.path.unlink(missing_ok=True)
        if failed:
            failures.commit()
    entries = heapq.merge(*(part.entries() for part in parts), key=lambda entry: entry.index)
    write_journal(
        beside(merged, JOURNAL_SUFFIX), Header(parts[0].header.fingerprint, shard="1/1", finished=True), entries
    )
    beside(merged, VALUES_SUFFIX).unlink(missing_ok=True)
    return Joined(layout.count, failed)


def _check_output(outputs: Sequence[str], merged: Path, kind: OutputFormat, overwrite: bool) -> None:
    if os.path.realpath(merged) in map(os.path.realpath, outputs):
        raise OutputError(f"{merged} is one of the parts; name another output.")
    there = exists(merged)
    if not overwrite and (there or beside(merged, VALUES_SUFFIX).exists()):
        state = "exists" if there else "has an unfinished run beside it"
        raise OutputError(f"{merged} {state}; replace it with --overwrite, or name another output.")
    check_place(merged, kind, overwrite=True)


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


def _layout(parts: Sequence[Part]) -> Layout:
    """The layout of the whole; on the way every journal is read through once."""
    fingerprint, metadata = parts[0].header.fingerprint, _metadata(parts)
    count = rows = 0
    for part in parts:
        for entry in _in_order(part):
            count += 1
            rows += entry.rows
    return Layout(
        count=count,
        frames=rows if fingerprint["level"] == "frame" else 0,
        dim=metadata["dim"],
        layers=tuple(fingerprint["layers"]),
        level=fingerprint["level"],
        labels=tuple(metadata["labels"]),
        times=FrameTimes(metadata["frame_step_seconds"], metadata["frame_width_seconds"]),
        metadata=metadata,
        head_level=metadata["head_level"] or "utterance",
    )


def _metadata(parts: Sequence[Part]) -> dict[str, Any]:
    """What the parts say of themselves; where they differ, as in their devices, a list of all that is said."""
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
    for entry in part.entries():
        if entry.index <= before or not part.shard.holds(entry.index):
            raise OutputError(
                f"{part.path} was continued with other inputs than it was begun with, so the place of {entry.path} is "
                f"unknown; make it again with w2v-embed --shard {part.header.shard} --overwrite."
            )
        before = entry.index
        yield entry


def _write_failures(parts: Sequence[Part], failures: PendingFile) -> int:
    """Write the parts' lists of failures one after the other, and return how many lines there are."""
    count = 0
    with failures.create() as file:
        for part in sorted(parts, key=lambda part: part.shard.index):
            for line in part.failures():
                file.write(line)
                count += 1
    return count


def _is_failure(line: bytes) -> bool:
    try:
        Failure(**json.loads(line))
    except (ValueError, TypeError):
        return False
    return line.endswith(b"\n")


def _write_output(parts: Sequence[Part], layout: Layout, merged: Path, kind: OutputFormat) -> None:
    with ExitStack() as stack:
        store = open_store(merged, layout, kind, overwrite=True)
        stack.callback(store.discard)
        results = [stack.enter_context(closing(part.results())) for part in parts]
        for _, embedding in heapq.merge(*results, key=lambda result: result[0].index):
            store.write(embedding)
        # A kill after this leaves an output without a journal, never one beside the journal of what it replaced.
        beside(merged, JOURNAL_SUFFIX).unlink(missing_ok=True)
        store.commit()


def _allow_open_files(parts: int) -> None:
    """Raise the soft limit of open files, often 256 or 1024, so that every part can be read at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = soft + _FILES_A_PART * parts
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
