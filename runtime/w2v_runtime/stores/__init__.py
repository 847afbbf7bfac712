"""Where embeddings go: one small module a format, behind one protocol, chosen by the output's suffix."""

from w2v_runtime.stores.base import EmbeddingStore, Layout
from w2v_runtime.stores.formats import (
    OutputFormat,
    check_output,
    open_store,
    output_format,
    read_logits,
    read_metadata,
    read_values,
)
from w2v_runtime.stores.jsonl import write_lines

__all__ = [
    "EmbeddingStore",
    "Layout",
    "OutputFormat",
    "check_output",
    "open_store",
    "output_format",
    "read_logits",
    "read_metadata",
    "read_values",
    "write_lines",
]
