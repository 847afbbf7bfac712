"""``.scp``: a Kaldi script file, with its archive of float32 beside it: ``out.scp`` and ``out.ark``.

``kaldiio.load_scp("out.scp")`` gives (D,) for each key, or (T, D) at frame level; several layers stand side by side,
(layers · D). The logits of a frame-level head are (T, K) in ``out.logits.scp`` and ``out.logits.ark``. A key is the
``utterance`` or ``id`` of a table's segment, else the input's path, with its times for a segment; white space in it is
percent-encoded, and the later of two that are equal gets ``~2``. Lines are sorted by key in the order of bytes, as
Kaldi's tools expect; they name the archive by its whole path. ``out.scp.index.jsonl`` has one line per input, in input
order: ``key``, where its values begin in the archives in bytes (``ark``, ``logits_ark``), and as ``input`` what a line
of ``.jsonl`` holds but the vectors. ``out.scp.metadata.json`` describes the run.
Format: https://kaldi-asr.org/doc/io.html.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from urllib.parse import quote

import numpy as np
from kaldiio import matio

from w2v_runtime.stores import text
from w2v_runtime.stores.base import JSON, Layout, Ledger, Metadata
from w2v_runtime.stores.jsonl import described, records_of
from w2v_runtime.stores.names import file_text
from w2v_runtime.stores.pending import PendingFile, close_quietly
from w2v_runtime.stores.reading import Record, Shape, Values, paired
from w2v_runtime.stores.text import TextOutput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from w2v_runtime.embedding.results import Embedding

#: The columns of a table that name an utterance, the first that it has.
_IDS: Final = ("utterance", "id")
_VALUES_KEY, _LOGITS_KEY, _INPUT_KEY = "ark", "logits_ark", "input"
#: The files of an output, but for itself and its metadata.
_ARCHIVE, _INDEX, _LOGITS_ARCHIVE, _LOGITS = "archive", "index", "archive of logits", "list of logits"
_NOT_IN_KEYS: Final = re.compile(r"[\s\x00-\x1f\x7f]")


class KaldiStore:
    """Writes each input's values into the archive as they come, and the sorted lines of the script file at commit."""

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._path, self._layout = pending.path, layout
        self._ledger = Ledger(layout)
        names = [column.name for column in layout.columns or ()]
        self._id = next((name for name in _IDS if name in names), None)
        self._copies: dict[str, int] = {}
        self._output = TextOutput(pending)
        held = (_ARCHIVE, _INDEX, *((_LOGITS_ARCHIVE, _LOGITS) if layout.logits_by_frame else ()))
        self._parts = {name: PendingFile(parts(pending.path)[name], overwrite=True) for name in held}
        self._archive = _Archive(self._parts[_ARCHIVE])
        self._logits = _Archive(self._parts[_LOGITS_ARCHIVE]) if layout.logits_by_frame else None
        self._index = self._parts[_INDEX].create()

    def write(self, embedding: Embedding) -> None:
        rows = (
            self._layout.rows_of(embedding).astype(np.float32, copy=False).reshape(-1, math.prod(self._layout.vector))
        )
        record = described(self._layout, embedding)
        self._ledger.add(embedding, len(rows))
        key = self._key(record)
        told: dict[str, Any] = {"key": key, _INPUT_KEY: record}
        told |= {_VALUES_KEY: self._archive.add(key, rows if self._layout.level == "frame" else rows[0])}
        if self._logits is not None:
            told[_LOGITS_KEY] = self._logits.add(key, self._layout.logits_of(embedding))
        self._index.write(json.dumps(told).encode("ascii") + b"\n")

    def commit(self) -> None:
        self._index.close()
        self._archive.close()
        self._output.file.writelines(self._archive.lines())
        if self._logits is not None:
            self._logits.close()
            with self._parts[_LOGITS].create() as scp:
                scp.writelines(line.encode(errors="surrogateescape") for line in self._logits.lines())
        self._output.commit(self._ledger, self._parts, parts(self._path))

    def discard(self) -> None:
        self._output.discard()
        close_quietly(self._archive, self._index, *([] if self._logits is None else [self._logits]))
        for part in self._parts.values():
            part.discard()

    def _key(self, record: dict[str, JSON]) -> str:
        """The key of the input that was added last, another one for each."""
        told = None if self._id is None else record[self._id]
        wanted = file_text(self._ledger.names[-1]) if told is None or told == "" else str(told)
        name = key = _NOT_IN_KEYS.sub(lambda found: quote(found[0]), wanted)
        while key in self._archive:
            self._copies[name] = number = self._copies.get(name, 1) + 1
            key = f"{name}~{number}"
        return key


def parts(output: Path) -> dict[str, Path]:
    """The places of an output's archive, its index, and the archive and script file of frame-level logits."""
    logits = output.with_name(f"{output.stem}.logits{output.suffix}")
    return {
        _ARCHIVE: output.with_suffix(".ark"),
        _INDEX: output.with_name(f"{output.name}.index.jsonl"),
        _LOGITS_ARCHIVE: logits.with_suffix(".ark"),
        _LOGITS: logits,
    }


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input."""
    return _read(path, _VALUES_KEY, shapes)


def read_logits(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The frame-level logits (T, K) of each input."""
    return _read(path, _LOGITS_KEY, shapes)


def _read(path: Path, key: str, shapes: Iterable[Shape]) -> Iterator[Values]:
    read_metadata(path)  # which checks the archives
    places = parts(path)
    ark = places[_ARCHIVE if key == _VALUES_KEY else _LOGITS_ARCHIVE]
    with places[_INDEX].open("rb") as lines, ark.open("rb") as archive:
        for line, shape in paired(lines, shapes):
            archive.seek(json.loads(line)[key])
            # Not kaldiio's function for any kind of value: an archive may hold pickles, which run what they say.
            values = matio.read_matrix_or_vector(archive)
            if values.shape != ((shape[0], math.prod(shape[1:])) if values.ndim == 2 else (math.prod(shape),)):
                raise ValueError(f"{ark.name} holds {values.shape} where {shape} was written")
            yield values.astype(np.float32, copy=False).reshape(shape)


def read_records(path: Path) -> Iterator[Record]:
    """The record of each input, from the index."""
    metadata = read_metadata(path)
    with parts(path)[_INDEX].open("rb") as index:
        yield from records_of(metadata, (json.loads(line)[_INPUT_KEY] for line in index))


def read_metadata(path: Path) -> Metadata:
    """The metadata of the output, whose files are all there and as they were written."""
    return text.read_metadata(path, parts(path))


class _Archive:
    """A Kaldi archive that is being written, and where in it each key's values begin, in bytes."""

    def __init__(self, pending: PendingFile) -> None:
        self._path = pending.path
        self._file: BinaryIO = pending.create()
        self._places: dict[bytes, int] = {}

    def __contains__(self, key: str) -> bool:
        return key.encode() in self._places

    def add(self, key: str, values: npt.NDArray[np.float32]) -> int:
        """Append a vector (n,) or matrix (T, n); returns where its values begin."""
        told = key.encode()
        self._file.write(told + b" ")
        place = self._file.tell()
        matio.write_array(self._file, values)
        self._places[told] = place
        return place

    def lines(self) -> Iterator[str]:
        """The lines of the script file, sorted by key."""
        for key, place in sorted(self._places.items()):
            yield f"{key.decode()} {self._path}:{place}\n"

    def close(self) -> None:
        """Close the file."""
        self._file.close()
