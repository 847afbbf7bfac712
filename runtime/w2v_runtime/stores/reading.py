"""What the readers of all formats share: records of inputs, and blocks of rows cut into one array per input."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from w2v_runtime.embedding.results import Segment
from w2v_runtime.stores.base import COLUMNS
from w2v_runtime.stores.names import file_text

if TYPE_CHECKING:
    from pathlib import Path

    from w2v_runtime.stores.base import Metadata
    from w2v_runtime.tables.rows import Value

T = TypeVar("T")
Shape: TypeAlias = tuple[int, ...]
Values: TypeAlias = npt.NDArray[np.float32]
#: A row of a table: file, start and end in seconds, the numbers of the head's columns, the fields of a segment.
Row: TypeAlias = "tuple[str, float, float, Sequence[float], tuple[Value, ...]]"

#: About how many bytes of an output are read at a time; ``w2v-merge`` reads many outputs at once.
BLOCK_BYTES: Final = 2**20


@dataclass(frozen=True)
class Record:
    """One input of a finished output, as the output itself describes it, without its vectors and frame-level logits.

    ``shape`` is that of its values, ``logits_shape`` (T, K) that of its frame-level logits; ``logits`` (K,) are those
    of an utterance-level head. ``duration`` is in seconds. ``segment`` is None for a whole recording.
    """

    path: str
    duration: float
    shape: Shape
    logits: tuple[float, ...] | None
    logits_shape: Shape | None
    warnings: tuple[str, ...]
    segment: Segment | None = None


class Reader(Protocol):
    """The functions with which the module of a format reads an output; what they raise means that it is damaged."""

    def read(self, path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
        """The values of each input, in the output's order: one array for each of ``shapes``."""

    def read_logits(self, path: Path, shapes: Iterable[Shape]) -> Iterator[Values]:
        """The frame-level logits (T, K) of each input, in the output's order: one array for each of ``shapes``."""

    def read_records(self, path: Path) -> Iterator[Record]:
        """The record of each input, in the output's order."""

    def read_metadata(self, path: Path) -> Metadata:
        """The metadata of the output."""


class Recorder:
    """Builds the records of an output from its metadata and from what its format stores for each input."""

    def __init__(self, metadata: Metadata, warnings: Mapping[str, Sequence[str]]) -> None:
        self._vector = vector_shape(metadata)
        self._frames: bool = metadata["level"] == "frame"
        self._labels = len(metadata["labels"])
        self._by_frame = self._labels > 0 and metadata["head_level"] == "frame"
        self._warnings = warnings
        #: Whether the inputs are segments.
        self.segmented = COLUMNS in metadata

    def record(
        self, path: str, duration: float, rows: int, logits: Iterable[float], segment: Segment | None = None
    ) -> Record:
        """The record of an input with ``rows`` rows; ``logits`` are ignored unless the head is utterance-level."""
        name = path if segment is None else f"{path}[{segment.start}:{round(segment.start + duration, 9)}]"
        return Record(
            path,
            float(duration),
            (rows, *self._vector) if self._frames else self._vector,
            tuple(np.array(list(logits), np.float32).tolist()) if self._labels and not self._by_frame else None,
            (rows, self._labels) if self._by_frame else None,
            tuple(self._warnings.get(file_text(name), ()) or self._warnings.get(name, ())),
            segment,
        )

    def by_rows(
        self, rows: Iterable[Row], durations: Sequence[float] = (), segments: Sequence[Sequence[Any]] = ()
    ) -> Iterator[Record]:
        """The records of a table; a row that starts at 0 seconds is the first row of a recording.

        ``durations`` are the inputs' in seconds; an input without one lasts until the end of its last row. ``segments``
        are what ``Ledger.frame_segments`` told.
        """
        if self.segmented:
            yield from self._segments(iter(rows), durations, segments)
            return
        number, count = 0, 0
        last: Row = ("", 0.0, 0.0, (), ())

        def finished() -> Record:
            file, _, end, logits, _ = last
            return self.record(file, durations[number] if number < len(durations) else end, count, logits)

        for row in rows:
            if count and row[1] == 0:
                yield finished()
                number, count = number + 1, 0
            last, count = row, count + 1
        if count:
            yield finished()

    def _segments(
        self, rows: Iterator[Row], durations: Sequence[float], segments: Sequence[Sequence[Any]]
    ) -> Iterator[Record]:
        if not self._frames:
            for file, start, end, logits, fields in rows:
                segment = Segment(start, end, None, fields, start)
                yield self.record(file, round(end - start, 9), 1, logits, segment)
            return
        for (start, first, count), duration in zip(segments, durations, strict=True):
            held = list(itertools.islice(rows, count))
            file, _, _, logits, fields = held[0]
            segment = Segment(start, round(start + duration, 9), None, fields, first)
            yield self.record(file, duration, len(held), logits, segment)


def vector_shape(metadata: Metadata) -> Shape:
    """Shape of one vector: (D,), or (layers, D) for several layers."""
    dim, layers = metadata["dim"], len(metadata["layers"])
    return (dim,) if layers == 1 else (layers, dim)


def block_rows(vector: Shape) -> int:
    """Vectors in a block of about :data:`BLOCK_BYTES`, at least 1."""
    return max(1, BLOCK_BYTES // (4 * int(np.prod(vector))))


def cut(blocks: Iterable[Values], shapes: Iterable[Shape]) -> Iterator[Values]:
    """Cut a stream of blocks (rows, *vector) into one array for each of ``shapes``.

    Raises:
        ValueError: a shape is not made of whole vectors, or the blocks hold more or fewer rows than the shapes.
    """
    filled_blocks = (block for block in blocks if len(block))
    block = np.empty(0, np.float32)
    vector: Shape = ()
    for shape in shapes:
        try:
            values = np.empty(shape, np.float32)
        except (MemoryError, ValueError):
            raise ValueError(f"an input of {shape} does not fit into memory") from None
        flat, filled = values.reshape(-1), 0
        while filled < flat.size:
            if not block.size:
                rows = next(filled_blocks, None)
                if rows is None:
                    raise ValueError("it holds fewer rows")
                vector, block = rows.shape[1:], rows.reshape(-1)
            if shape not in (vector, (shape[0], *vector)):
                raise ValueError(f"it holds vectors {vector}, which do not make up {shape}")
            taken = min(flat.size - filled, block.size)
            flat[filled : filled + taken] = block[:taken]
            block = block[taken:]
            filled += taken
        yield values
    if block.size or next(filled_blocks, None) is not None:
        raise ValueError("it holds more rows")


def paired(items: Iterable[T], shapes: Iterable[Shape]) -> Iterator[tuple[T, Shape]]:
    """Pair each input's item in an output with the input's shape.

    Raises:
        ValueError: there are more or fewer items than shapes.
    """
    for item, shape in itertools.zip_longest(items, shapes):
        if item is None or shape is None:
            raise ValueError("it holds fewer inputs" if item is None else "it holds more inputs")
        yield item, shape


def check_array(dtype: np.dtype[np.generic], shape: Shape, expected: Shape) -> None:
    """Raise ValueError unless an array is float32 or float16, of the expected shape."""
    if dtype not in (np.dtype("<f4"), np.dtype("<f2")) or shape != expected:
        raise ValueError(f"it holds {dtype} {shape} where float32 or float16 {expected} was written")
