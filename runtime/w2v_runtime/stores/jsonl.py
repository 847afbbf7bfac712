"""``.jsonl`` and standard output: one JSON object a line and an input.

``file``, ``start``, ``end``, ``duration`` (seconds), ``logits`` by label, ``warnings`` if any, and ``embedding``: D
numbers, or a list of them for each layer. At frame level ``embeddings`` holds such an entry a frame, and frame t runs
from t·``step`` to t·``step`` + ``width`` seconds. Reads with ``pandas.read_json(path, lines=True)``. The lines are
ASCII; a name that is not UTF-8 is escaped as Python's ``json`` does it, so that ``json.loads`` and ``os.fsencode`` give
its bytes again (pandas 3 has no text that can hold such a name).
"""

from __future__ import annotations

import json
import math
import re
from typing import IO, TYPE_CHECKING, Final

import numpy as np

from w2v_runtime.stores.base import JSON, Layout, Ledger
from w2v_runtime.stores.reading import BLOCK_BYTES, Shape, Values, paired
from w2v_runtime.stores.text import TextOutput, shortest
from w2v_runtime.stores.text import read_metadata as read_metadata

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from w2v_runtime.results import Embedding
    from w2v_runtime.stores.pending import PendingFile

#: Where a line's vectors begin; inside a string the quotes would be escaped.
_VECTORS: Final = re.compile(rb', "embeddings?": (?=\[)')


class JsonlStore:
    """Writes each line as its input comes."""

    def __init__(self, pending: PendingFile, layout: Layout) -> None:
        self._layout = layout
        self._ledger = Ledger(layout)
        self._output = TextOutput(pending)

    def write(self, embedding: Embedding) -> None:
        rows = _write_line(self._output.file, self._layout, embedding)
        self._ledger.add(embedding, rows)

    def commit(self) -> None:
        self._output.commit(self._ledger)

    def discard(self) -> None:
        self._output.discard()


def write_lines(file: IO[str], layout: Layout, embeddings: Iterable[Embedding]) -> None:
    """Write embeddings to a text stream, each line sent off as soon as its input is there.

    ``layout.count`` and ``layout.frames`` play no part.

    Raises:
        OSError: the stream's other end is closed, or its disk is full.
        ValueError: an embedding does not have this layout.
    """
    for embedding in embeddings:
        _write_line(file, layout, embedding)
        file.flush()


def read(path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
    """The values of each input."""
    with path.open("rb") as file:
        for head, shape in paired(_heads(file), shapes):
            yield _read_array(file, head, shape)


def described(layout: Layout, embedding: Embedding) -> dict[str, JSON]:
    """All that is known of one input but its vectors."""
    record: dict[str, JSON] = {"file": embedding.path, "start": 0.0, "end": embedding.duration}
    record["duration"] = embedding.duration
    if layout.level == "frame":
        record |= {"step": layout.times.step, "width": layout.times.width, "frames": len(embedding.values)}
    if embedding.logits is not None:
        # Through the decimal, so that a float32 does not come out with the 17 digits of a float64.
        numbers = [float(text) for text in shortest(embedding.logits)]
        record["logits"] = dict(zip(layout.labels, numbers, strict=True))
    if embedding.warnings:
        record["warnings"] = list(embedding.warnings)
    return record


def _write_line(file: IO[str], layout: Layout, embedding: Embedding) -> int:
    rows = layout.rows_of(embedding)
    name, values = ("embeddings", rows) if layout.level == "frame" else ("embedding", rows[0])
    record = json.dumps(described(layout, embedding))
    file.write(f'{record.removesuffix("}")}, "{name}": ')
    _write_array(file, values)
    file.write("}\n")
    return len(rows)


def _write_array(file: IO[str], values: npt.NDArray[np.float32]) -> None:
    """Write nested lists piece by piece: the text of hours of frames would be many times their size."""
    if values.ndim == 1:
        file.write("[" + ", ".join(shortest(values)) + "]")
        return
    for position, part in enumerate(values):
        file.write(", " if position else "[")
        _write_array(file, part)
    file.write("]" if len(values) else "[]")


def _heads(file: IO[bytes]) -> Iterator[bytes]:
    """The first block of each line, while the reader takes the rest of the line from ``file``."""
    while block := file.readline(BLOCK_BYTES):
        yield block


def _read_array(file: IO[bytes], head: bytes, shape: Shape) -> Values:
    """Read nested lists block by block, for the reason that they are written piece by piece."""
    values = np.empty(shape, np.float32)
    flat, filled, lists, rest = values.reshape(-1), 0, 0, b""
    block, ended = _VECTORS.split(head, 1)[1], False
    while block:
        ended = block.endswith(b"\n")
        lists += block.count(b"[")
        *numbers, rest = (rest + block.translate(None, b"[ ]}\n")).split(b",")
        if ended and rest:
            numbers.append(rest)
        flat[filled : filled + len(numbers)] = np.array(numbers, np.float32)
        filled += len(numbers)
        block = b"" if ended else file.readline(BLOCK_BYTES)
    if not ended or filled != flat.size or lists != sum(math.prod(shape[:axis]) for axis in range(len(shape))):
        raise ValueError(f"a line is cut short or does not hold {shape} numbers")
    return values
