"""A folder with one ``.npy`` file per input, which mirrors the inputs' folders: ``a/b.wav`` becomes ``a/b.wav.npy``.

An array is (D,) or (T, D) float32, with a layers axis before D for several layers. ``index.jsonl`` has one line per
input, in input order: ``npy`` (the array's name inside the folder), and ``file``, ``duration``, ``logits``,
``warnings`` as in ``.jsonl``. The logits of a frame-level head are arrays (T, K) of the same names in the folder
``logits``, listed as ``logits_npy`` in the index; an input folder of that name becomes ``logits~``. ``metadata.json``
describes the run. A segment's array has its times in its name, ``a/b.wav.1.5-2.25.npy``. If an input is absolute or
has ``..``, all are named from the deepest folder that holds them all (:func:`w2v_runtime.stores.tree.mirrored`).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from w2v_runtime.stores.base import Layout, Ledger, Metadata
from w2v_runtime.stores.jsonl import described, records_of
from w2v_runtime.stores.names import file_text, path_of
from w2v_runtime.stores.npz import read_header, write_header
from w2v_runtime.stores.pending import ARRAYS, INDEX, METADATA, PendingFolder
from w2v_runtime.stores.reading import Record, Shape, Values, check_array, paired
from w2v_runtime.stores.tree import mirrored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from w2v_runtime.embedding.results import Embedding

_STAGING: Final = ".staging"
_LOGITS: Final = "logits"
_VALUES_KEY, _LOGITS_KEY = ARRAYS
RESERVED: Final = frozenset({INDEX, METADATA, _STAGING})


class NpyStore:
    """Writes numbered arrays, and names them at commit, when the folder that holds all inputs is known."""

    def __init__(self, pending: PendingFolder, layout: Layout) -> None:
        self._pending = pending
        self._layout = layout
        self._ledger = Ledger(layout)
        self._staging = pending.temporary / _STAGING
        self._staging.mkdir()
        self._records = (self._staging / INDEX).open("x", encoding="ascii")

    def write(self, embedding: Embedding) -> None:
        rows = self._layout.rows_of(embedding)
        values = rows if self._layout.level == "frame" else rows[0]
        _write_array(self._staging / f"{len(self._ledger.paths)}.npy", values)
        if self._layout.logits_by_frame:
            _write_array(self._staging / f"{len(self._ledger.paths)}.{_LOGITS}.npy", self._layout.logits_of(embedding))
        self._records.write(json.dumps(described(self._layout, embedding)) + "\n")
        self._ledger.add(embedding, len(rows))

    def commit(self) -> None:
        self._ledger.check_complete()
        self._records.close()
        self._name_arrays()
        text = json.dumps(self._ledger.metadata(), indent=2) + "\n"
        (self._pending.temporary / METADATA).write_text(text, encoding="ascii")
        self._pending.commit()

    def discard(self) -> None:
        self._pending.discard(self._records)

    def _name_arrays(self) -> None:
        root, by_frame = self._pending.temporary, self._layout.logits_by_frame
        records = self._staging / INDEX
        with records.open(encoding="ascii") as lines, (root / INDEX).open("x", encoding="ascii") as index:
            names = mirrored(self._ledger.names, ".npy", RESERVED | {_LOGITS} if by_frame else RESERVED)
            for number, (name, line) in enumerate(zip(names, lines, strict=True)):
                record = {_VALUES_KEY: file_text(name)}
                _move(self._staging / f"{number}.npy", root / name)
                if by_frame:
                    record[_LOGITS_KEY] = file_text(f"{_LOGITS}/{name}")
                    _move(self._staging / f"{number}.{_LOGITS}.npy", root / _LOGITS / name)
                index.write(json.dumps(record | json.loads(line)) + "\n")
        records.unlink()
        self._staging.rmdir()


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input, array by array as the index lists them."""
    return _read(path, _VALUES_KEY, shapes)


def read_logits(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The frame-level logits (T, K) of each input."""
    return _read(path, _LOGITS_KEY, shapes)


def _read(path: Path, key: str, shapes: Iterable[Shape]) -> Iterator[Values]:
    with (path / INDEX).open("rb") as index:
        for line, shape in paired(index, shapes):
            yield _read_array(path / path_of(json.loads(line)[key]), shape)


def read_records(path: Path) -> Iterator[Record]:
    """The record of each input, from the index."""
    metadata = read_metadata(path)
    with (path / INDEX).open("rb") as index:
        yield from records_of(metadata, map(json.loads, index))


def read_metadata(path: Path) -> Metadata:
    """The metadata of the output."""
    metadata: Metadata = json.loads((path / METADATA).read_bytes())
    return metadata


def _write_array(path: Path, values: npt.NDArray[Any]) -> None:
    with path.open("xb") as file:
        write_header(file, values.dtype.str, values.shape)
        file.write(values.data)


def _move(array: Path, name: Path) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    array.rename(name)


def _read_array(path: Path, shape: Shape) -> Values:
    with path.open("rb") as file:
        stored, dtype = read_header(file)
        check_array(dtype, stored, shape)
        values = np.fromfile(file, dtype, math.prod(shape)).astype(np.float32, copy=False)
        if file.read(1):
            raise ValueError(f"{path} holds more than its header says")
    return values.reshape(shape)
