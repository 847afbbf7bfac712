"""What every store shares: the layout of an output, the protocol of a store, each input's data beside its vectors."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from w2v_runtime.stores.names import file_text, plain
from w2v_runtime.stores.tree import told_apart
from w2v_runtime.tables.rows import Column

if TYPE_CHECKING:
    from collections.abc import Iterable

    from w2v_runtime.embedding.results import Embedding, FrameTimes, Level
    from w2v_runtime.tables.rows import Value

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
#: What vectors are stored in: float16 takes half the room, at a relative error of up to 2^-11.
DType = Literal["float32", "float16"]
DTYPES: Final[tuple[DType, ...]] = get_args(DType)
_NUMPY: Final = {"float32": "<f4", "float16": "<f2"}
#: The key of the metadata that describes the columns of the table whose segments an output holds.
COLUMNS: Final = "columns"
#: An output's metadata as read back, before anything in it is checked.
Metadata: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True)
class Layout:
    """The shape of a whole output, known before its first row is written.

    ``count`` is N, the inputs that were embedded; ``frames`` is ΣT over them, 0 at utterance level; ``dim`` is D.
    More than one entry of ``layers`` gives the vectors a layers axis. ``labels`` names the K columns of a head, and is
    empty without one; with ``head_level`` ``frame``, each frame has K logits of its own. ``metadata`` describes the run
    and is stored with the results. ``columns`` are those of the table whose segments the inputs are; None of whole
    recordings. ``dtype`` is that of the vectors; logits are float32.
    """

    count: int
    frames: int
    dim: int
    layers: tuple[str, ...]
    level: Level
    labels: tuple[str, ...]
    times: FrameTimes
    metadata: dict[str, JSON]
    head_level: Level = "utterance"
    columns: tuple[Column, ...] | None = None
    dtype: DType = "float32"

    @property
    def logits_by_frame(self) -> bool:
        """Whether logits are (T, K) for each input; else they are (K,), or there are none."""
        return bool(self.labels) and self.head_level == "frame"

    @property
    def vector(self) -> tuple[int, ...]:
        """Shape of one vector: (D,), or (layers, D) for several layers."""
        return (self.dim,) if len(self.layers) == 1 else (len(self.layers), self.dim)

    @property
    def rows(self) -> int:
        """Vectors in the whole output: N, or ΣT at frame level."""
        return self.frames if self.level == "frame" else self.count

    @property
    def numpy_dtype(self) -> str:
        """``dtype`` as numpy names it, little-endian."""
        return _NUMPY[self.dtype]

    def rows_of(self, embedding: Embedding) -> npt.NDArray[Any]:
        """The vectors of one input, little-endian and contiguous: (1, *vector), or (T, *vector) at frame level.

        Raises:
            ValueError: the embedding does not have this layout.
        """
        values: npt.NDArray[Any] = np.ascontiguousarray(embedding.values, dtype=self.numpy_dtype)
        rows = values if self.level == "frame" else values[np.newaxis]
        if rows.ndim != 1 + len(self.vector) or rows.shape[1:] != self.vector:
            raise ValueError(f"{embedding.path}: values {values.shape} do not fit vectors of {self.vector}")
        logits = (0,) if embedding.logits is None else embedding.logits.shape
        if logits != ((len(rows),) if self.logits_by_frame else ()) + (len(self.labels),):
            raise ValueError(f"{embedding.path}: logits {logits} do not fit the labels {self.labels}")
        return rows

    def logits_of(self, embedding: Embedding) -> npt.NDArray[np.float32]:
        """The logits that belong to each row of one input: (rows, K); those of an utterance-level head are repeated."""
        rows = len(embedding.values) if self.level == "frame" else 1
        logits = np.empty(0) if embedding.logits is None else embedding.logits
        return np.broadcast_to(np.ascontiguousarray(logits, dtype="<f4"), (rows, len(self.labels)))

    def times_of(self, embedding: Embedding) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Start and end of each row of one input in seconds: (rows,) and (rows,); an utterance is one row."""
        if self.level == "utterance":
            return np.array([embedding.start]), np.array([embedding.end])
        frames = len(embedding.values)
        starts, ends = self.times.starts(frames), self.times.ends(frames)
        if embedding.segment is None:
            return starts, ends
        return np.round(starts + embedding.segment.first, 9), np.round(ends + embedding.segment.first, 9)

    def fields_of(self, embedding: Embedding) -> tuple[Value, ...]:
        """What the table says of a segment, in the order and of the kinds of ``columns``.

        Raises:
            ValueError: it says more or less.
        """
        fields = () if embedding.segment is None else embedding.segment.fields
        columns = self.columns or ()
        if len(fields) != len(columns):
            raise ValueError(f"{embedding.path}: {len(fields)} fields do not fit {len(columns)} columns")
        typed = (column.typed(field) for column, field in zip(columns, fields, strict=True))
        return tuple(plain(value) if isinstance(value, str) else value for value in typed)

    def column_names(self, taken: Iterable[str]) -> list[str]:
        """Names of ``columns`` in an output; one that is ``taken`` there gets ``~2``."""
        return told_apart((plain(column.name) for column in self.columns or ()), taken)


def columns_of(metadata: Metadata) -> tuple[Column, ...]:
    """The columns of the table whose segments an output holds; none of whole recordings."""
    return tuple(Column(**column) for column in metadata.get(COLUMNS, ()))


class EmbeddingStore(Protocol):
    """An output that is being written: every input once, in order; it gets its final name at :meth:`commit`."""

    def write(self, embedding: Embedding) -> None:
        """Add one input.

        Raises:
            OSError: the disk is full or fails; call :meth:`discard`.
            ValueError: the embedding does not have the layout the store was opened with.
        """

    def commit(self) -> None:
        """Finish the output, make it durable and give it its final name.

        Raises:
            OutputError: another output took the name meanwhile.
            OSError: the disk is full or fails; call :meth:`discard`.
            ValueError: fewer or more inputs were written than the layout announced.
        """

    def discard(self) -> None:
        """Remove what was written, after any failure and in any state; after a commit this does nothing."""


class Ledger:
    """Path, times, logits, row offsets and warnings of each input written so far: a few bytes, never its vectors.

    ``durations`` (N,) are in seconds; ``logits`` (N·K,) are empty for a frame-level head; ``offsets`` (N+1,) count
    rows, so that input i has the rows ``offsets[i]:offsets[i + 1]``; ``warnings`` are by name, of inputs that have any.
    ``starts`` and ``firsts`` (N,) are those of segments and of their first frames. ``names`` are the paths, and of
    segments their times, too.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.paths: list[str] = []
        self.names: list[str] = []
        self.durations, self.starts, self.firsts = array("d"), array("d"), array("d")
        self.logits = array("f")
        self.offsets = array("q", [0])
        self.warnings: dict[str, JSON] = {}

    def add(self, embedding: Embedding, rows: int) -> None:
        """Add an input that was written as ``rows`` rows."""
        self.paths.append(embedding.path)
        self.durations.append(embedding.duration)
        if embedding.segment is None:
            self.names.append(embedding.path)
        else:
            self.starts.append(embedding.start)
            self.firsts.append(embedding.segment.first)
            self.names.append(f"{embedding.path}.{embedding.start}-{embedding.end}")
        if embedding.logits is not None and not self._layout.logits_by_frame:
            self.logits.extend(embedding.logits.tolist())
        self.offsets.append(self.offsets[-1] + rows)
        if embedding.warnings:
            self.warnings[file_text(embedding.name)] = list(embedding.warnings)

    def check_complete(self) -> None:
        """Raise ValueError unless exactly the announced inputs and rows were written."""
        written, announced = (len(self.paths), self.offsets[-1]), (self._layout.count, self._layout.rows)
        if written != announced:
            raise ValueError(f"(inputs, rows) written are {written} where {announced} were announced")

    def metadata(self) -> dict[str, JSON]:
        """The layout's metadata, the shape of the vectors, the times of frames, and the inputs' warnings."""
        metadata: dict[str, JSON] = {"layers": list(self._layout.layers), "dim": self._layout.dim}
        if self._layout.level == "frame":
            metadata |= {"frame_step_seconds": self._layout.times.step, "frame_width_seconds": self._layout.times.width}
        metadata |= self._layout.metadata
        return metadata | ({"warnings": self.warnings} if self.warnings else {})

    @property
    def ends(self) -> npt.NDArray[np.float64]:
        """The ends of segments in their recordings, in seconds: (N,)."""
        ends: npt.NDArray[np.float64] = np.round(np.asarray(self.starts) + np.asarray(self.durations), 9)
        return ends

    @property
    def frame_segments(self) -> list[JSON]:
        """Start, start of the first frame, and rows of each segment at frame level; else empty."""
        if self._layout.level != "frame" or self._layout.columns is None:
            return []
        rows = np.diff(np.asarray(self.offsets)).tolist()
        return [list(told) for told in zip(self.starts, self.firsts, rows, strict=True)]

    @property
    def frame_durations(self) -> list[JSON]:
        """The inputs' durations in seconds at frame level, where a table's rows end before the input; else empty."""
        return list(self.durations) if self._layout.level == "frame" else []

    def metadata_text(self) -> str:
        """The metadata as JSON, in ASCII so that paths of any bytes survive every format."""
        return json.dumps(self.metadata())
