"""The graphs of one precision of a bundle: checked, and opened when first needed, cut to what is asked of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError
from w2v_models.manifest import FileRecord
from w2v_runtime.engine import Graph
from w2v_runtime.onnx_file import OnnxFile, check_graph

Session = TypeVar("Session")


@dataclass(frozen=True)
class GraphFile:
    """A checked graph, and which of its outputs to keep; ``name`` is that of its field in the manifest."""

    name: str
    path: Path
    content: OnnxFile
    outputs: tuple[str, ...]


class Sessions(Generic[Session]):
    """An engine's sessions, one a graph. Threads may share them.

    The public graph serves what it has an output for, the graph of all layers everything else.

    Args:
        bundle: whose graphs they are.
        stored: a precision that it holds.
        open_graph: opens a session of the engine's.

    Raises:
        BundleError: the bundle does not hold the precision.
    """

    def __init__(self, bundle: Bundle, stored: str, open_graph: Callable[[GraphFile], Session]) -> None:
        self._bundle, self._entry = bundle, bundle.precision(stored)
        self._open_graph = open_graph
        self._opening = threading.Lock()
        self._open: dict[str, tuple[Session, frozenset[str]]] = {}

    def get(self, outputs: Sequence[str], graph: Graph) -> Session:
        """A session that has ``outputs``; it replaces one of the same graph that lacks some of them.

        Raises:
            BundleError: a file is not what the manifest says, or the engine cannot open it.
        """
        public, needed = self._bundle.manifest.outputs, frozenset(outputs)
        name = "layers" if graph == "graph" and not needed <= set(public) else graph
        with self._opening:
            session, offered = self._open.get(name, (None, frozenset()))
            if session is None or not needed <= offered:
                self._open.pop(name, None)
                kept = public if name == "graph" else tuple(sorted(needed))
                session = self._open_graph(self._checked(name, kept))
                self._open[name] = session, frozenset(kept)
            return session

    def forget(self) -> None:
        """Open every graph again when it is next needed."""
        with self._opening:
            self._open.clear()

    def _checked(self, name: str, outputs: tuple[str, ...]) -> GraphFile:
        """One of the bundle's graphs, checked in hash and content, as are the files of its weights in hash."""
        record: FileRecord | None = getattr(self._entry, name)
        if record is None:
            raise BundleError(f"{self._bundle.folder} has no {name} graph. Export the model again.")
        path = self._bundle.check(record)
        file = OnnxFile.read(path)
        check_graph(file, path, {os.path.basename(data.path): data.size for data in self._entry.data})
        if name == "graph":
            self._check_names(file)
        for data in self._entry.data:
            self._bundle.check(data)
        return GraphFile(name, path, file, outputs)

    def _check_names(self, file: OnnxFile) -> None:
        manifest, found = self._bundle.manifest, (file.inputs, file.outputs)
        if found != (expected := (manifest.inputs, manifest.outputs)):
            raise BundleError(
                f"The graph in {self._bundle.folder} has inputs {found[0]} and outputs {found[1]}, "
                f"where its manifest says {expected[0]} and {expected[1]}."
            )
