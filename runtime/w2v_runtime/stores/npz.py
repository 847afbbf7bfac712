"""``.npz``: ``embeddings``, ``paths``, ``durations``, ``metadata``; ``frame_offsets`` of frames; a head's ``logits``.

Reads with ``numpy.load(path)``, no pickle. ``embeddings`` is (N, D) float32, (ΣT, D) at frame level, with a layers axis
before D for several layers; the frames of input i are ``embeddings[frame_offsets[i]:frame_offsets[i + 1]]``. Names that
are not UTF-8 stand in ``paths`` as ``os.fsdecode`` gives them, so ``os.fsencode`` returns their bytes.
"""

from __future__ import annotations

import zipfile
from typing import IO, TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from w2v_runtime.stores.base import Layout, Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from w2v_runtime.results import Embedding
    from w2v_runtime.stores.pending import PendingFile

#: Text is padded to its longest string (4 bytes a character), so it is written in blocks of this many strings.
TEXT_BLOCK: Final = 4096


def write_header(file: IO[bytes], dtype: str, shape: tuple[int, ...]) -> None:
    """Write the header of a ``.npy`` file whose data follow in C order."""
    npy_format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})


class NpzStore:
    """Streams the vectors into the archive's first member; the small arrays follow at commit."""

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._pending = pending
        self._layout = layout
        self._ledger = Ledger(layout)
        self._file = pending.create()
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._embeddings = self._member("embeddings")
        write_header(self._embeddings, "<f4", (layout.rows, *layout.vector))

    def write(self, embedding: Embedding) -> None:
        rows = self._layout.rows_of(embedding)
        self._embeddings.write(rows.data)
        self._ledger.add(embedding, len(rows))

    def commit(self) -> None:
        ledger, layout = self._ledger, self._layout
        ledger.check_complete()
        self._embeddings.close()
        self._add_text("paths", ledger.paths)
        self._add("durations", np.asarray(ledger.durations))
        if layout.level == "frame":
            self._add("frame_offsets", np.asarray(ledger.offsets))
        if layout.labels:
            self._add("logits", np.asarray(ledger.logits).reshape(layout.count, len(layout.labels)))
            self._add_text("logit_names", layout.labels)
        self._add("metadata", np.array(ledger.metadata_text()))
        self._zip.close()
        self._file.close()
        self._pending.commit()

    def discard(self) -> None:
        self._pending.discard(self._embeddings, self._zip, self._file)

    def _member(self, name: str) -> IO[bytes]:
        # A ZipInfo without a date, so that equal results are equal bytes; ZIP64 because sizes are not announced.
        return self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

    def _add(self, name: str, array: npt.NDArray[np.generic]) -> None:
        with self._member(name) as member:
            npy_format.write_array(member, array, allow_pickle=False)

    def _add_text(self, name: str, strings: Sequence[str]) -> None:
        dtype = f"<U{max(map(len, strings), default=1)}"
        with self._member(name) as member:
            write_header(member, dtype, (len(strings),))
            for block in _blocks(strings):
                member.write(np.array(block, dtype=dtype).tobytes())


def _blocks(strings: Sequence[str]) -> Iterable[Sequence[str]]:
    return (strings[start : start + TEXT_BLOCK] for start in range(0, len(strings), TEXT_BLOCK))
