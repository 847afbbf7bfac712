"""What the command line names to be embedded: recordings, or a table of segments with the places of its recordings."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, Final

from w2v_models.errors import AudioError, RefusedError
from w2v_runtime.commands import terminal

if TYPE_CHECKING:
    from w2v_runtime.files.outputs import Written
    from w2v_runtime.runs.inputs import Shard
    from w2v_runtime.runs.listed import Files, Rows
    from w2v_runtime.tables import Table

#: Places without audio, of which an error message names at most this many.
_NAMED_PLACES: Final = 3
#: For at most this many files, all named on the command line, prepacking the weights takes longer than it saves.
_FEW_FILES: Final = 4


class Sources:
    """The recordings that the command line names, listed once, and the number of files that were passed over."""

    def __init__(self, arguments: list[str], files_from: str | None, null: bool, shard: Shard) -> None:
        from w2v_runtime.runs.inputs import Listing, list_inputs

        self._arguments, self._files_from, self._shard = arguments, files_from, shard
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
        """Wait until all inputs are listed, and return the shard's number of them; None if the run ends before."""
        total = self._listing.total()
        return None if total is None else self._shard.size(total)

    @contextlib.contextmanager
    def opened(self, written: Written | None = None) -> Iterator[Files]:
        """The shard's inputs; ``written`` are files of which none may be an input, checked before any is embedded.

        Raises:
            RefusedError: there is no input.
            OutputError: an input is one of the files.
            AudioError: there is no room for the recording on standard input.
        """
        from w2v_runtime.runs.listed import Files

        paths: Iterable[str] = self.begun()
        if written is not None and not self.piped:
            paths = list(paths)
            written.refuse_inputs(paths)
        with self.standard_input() as recording:
            yield Files(paths, self._shard, recording)

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
            others = "".join(f" ({words})" for words in passed_over_words(self.passed_over))
            raise RefusedError(f"{found}; name recordings, or folders that hold some{others}.")
        return itertools.chain([first], inputs)

    def _pass_over(self, path: str) -> None:  # noqa: ARG002
        self.passed_over += 1


class TableSources:
    """The segments of a table, whose recordings are looked for below the inputs that the command line names."""

    passed_over = 0
    few = False

    def __init__(self, table: Table, arguments: list[str], files_from: str | None, null: bool, shard: Shard) -> None:
        from w2v_runtime.runs.inputs import list_inputs
        from w2v_runtime.runs.lists import read_list
        from w2v_runtime.tables.recordings import Recordings

        self._table, self._shard = table, shard
        for argument in arguments:
            if not os.path.exists(argument):
                raise RefusedError(f"the input {argument} does not exist; with --segments it is where recordings are.")
        named = list(list_inputs(arguments, files_from, null)) if table.named else None
        places = [*arguments, *(() if files_from is None else read_list(files_from, null))]
        self._recordings = Recordings(table.path, places, named)

    def total(self) -> int | None:
        """The shard's number of segments."""
        if self._shard.count == 1:
            return self._table.count
        return sum(self._shard.holds_name(row.file) for row in self._table.rows())

    @contextlib.contextmanager
    def opened(self, written: Written | None = None) -> Iterator[Rows]:
        """The shard's segments; ``written`` are files of which none may be a recording.

        Raises:
            OutputError: a recording is one of the files.
        """
        from w2v_runtime.runs.listed import Rows

        if written is not None:
            paths = set[str]()
            for file in {row.file for row in self._table.rows()}:
                with contextlib.suppress(AudioError):
                    paths.add(self._recordings.find(file))
            written.refuse_inputs(list(paths))
        yield Rows(self._table, self._recordings, self._shard)


def passed_over_words(files: int) -> list[str]:
    """The words of the summary line on files in folders that are not recordings; empty if there are none."""
    return [f"{terminal.count_of(files, 'other file')} passed over"] if files else []
