"""``.parquet``: columns ``file``, ``start``, ``end`` and any others, read by pyarrow (the extra ``parquet``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from w2v_models.errors import RefusedError
from w2v_runtime.tables.delimited import check_columns, row_of
from w2v_runtime.tables.rows import Row

_ROWS: Final = 16_384


def read(path: str) -> Iterator[Row]:
    """The rows of a table, batch by batch; columns of lists and other nested kinds are left out.

    Raises:
        RefusedError: pyarrow is not installed, the file is no Parquet, a column is missing, or a time is none.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise RefusedError("it needs pyarrow, which is not installed: pip install 'w2v-onnx[parquet]'") from None
    try:
        with pq.ParquetFile(path) as table:
            kinds = {field.name: field.type for field in table.schema_arrow}
            check_columns(list(table.schema_arrow.names))
            header = [name for name, kind in kinds.items() if not pa.types.is_nested(kind)]
            places = check_columns(header)
            number = 0
            for batch in table.iter_batches(_ROWS, columns=header):
                columns = [_values(batch.column(name)) for name in header]
                for fields in zip(*columns, strict=True):
                    number += 1
                    yield row_of(number, "row", fields, places)
    except pa.ArrowException as error:
        raise RefusedError(f"it cannot be read as Parquet ({error!s:.160}).") from None


def _values(column) -> list:  # type: ignore[no-untyped-def,type-arg]
    """A column as Python values: durations as seconds, categories and dates as text."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_duration(kind):
        return [
            None if value is None else value / 1e9
            for value in column.cast(pa.duration("ns")).cast(pa.int64()).to_pylist()
        ]
    plain = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    values: list = column.to_pylist()  # type: ignore[type-arg]
    if plain or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values
    return [None if value is None else str(value) for value in values]
