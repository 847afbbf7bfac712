"""What the text formats share: exact decimals, and a text file with its metadata beside it."""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from w2v_models.errors import OutputError
from w2v_runtime.files.durable import sync_file
from w2v_runtime.stores.pending import PendingFile, check_file, is_metadata

try:
    import orjson

    _dumps: Callable[[Any], bytes] | None = partial(orjson.dumps, option=orjson.OPT_SERIALIZE_NUMPY)
except ImportError:
    _dumps = None

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy.typing as npt

    from w2v_runtime.stores.base import JSON, Ledger, Metadata

#: The keys in the metadata that say which text they belong to, and which other files do.
_TEXT: Final = "text"
_PARTS: Final = "parts"
_TAIL_BYTES: Final = 2**16
#: Between these magnitudes numpy writes numbers without an exponent, as orjson does.
_SMALLEST, _LARGEST = np.float32(1e-4), np.float32(1e6)
#: The one magnitude of all float32 whose shortest decimal gives its neighbour when it is rounded to a double first, as
#: most readers do.
_ROUNDED_TWICE: Final = np.uint32(0x15AE43FD).view(np.float32)


def shortest(values: npt.NDArray[np.float32]) -> Iterator[str]:
    """Each value of (n,) in the fewest digits that give the same float32 again, directly and through a double."""
    if (np.abs(values) == _ROUNDED_TWICE).any():
        return (str(float(value) if abs(value) == _ROUNDED_TWICE else value) for value in values)
    return map(str, values)


def joined(values: npt.NDArray[np.float32], separator: str) -> str:
    """The numbers of (n,), as :func:`shortest` writes them, with ``separator`` between them.

    orjson (the extra ``text``) takes a tenth of the time. Its text differs only in how exponents look, so numbers with
    an exponent are always written by :func:`shortest`.
    """
    if _dumps is None or values.dtype != np.float32:
        return separator.join(shortest(values))
    magnitudes = np.abs(values)
    exponents = np.flatnonzero((magnitudes < _SMALLEST) & (magnitudes != 0) | (magnitudes >= _LARGEST))
    words, begin = [], 0
    for position, word in zip(exponents.tolist(), shortest(values[exponents]), strict=True):
        words += [*_plain(values[begin:position], separator), word]
        begin = position + 1
    return separator.join([*words, *_plain(values[begin:], separator)])


def _plain(values: npt.NDArray[np.float32], separator: str) -> list[str]:
    """The text of numbers without exponents, as a list of one string; an empty list if there are no numbers."""
    if not len(values) or _dumps is None:
        return []
    return [_dumps(np.ascontiguousarray(values))[1:-1].decode("ascii").replace(",", separator)]


def read_metadata(path: Path, parts: Mapping[str, Path] = MappingProxyType({})) -> Metadata:
    """The metadata of a text output, from the file beside it; ``parts`` are its other files.

    Raises:
        ValueError: that file is damaged.
        OutputError: it belongs to another text, as after a kill between the renames of the two.
    """
    metadata: Metadata = json.loads(_sidecar(path).read_bytes())
    described = {parts[name]: told for name, told in metadata.pop(_PARTS, {}).items()}
    for file, told in {path: metadata.pop(_TEXT, None), **described}.items():
        if told not in (None, _described(file)):
            raise OutputError(
                f"{file} is not the file that {_sidecar(path).name} describes: it was cut or changed, or a kill came "
                "while both were replaced. Bring it back, or write it again with --overwrite."
            )
    return metadata


def _described(path: Path) -> dict[str, int]:
    """The size of a file in bytes and the CRC-32 of its end, which tell it from the one that it replaced."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        return {"bytes": size, "tail_crc32": zlib.crc32(file.read())}


def check_metadata_file(output: Path) -> None:
    """Refuse a text output if the file in the place of its metadata is not the metadata of an earlier output.

    Raises:
        OutputError: there is such a file, or it cannot be written.
    """
    path = _sidecar(output)
    check_file(path, overwrite=True)
    if path.exists() and not is_metadata(path.read_bytes()):
        raise OutputError(
            f"{path} is not the metadata of an earlier output, so it is not replaced; move it away, or name another "
            "--output."
        )


def check_parts(output: Path, parts: Mapping[str, Path]) -> None:
    """Refuse a text output if a file in the place of one of its ``parts`` is not that of an earlier output.

    Raises:
        OutputError: there is such a file, or it cannot be written.
    """
    told: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        if isinstance(metadata := json.loads(_sidecar(output).read_bytes()), dict):
            told = metadata.get(_PARTS) or {}
    for name, part in parts.items():
        check_file(part, overwrite=True)
        if part.exists() and told.get(name) != _described(part):
            raise OutputError(
                f"{part} is not part of an earlier output, so it is not replaced; move it away, or name another "
                "--output."
            )


def _sidecar(path: Path) -> Path:
    return Path(f"{path}.metadata.json")


class TextOutput:
    """A UTF-8 text file ``OUT`` and ``OUT.metadata.json``; paths that are not UTF-8 keep their bytes.

    The metadata have a file of their own so that ``OUT`` holds nothing but rows. It is replaced just before ``OUT``,
    and tells which text it belongs to, so that a kill in between does not give old rows new metadata.
    """

    def __init__(self, pending: PendingFile) -> None:
        self._pending = pending
        check_metadata_file(pending.path)
        self._sidecar = PendingFile(_sidecar(pending.path), overwrite=True)
        self.file = io.TextIOWrapper(pending.create(), encoding="utf-8", errors="surrogateescape", newline="")

    def commit(
        self,
        ledger: Ledger,
        parts: Mapping[str, PendingFile] = MappingProxyType({}),
        earlier: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        """Finish both files; the metadata get their name first, so that ``OUT`` never stands without them.

        ``parts`` are closed files that belong to the text, ``earlier`` the places of such files of an earlier output.
        What is there is removed before the first gets its name: no file ever stands with another output's text.
        """
        ledger.check_complete()
        self.file.close()
        described: dict[str, JSON] = {_TEXT: dict(_described(self._pending.temporary))}
        if parts:
            described[_PARTS] = {name: dict(_described(part.temporary)) for name, part in parts.items()}
        with self._sidecar.create() as file:
            late = {"durations": ledger.frame_durations, "segments": ledger.frame_segments}
            told = {name: values for name, values in late.items() if values}
            file.write(json.dumps(ledger.metadata() | told | described).encode("ascii") + b"\n")
        if parts:
            for part in parts.values():
                sync_file(part.temporary)
            self._pending.check()
            check_parts(self._pending.path, earlier)
            for place in (self._pending.path, *earlier.values()):
                place.unlink(missing_ok=True)
        self._sidecar.commit()
        for part in parts.values():
            part.commit()
        self._pending.commit()

    def discard(self) -> None:
        """Remove both temporary files."""
        self._pending.discard(self.file)
        self._sidecar.discard()
