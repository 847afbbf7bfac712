"""What the text formats share: exact decimals, and a text file with its metadata beside it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from w2v_runtime.stores.pending import PendingFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from w2v_runtime.stores.base import Ledger, Metadata

#: The one magnitude of all float32 whose shortest decimal gives its neighbour when it is rounded to a double first, as
#: most readers do.
_ROUNDED_TWICE: Final = np.uint32(0x15AE43FD).view(np.float32)


def shortest(values: npt.NDArray[np.float32]) -> Iterator[str]:
    """Each value of (n,) in the fewest digits that give the same float32 again, directly and through a double."""
    if (np.abs(values) == _ROUNDED_TWICE).any():
        return (str(float(value) if abs(value) == _ROUNDED_TWICE else value) for value in values)
    return map(str, values)


def read_metadata(path: Path) -> Metadata:
    """What a text output says of itself, from the file beside it."""
    metadata: Metadata = json.loads(_sidecar(path).read_bytes())
    return metadata


def _sidecar(path: Path) -> Path:
    return Path(f"{path}.metadata.json")


class TextOutput:
    """A UTF-8 text file ``OUT`` and ``OUT.metadata.json``; names that are not UTF-8 keep their bytes.

    The metadata have a file of their own so that ``OUT`` holds nothing but rows. It is replaced together with ``OUT``.
    """

    def __init__(self, pending: PendingFile) -> None:
        self._pending = pending
        self._sidecar = PendingFile(_sidecar(pending.path), overwrite=True)
        self.file = io.TextIOWrapper(pending.create(), encoding="utf-8", errors="surrogateescape", newline="")

    def commit(self, ledger: Ledger) -> None:
        """Finish both files; the metadata get their name first, so that ``OUT`` never stands without them."""
        ledger.check_complete()
        self.file.close()
        with self._sidecar.create() as file:
            file.write(ledger.metadata_text().encode() + b"\n")
        self._sidecar.commit()
        self._pending.commit()

    def discard(self) -> None:
        """Remove both temporary files."""
        self._pending.discard(self.file)
        self._sidecar.discard()
