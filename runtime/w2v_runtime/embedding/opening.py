"""The arguments that an embedder was opened with, for its copies and pickles, and the engine that copies share."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError
from w2v_runtime.engines.base import Engine
from w2v_runtime.engines.choice import open_engine
from w2v_runtime.threads import forks


@dataclass(frozen=True)
class Opening:
    """A bundle, by its folder and hash, and the other arguments of :func:`open_engine`."""

    folder: Path
    sha256: str
    device: str
    precision: str
    threads: int | None
    outputs: tuple[str, ...]
    prepack: bool

    def engine(self) -> Engine:
        """Open an engine.

        Raises:
            BundleError: the folder no longer holds a bundle, or holds another one, or its files are damaged.
            EngineError: the engine or device is not available in this process.
        """
        bundle = Bundle.open(self.folder)
        if bundle.manifest.sha256 != self.sha256:
            raise BundleError(
                f"{self.folder} holds another bundle than the one that this Embedder was opened with; open a new one."
            )
        return open_engine(bundle, self.device, self.precision, self.threads, self.outputs, self.prepack)


class _SharedEngine:
    """The engine that an embedder's copies in this process share.

    It stays open when no copy is left, because a process pool sends a new copy with each task.
    """

    def __init__(self) -> None:
        self._held: tuple[Opening, Engine] | None = None
        self.renew()
        forks.renew_in_child(self)

    def renew(self) -> None:
        self._lock = threading.Lock()

    def engine(self, opening: Opening) -> Engine:
        with self._lock:
            if self._held is None or self._held[0] != opening:
                self._held = None
                self._held = opening, opening.engine()
            return self._held[1]


_SHARED = _SharedEngine()


def shared_engine(opening: Opening) -> Engine:
    """The engine that all copies with an equal ``opening`` share in this process."""
    return _SHARED.engine(opening)
