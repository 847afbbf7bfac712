"""``.npz``: ``embeddings``, ``paths``, ``durations``, ``metadata``; ``frame_offsets`` of frames; a head's ``logits``.

Reads with ``numpy.load(path)``, no pickle. ``embeddings`` is (N, D) float32, (ΣT, D) at frame level, with a layers axis
before D for several layers; the frames of input i are ``embeddings[frame_offsets[i]:frame_offsets[i + 1]]``. ``logits``
is (N, K), or (ΣT, K) of a frame-level head, with the same offsets; ``logit_names`` names the columns. Paths that are
not UTF-8 are stored in ``paths`` as ``os.fsdecode`` gives them, so ``os.fsencode`` returns their bytes.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from typing import IO, TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from w2v_runtime.stores.base import Layout, Ledger, Metadata
from w2v_runtime.stores.reading import Record, Recorder, Shape, Values, block_rows, check_array, cut

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from w2v_runtime.embedding.results import Embedding
    from w2v_runtime.stores.pending import PendingFile

#: Text is padded to its longest string (4 bytes a character), so it is written in blocks of this many strings.
TEXT_BLOCK: Final = 4096


def write_header(file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    """Write the header of a ``.npy`` file whose data follow in C order."""
    npy_format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


def read_header(file: IO[bytes]) -> Shape:
    """Read what :func:`write_header` wrote for float32; the data follow, in C order.

    Raises:
        ValueError: it is not the header of a float32 array in C order.
    """
    version = npy_format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"it has a header of version {version}")
    shape, fortran_order, dtype = npy_format.read_array_header_1_0(file)
    if fortran_order:
        raise ValueError("it holds an array in Fortran order")
    check_array(dtype, shape, shape)
    return shape


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input; the archive's checksum is checked with the last of them."""
    return _read(path, "embeddings", shapes)


def read_logits(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The frame-level logits (T, K) of each input; the archive's checksum is checked with the last of them."""
    return _read(path, "logits", shapes)


def _read(path: Path, name: str, shapes: Iterable[Shape]) -> Iterator[Values]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        yield from cut(_vectors(member), shapes)


def read_records(path: Path) -> Iterator[Record]:
    """The record of each input, from the arrays beside the vectors."""
    metadata = read_metadata(path)
    recorder = Recorder(metadata, metadata.get("warnings", {}))
    with np.load(path, allow_pickle=False) as arrays:
        durations = arrays["durations"]
        rows = np.diff(arrays["frame_offsets"]) if metadata["level"] == "frame" else np.ones(len(durations), int)
        columns = metadata["labels"] and metadata["head_level"] != "frame"
        logits = arrays["logits"] if columns else np.empty((len(durations), 0), np.float32)
        for path_, *told in zip(_texts(path, "paths"), durations, rows.tolist(), logits.tolist(), strict=True):
            yield recorder.record(path_, *told)


def read_metadata(path: Path) -> Metadata:
    """The metadata of the output."""
    with zipfile.ZipFile(path) as archive, archive.open("metadata.npy") as member:
        metadata: Metadata = json.loads(npy_format.read_array(member, allow_pickle=False).item())
    return metadata


class NpzStore:
    """Streams the vectors into the archive's first member; all else follows at commit.

    An archive takes one member at a time, so frame-level logits wait in a file without a name, which needs no removal.
    """

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._pending = pending
        self._layout = layout
        self._ledger = Ledger(layout)
        self._file = pending.create()
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._embeddings = self._member("embeddings")
        write_header(self._embeddings, "<f4", (layout.rows, *layout.vector))
        self._logits = pending.scratch() if layout.logits_by_frame else io.BytesIO()

    def write(self, embedding: Embedding) -> None:
        rows = self._layout.rows_of(embedding)
        self._embeddings.write(rows.data)
        if self._layout.logits_by_frame:
            self._logits.write(self._layout.logits_of(embedding).data)
        self._ledger.add(embedding, len(rows))

    def commit(self) -> None:
        ledger, layout = self._ledger, self._layout
        ledger.check_complete()
        self._embeddings.close()
        self._add_text("paths", ledger.paths)
        self._add("durations", np.asarray(ledger.durations))
        if layout.level == "frame":
            self._add("frame_offsets", np.asarray(ledger.offsets))
        if layout.logits_by_frame:
            self._add_frame_logits()
        elif layout.labels:
            self._add("logits", np.asarray(ledger.logits).reshape(layout.count, len(layout.labels)))
        if layout.labels:
            self._add_text("logit_names", layout.labels)
        self._add("metadata", np.array(ledger.metadata_text()))
        self._zip.close()
        self._file.close()
        self._pending.commit()

    def discard(self) -> None:
        self._pending.discard(self._logits, self._embeddings, self._zip, self._file)

    def _member(self, name: str) -> IO[bytes]:
        # A ZipInfo without a date, so that equal results are equal bytes; ZIP64 because sizes are not announced.
        return self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

    def _add(self, name: str, array: npt.NDArray[np.generic]) -> None:
        with self._member(name) as member:
            npy_format.write_array(member, array, allow_pickle=False)

    def _add_frame_logits(self) -> None:
        self._logits.seek(0)
        with self._member("logits") as member:
            write_header(member, "<f4", (self._layout.rows, len(self._layout.labels)))
            shutil.copyfileobj(self._logits, member)
        self._logits.close()

    def _add_text(self, name: str, strings: Sequence[str]) -> None:
        dtype = f"<U{max(map(len, strings), default=1)}"
        with self._member(name) as member:
            write_header(member, dtype, (len(strings),))
            for block in _blocks(strings):
                member.write(np.array(block, dtype=dtype).tobytes())


def _blocks(strings: Sequence[str]) -> Iterable[Sequence[str]]:
    return (strings[start : start + TEXT_BLOCK] for start in range(0, len(strings), TEXT_BLOCK))


def _texts(path: Path, name: str) -> Iterator[str]:
    """The strings of a member that :meth:`NpzStore._add_text` wrote, block by block."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        npy_format.read_magic(member)
        (count,), _, dtype = npy_format.read_array_header_1_0(member)
        for start in range(0, count, TEXT_BLOCK):
            taken = min(TEXT_BLOCK, count - start)
            yield from np.frombuffer(member.read(taken * dtype.itemsize), dtype).tolist()


def _vectors(member: IO[bytes]) -> Iterator[Values]:
    rows, *vector = read_header(member)
    at_once = block_rows(tuple(vector))
    for start in range(0, rows, at_once):
        taken = min(at_once, rows - start)
        data = member.read(4 * taken * int(np.prod(vector)))
        yield np.frombuffer(data, "<f4").reshape(taken, *vector)
    if member.read(1):
        raise ValueError("it holds more than its header says")
