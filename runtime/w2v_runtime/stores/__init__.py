"""Stores write embeddings to an output and read them back: one module per format, chosen by the output's suffix.

To add a store, write ``stores/FORMAT.py`` with a class that follows :class:`~w2v_runtime.stores.base.EmbeddingStore`
and the functions of :class:`~w2v_runtime.stores.reading.Reader`, and name it in :mod:`w2v_runtime.stores.formats`.

May import embedding (results), files and the rooms below them.
"""

from w2v_runtime.stores.base import COLUMNS, DTYPES, DType, EmbeddingStore, Layout, columns_of
from w2v_runtime.stores.formats import (
    OutputFormat,
    check_place,
    companions,
    open_store,
    output_format,
    parts,
    read_logits,
    read_metadata,
    read_records,
    read_values,
)
from w2v_runtime.stores.jsonl import write_lines
from w2v_runtime.stores.reading import Record

__all__ = [
    "COLUMNS",
    "DTYPES",
    "DType",
    "EmbeddingStore",
    "Layout",
    "OutputFormat",
    "Record",
    "check_place",
    "columns_of",
    "companions",
    "open_store",
    "output_format",
    "parts",
    "read_logits",
    "read_metadata",
    "read_records",
    "read_values",
    "write_lines",
]
