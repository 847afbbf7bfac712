"""Where audio comes from: a path, bytes or an open binary file."""

from __future__ import annotations

import os
import tempfile
from typing import BinaryIO

from w2v_models.errors import AudioError

#: What audio is read from: a path, the bytes of a file, or an open binary file, read from where it stands.
Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO


def descriptor_of(source: bytes | bytearray | memoryview | BinaryIO) -> int:
    """A descriptor of an unnamed copy. An open file is left where it stood, if it can be sought.

    Raises:
        AudioError: it cannot be read.
    """
    try:
        with tempfile.TemporaryFile() as copy:
            if isinstance(source, bytes | bytearray | memoryview):
                copy.write(source)
            else:
                start = source.tell() if source.seekable() else None
                while block := source.read(1 << 20):
                    copy.write(block)
                if start is not None:
                    source.seek(start)
            copy.seek(0)
            return os.dup(copy.fileno())
    except Exception as error:
        raise AudioError(f"cannot be read ({error}).") from error
