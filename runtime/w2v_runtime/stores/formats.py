"""Chooses the store of an output by its suffix, and opens it for writing or reading.

A new store is named here: in :data:`OutputFormat` and :data:`SUFFIXES`, in the functions that open it for writing and
for reading, and with the package that it needs, if any.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, cast

from w2v_models.errors import OutputError
from w2v_runtime.files.outputs import METADATA_SUFFIX, beside
from w2v_runtime.stores import csv, jsonl, npy, npz
from w2v_runtime.stores.csv import CsvStore
from w2v_runtime.stores.jsonl import JsonlStore
from w2v_runtime.stores.npy import NpyStore
from w2v_runtime.stores.npz import NpzStore
from w2v_runtime.stores.pending import PendingFile, PendingFolder, check_file, check_folder
from w2v_runtime.stores.text import check_metadata_file, check_parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from w2v_runtime.stores.base import EmbeddingStore, Layout, Metadata
    from w2v_runtime.stores.reading import Reader, Record, Shape, Values

OutputFormat = Literal["npz", "csv", "jsonl", "parquet", "h5", "scp", "npy", "stdout"]

STDOUT: Final = "-"
#: Formats whose metadata stand in a file of their own beside the output.
TEXT_FORMATS: Final = ("csv", "jsonl", "scp")
SUFFIXES: Final = (".npz", ".csv", ".jsonl", ".parquet", ".h5", ".scp")
#: The package that a format needs beyond the base install, and the extra that brings it.
_EXTRAS: Final = {"parquet": ("pyarrow", "parquet"), "h5": ("h5py", "hdf5"), "scp": ("kaldiio", "kaldi")}


def output_format(output: str) -> OutputFormat:
    """The format of an output as the user typed it: ``-``, a folder (it exists, or ends in a separator), or a suffix.

    Raises:
        OutputError: the suffix is unknown, or the format's package is not installed.
    """
    if output == STDOUT:
        return "stdout"
    if output.endswith(tuple(filter(None, (os.sep, os.altsep)))) or Path(output).is_dir():
        return "npy"
    suffix = Path(output).suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(
            f"{output} has no known format; end it in {', '.join(SUFFIXES)}, in / for a folder of .npy, "
            f"or give - for JSON lines on standard output."
        )
    _check_installed(suffix[1:], output)
    return cast("OutputFormat", suffix[1:])


def check_place(path: Path, kind: str | None = None, overwrite: bool = False) -> None:
    """Refuse an output that :func:`open_store` would refuse, before any work is done for it.

    Raises:
        OutputError: it exists and may not be overwritten, its folder is missing or not writable, its format is
            unknown, or another file is in the place of its metadata.
    """
    path = Path(os.path.realpath(path))
    kind = kind or output_format(str(path))
    (check_folder if kind == "npy" else check_file)(path, overwrite)
    if kind == "scp" and "\n" in str(path):
        raise OutputError(f"{str(path)!r} has a line break, which no line of a script file can name; name another.")
    if kind in TEXT_FORMATS:
        check_metadata_file(path)
        check_parts(path, parts(path, kind))


def parts(path: Path, kind: str) -> dict[str, Path]:
    """The files beside an output that hold some of its results, by what messages call them."""
    if kind != "scp":
        return {}
    from w2v_runtime.stores import kaldi

    return kaldi.parts(Path(os.path.realpath(path)))


def companions(path: Path, kind: str) -> dict[str, Path]:
    """The files beside an output that belong to it, its metadata and its parts, by what messages call them."""
    metadata = {"metadata": beside(path, METADATA_SUFFIX)} if kind in TEXT_FORMATS else {}
    return metadata | parts(path, kind)


def open_store(path: Path, layout: Layout, kind: str | None = None, overwrite: bool = False) -> EmbeddingStore:
    """Begin an output; ``kind`` is what :func:`output_format` said, and is needed for a folder that does not exist yet.

    Raises:
        OutputError: ``path`` exists and may not be overwritten, cannot be written, or has no known format.
        OSError: the disk is full or fails; nothing is left behind.
    """
    kind = kind or output_format(str(path))
    if kind == "npy":
        folder = PendingFolder(path, overwrite)
        try:
            return NpyStore(folder, layout)
        except BaseException:
            folder.discard()
            raise
    pending = PendingFile(path, overwrite)
    try:
        return _file_store(kind, pending, layout)
    except BaseException:
        pending.discard()
        raise


def read_values(path: Path, kind: OutputFormat, shapes: Iterable[Shape]) -> Iterator[Values]:
    """Read a committed output back: the float32 values of each input as they were written, in the output's order.

    ``shapes`` are those of the inputs' values: (D,) or (layers, D) of an utterance, (T, D) or (T, layers, D) of frames.
    Damage may show only when the last value is taken: checksums and the end of the file are checked then.

    Raises:
        OutputError: the output is missing or damaged, or holds fewer or more inputs or rows than ``shapes``.
        OSError: it cannot be read.
    """
    with _damage_as_output_error(path):
        yield from _reader(kind).read(path, shapes)


def read_logits(path: Path, kind: OutputFormat, shapes: Iterable[Shape]) -> Iterator[Values]:
    """Read the frame-level logits (T, K) of each input back, as :func:`read_values` reads values.

    Raises:
        OutputError: as for :func:`read_values`.
        OSError: as for :func:`read_values`.
    """
    with _damage_as_output_error(path):
        yield from _reader(kind).read_logits(path, shapes)


def read_records(path: Path, kind: OutputFormat) -> Iterator[Record]:
    """Read the record of each input of a committed output, in the output's order.

    Raises:
        OutputError: the output is missing or damaged.
        OSError: it cannot be read.
    """
    with _damage_as_output_error(path):
        yield from _reader(kind).read_records(path)


def read_metadata(path: Path, kind: OutputFormat) -> Metadata:
    """Read the metadata of a committed output.

    Raises:
        OutputError: the output is missing or damaged.
        OSError: it cannot be read.
    """
    with _damage_as_output_error(path):
        return _reader(kind).read_metadata(path)


@contextlib.contextmanager
def _damage_as_output_error(path: Path) -> Iterator[None]:
    """Turn the many exceptions that the formats' libraries raise for a damaged output into OutputError."""
    try:
        yield
    except (OutputError, MemoryError):
        raise
    except Exception as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        if isinstance(error, OSError) and error.errno is not None and not missing:
            raise
        raise OutputError(
            f"{path} does not hold what its journal says; replace it with w2v-embed --overwrite."
        ) from error


def _reader(kind: OutputFormat) -> Reader:
    if kind == "parquet":
        from w2v_runtime.stores import parquet

        return parquet
    if kind == "h5":
        from w2v_runtime.stores import h5

        return h5
    if kind == "scp":
        from w2v_runtime.stores import kaldi

        return kaldi
    readers: dict[str, Reader] = {"npz": npz, "csv": csv, "jsonl": jsonl, "npy": npy}
    return readers[kind]


def _file_store(kind: str, pending: PendingFile, layout: Layout) -> EmbeddingStore:
    if kind == "npz":
        return NpzStore(pending, layout)
    if kind == "csv":
        return CsvStore(pending, layout)
    if kind == "jsonl":
        return JsonlStore(pending, layout)
    if kind == "parquet":
        from w2v_runtime.stores.parquet import ParquetStore

        return ParquetStore(pending, layout)
    if kind == "h5":
        from w2v_runtime.stores.h5 import Hdf5Store

        return Hdf5Store(pending, layout)
    if kind == "scp":
        from w2v_runtime.stores.kaldi import KaldiStore

        return KaldiStore(pending, layout)
    raise ValueError(f"{kind} is not written to a file; use write_lines")


def _check_installed(kind: str, output: str) -> None:
    package, extra = _EXTRAS.get(kind, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise OutputError(f"{output} needs {package}, which is not installed: pip install 'w2v-onnx[{extra}]'")
