"""The inputs of a run as it goes through them: recordings, or the segments of a table; counted and hashed on the way.

Shards of recordings take turns. Segments are shared out by the file that their row names, so that those of one
recording are in one shard, and each keeps its row as its position.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO, Protocol

from w2v_models.errors import AudioError
from w2v_runtime.embedding.inputs import Input, label_of
from w2v_runtime.embedding.results import Segment
from w2v_runtime.runs.inputs import STANDARD_INPUT, Shard
from w2v_runtime.runs.journal import Inputs
from w2v_runtime.tables import Row, Table
from w2v_runtime.tables.recordings import Recordings


class Listed(Protocol):
    """The inputs of a run; ``one`` is what messages call one of them."""

    one: str

    def __iter__(self) -> Iterator[Input]:
        """This shard's inputs, in order."""

    @property
    def seen(self) -> Inputs:
        """Count and hash of the inputs of all shards, once these are iterated: of one list, shards can be merged."""

    @property
    def listed(self) -> int | None:
        """How many inputs this shard has, if that does not follow from their count."""


class Files:
    """Recordings, by their paths.

    Args:
        paths: those of all shards.
        shard: the part of them that is embedded.
        standard_input: the content of the input ``-``, as a file that can be read again.
    """

    one = "file"
    listed = None

    def __init__(self, paths: Iterable[str], shard: Shard, standard_input: BinaryIO | None = None) -> None:
        self._paths, self._shard, self._standard_input = paths, shard, standard_input
        self._count, self._hash = 0, hashlib.sha256()

    def __iter__(self) -> Iterator[Input]:
        position = 0
        for path in self._paths:
            self._hash.update(os.fsencode(path) + b"\0")
            self._count += 1
            if self._shard.holds(self._count - 1):
                yield Input(position, path, self._standard_input if path == STANDARD_INPUT else None)
                position += 1

    @property
    def seen(self) -> Inputs:
        return Inputs(self._count, self._hash.hexdigest())


class Rows:
    """The segments of a table; each row's recording is found as it comes, and one that is not has a fault."""

    one = "segment"

    def __init__(self, table: Table, recordings: Recordings, shard: Shard) -> None:
        self._table, self._recordings, self._shard = table, recordings, shard
        self._seen: Inputs | None = None
        self._listed = 0

    def __iter__(self) -> Iterator[Input]:
        count, listed, hash_ = 0, 0, hashlib.sha256()
        for row in self._table.rows():
            fields = self._table.values(row)
            asked = (row.file, row.start, row.end, row.channel, fields)
            hash_.update(repr(asked).encode(errors="surrogateescape") + b"\0")
            if self._shard.holds_name(row.file):
                listed += 1
                yield self._input(count, row, Segment(row.start, row.end, row.channel, fields))
            count += 1
        self._seen, self._listed = Inputs(count, hash_.hexdigest()), listed

    def _input(self, position: int, row: Row, segment: Segment) -> Input:
        path, fault = row.file, None
        try:
            path = self._recordings.find(row.file)
        except AudioError as error:
            fault = str(error)
        return Input(position, path, None, segment, label_of(f"{self._table.one} {row.number}", segment), fault)

    @property
    def seen(self) -> Inputs:
        return self._seen or Inputs(0, "")

    @property
    def listed(self) -> int | None:
        return self._listed
