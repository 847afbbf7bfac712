"""Tables of segments, as other tools write them: each row a recording, a start, an end and what else the table says.

Imports audio (formats) and :mod:`w2v_models`; pyarrow and praatio are imported in the one reader that needs them.
"""

from w2v_runtime.tables.rows import Column, Row
from w2v_runtime.tables.table import Table

__all__ = ["Column", "Row", "Table"]
