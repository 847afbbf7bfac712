"""The exceptions of all packages; the class tells whether the request, one input, the disk or the device is at fault.

Every message is a sentence that names the file or word at fault and the fix. ``exit_code`` is what the commands return.
"""

from __future__ import annotations


class W2VError(Exception):
    """A fault that stops the command."""

    exit_code = 1


class RefusedError(W2VError, ValueError):
    """The request cannot be carried out as given; nothing was done."""

    exit_code = 2


class BundleError(RefusedError):
    """A bundle is missing, damaged, or not what its manifest says."""


class EngineError(RefusedError):
    """No inference engine, or one that cannot do what was asked of it."""


class OutputError(RefusedError):
    """The output exists, cannot be written, or has no known format."""


class CheckpointError(RefusedError):
    """A checkpoint cannot be found, read or understood."""


class ParityError(W2VError):
    """A finished bundle differs from its reference by more than its tolerance."""


class OutOfMemoryError(W2VError):
    """The device's memory does not hold a run; a smaller batch may fit."""


class StorageError(W2VError):
    """A disk is full or fails while it is written; what was finished before is kept."""


class AudioError(W2VError, ValueError):
    """One input cannot be read as audio; others can."""
