"""Embeddings as pandas tables (extra ``pandas``): of a table's own rows, of results, and of any output.

>>> import pandas as pd
>>> from w2v_runtime.integrations.pandas import embed_table
>>> turns = pd.DataFrame({"file": ["speech.wav"] * 2, "start": [0.0, 1.0], "end": [1.0, 2.0], "label": ["a", "b"]})
>>> embed_table(turns, "facebook/wav2vec2-base-960h").shape
(2, 768)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from w2v_models.bundle import Bundle
from w2v_models.errors import OutputError, RefusedError
from w2v_runtime.embedder import Embedder
from w2v_runtime.embedding.inputs import Context
from w2v_runtime.embedding.results import Embedding, Failure, Request
from w2v_runtime.stores import columns_of, output_format, read_logits, read_metadata, read_records, read_values
from w2v_runtime.stores.csv import vector_columns
from w2v_runtime.stores.names import file_text, plain
from w2v_runtime.stores.tree import told_apart

_INDEX: Final = ["file", "start", "end"]
_NAMED: Final = 3


def embed_table(
    table: pd.DataFrame | pd.Series[Any] | pd.Index[Any],
    model: Embedder | str | os.PathLike[str] | Bundle | None = None,
    pooling: str | Sequence[str] = "mean",
    layer: str | int | Sequence[str | int] = "last",
    context: Context = 0.0,
    root: str | os.PathLike[str] = "",
    **options: Any,
) -> pd.DataFrame:
    """Embed the files or segments of a table, and return a table with the same index.

    Args:
        table: an index of files, an index ``file, start, end`` as audformat has it (timedeltas or seconds; a missing
            end is the end of the file), a table or series with such an index, or a table with these columns.
        model: an opened :class:`Embedder`, or what it opens.
        pooling: as for :meth:`Embedder.embed`.
        layer: as for :meth:`Embedder.embed`.
        context: what the model hears around a segment, as for :meth:`Embedder.embed_segments`.
        root: the folder that relative files are in.
        options: the fields of :class:`~w2v_runtime.embedding.corpus.CorpusOptions`.

    Returns:
        The head's columns and ``f0`` … ``f{D-1}``, float32; of several layers ``l9_f0`` …. A row that could not be
        embedded is NaN, is warned of, and stands in ``attrs["failures"]`` as (position, reason).

    Raises:
        RefusedError: the table has neither files nor segments, or an option is out of bounds.
    """
    embedder = model if isinstance(model, Embedder) else Embedder(model)
    request = embedder.resolve(Request.of("utterance", pooling, layer))
    files, starts, ends = _segments_of(table)
    paths = [os.path.join(root, file) for file in files]
    if starts is None or ends is None:
        results = embedder.embed_files(paths, pooling=pooling, layer=layer, **options)
    else:
        results = embedder.embed_segments(paths, starts, ends, pooling=pooling, layer=layer, context=context, **options)
    index = table if isinstance(table, pd.Index) else table.index
    head = embedder.head(request)
    return _frame(results, index, request.layers, embedder.dimension(request), head.labels if head else ())


def to_frame(
    results: Iterable[Embedding | Failure], layers: Sequence[str | int] = (), labels: Sequence[str] = ()
) -> pd.DataFrame:
    """A table of results of whole recordings or segments: index ``file, start, end``, columns as :func:`embed_table`.

    Args:
        results: what ``embed_files`` or ``embed_segments`` yield at utterance level; failures are left out, warned of.
        layers: the names of several layers, in their order.
        labels: the names of the head's columns, ``embedder.labels``; left out, they are ``logit0`` ….

    Raises:
        RefusedError: the results are frames, which have no times of their own: write them with ``w2v-embed``.
    """
    made = list(results)
    kept = [result for result in made if isinstance(result, Embedding)]
    axes = 2 if len(layers) > 1 else 1
    if any(result.values.ndim != axes for result in kept):
        raise RefusedError("these are frames, or several layers without their names: give layers, or read() an output.")
    _warn([(i, result.reason) for i, result in enumerate(made) if isinstance(result, Failure)])
    dim = kept[0].values.shape[-1] if kept else 0
    columns = 0 if not kept or kept[0].logits is None else len(kept[0].logits)
    names = tuple(labels) or tuple(f"logit{i}" for i in range(columns))
    index = _times([result.path for result in kept], [r.start for r in kept], [r.end for r in kept])
    return _frame(kept, index, tuple(map(str, layers)) or ("",), dim, names)


def read(output: str | os.PathLike[str]) -> pd.DataFrame:
    """Read any output of ``w2v-embed``: index ``file, start, end``, the table's columns, the head's, and the vectors.

    At frame level a row is a frame. ``attrs`` holds the metadata. Names that are not UTF-8 are escaped, as in the
    output: :func:`w2v_runtime.stores.names.path_of` turns them back.

    Raises:
        OutputError: it is missing, damaged, or no output.
        OSError: it cannot be read.
    """
    path, kind = Path(output), output_format(os.fspath(output))
    if not path.exists():
        raise OutputError(f"{path} does not exist; name an output of w2v-embed.")
    metadata, records = read_metadata(path, kind), list(read_records(path, kind))
    layers, dim, labels = tuple(metadata["layers"]), int(metadata["dim"]), tuple(metadata["labels"])
    frames = metadata["level"] == "frame"
    counts = [record.shape[0] if frames else 1 for record in records]
    width = dim * len(layers)
    vectors = np.empty((sum(counts), width), np.float32)
    offsets = np.cumsum([0, *counts])
    for i, values in enumerate(read_values(path, kind, [record.shape for record in records])):
        vectors[offsets[i] : offsets[i + 1]] = values.reshape(-1, width)
    logits = np.empty((len(vectors), len(labels)), np.float32)
    if labels and metadata["head_level"] == "frame":
        for i, columns in enumerate(read_logits(path, kind, [record.logits_shape or () for record in records])):
            logits[offsets[i] : offsets[i + 1]] = columns
    elif labels:
        logits[:] = np.repeat(np.array([record.logits for record in records], np.float32), counts, axis=0)
    starts = np.array([0.0 if record.segment is None else record.segment.start for record in records])
    ends = np.round(starts + [record.duration for record in records], 9)
    if frames:
        firsts = [0.0 if record.segment is None else record.segment.first for record in records]
        within = np.concatenate([np.arange(count) for count in counts]) if counts else np.empty(0)
        starts = np.round(np.repeat(firsts, counts) + within * metadata["frame_step_seconds"], 9)
        ends = np.round(starts + metadata["frame_width_seconds"], 9)
    index = _times(np.repeat(np.array([record.path for record in records], object), counts), starts, ends)
    names = vector_columns(layers, dim)
    told = columns_of(metadata)
    fields = told_apart([plain(column.name) for column in told], (*_INDEX, *labels, *names))
    frame = pd.DataFrame(np.hstack([logits, vectors]), index, [*told_apart(labels, (*_INDEX, *names)), *names])
    for place, name in enumerate(fields):
        values_of = [None if record.segment is None else record.segment.fields[place] for record in records]
        frame.insert(place, name, np.repeat(np.array(values_of, object), counts))
    frame = frame.astype({name: _DTYPES[column.kind] for name, column in zip(fields, told, strict=True)})
    frame.attrs = metadata
    return frame


_DTYPES: Final = {"str": "str", "int": "Int64", "float": "float64", "bool": "boolean"}


def _segments_of(table: Any) -> tuple[list[str], list[float] | None, list[float | None] | None]:
    """The files of a table, and the starts and ends in seconds of its segments."""
    if isinstance(table, pd.DataFrame) and "file" in table.columns:
        source = {name: table[name] for name in _INDEX if name in table.columns}
    else:
        index = table if isinstance(table, pd.Index) else table.index
        if isinstance(index, pd.MultiIndex):
            source = {str(name): index.get_level_values(name) for name in index.names if name in _INDEX}
        else:
            source = {"file": index} if index.name in ("file", None) and index.dtype.kind not in "iufmM" else {}
    if "file" not in source or ("start" in source) != ("end" in source):
        raise RefusedError(
            "the table has neither files nor segments: its index or columns are file, or file, start, end."
        )
    files = [os.fspath(file) for file in source["file"]]
    if "start" not in source:
        return files, None, None
    starts, ends = (_seconds(source[name]) for name in ("start", "end"))
    if missing := [row for row, start in enumerate(starts) if np.isnan(start)]:
        raise RefusedError(
            f"row {missing[0]} of the table has no start; write 0 where it is the beginning of its file."
        )
    return (
        files,
        starts,
        [None if np.isnan(end) else end for end in ends],
    )


def _seconds(values: Any) -> list[float]:
    """Times in seconds: timedeltas, numbers, or the text of timedeltas."""
    array = pd.Series(values).reset_index(drop=True)
    if array.dtype.kind not in "iuf":
        array = pd.to_timedelta(array).dt.total_seconds()
    return list(map(float, array))


def _times(files: Any, starts: Any, ends: Any) -> pd.MultiIndex:
    levels = [
        [file_text(file) for file in files],
        *(pd.to_timedelta(np.asarray(times, float), unit="s") for times in (starts, ends)),
    ]
    return pd.MultiIndex.from_arrays(levels, names=_INDEX)


def _frame(
    results: Iterable[Embedding | Failure], index: Any, layers: tuple[str, ...], dim: int, labels: Sequence[str]
) -> pd.DataFrame:
    names = vector_columns(layers, dim)
    rows = np.full((len(index), len(labels) + len(names)), np.nan, np.float32)
    failures = []
    for i, result in enumerate(results):
        if isinstance(result, Failure):
            failures.append((i, result.reason))
            continue
        if result.logits is not None:
            rows[i, : len(labels)] = result.logits
        rows[i, len(labels) :] = result.values.ravel()
    frame = pd.DataFrame(rows, index, [*told_apart(labels, names), *names])
    if failures:
        frame.attrs["failures"] = failures
        _warn(failures)
    return frame


def _warn(failures: Sequence[tuple[int, str]]) -> None:
    if failures:
        told = "; ".join(f"row {i}: {reason}" for i, reason in failures[:_NAMED])
        more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
        warnings.warn(f"{len(failures)} could not be embedded: {told}{more}", stacklevel=3)
