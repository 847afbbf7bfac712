"""The graphs of one precision of a bundle: checked, and opened when first needed, cut to what is asked of them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError
from w2v_models.manifest import FileRecord
from w2v_runtime.graphs.onnx_file import OnnxFile, check_graph
from w2v_runtime.threads import forks

Session = TypeVar("Session")
#: A graph of a bundle: the fields of a precision in its manifest.
Graph = Literal["graph", "windows", "head", "mel"]


@dataclass(frozen=True)
class GraphFile:
    """A checked graph, and which of its outputs to keep; ``name`` is that of its field in the manifest.

    ``main`` is whether it is the one that the engine was opened for.
    """

    name: str
    path: Path
    content: OnnxFile
    outputs: tuple[str, ...]
    main: bool


#: A graph's name, and its outputs that are kept.
_Key = tuple[str, tuple[str, ...]]


@dataclass(eq=False)
class _Place(Generic[Session]):
    """Where a session stands once it is open; one thread opens it, others that need it wait."""

    session: Session | None = None
    opening: threading.Lock = field(default_factory=threading.Lock)


class Sessions(Generic[Session]):
    """An engine's sessions, one for each graph and set of outputs. Threads may share them.

    The public graph serves what it has an output for, the graph of all layers everything else. The first that is
    asked for stays open, as do those asked for last. A request always gets the same graph, whatever was asked before,
    so that its answers are the same bits. A forked process opens its own.

    Args:
        bundle: whose graphs they are.
        stored: a precision that it holds.
        open_graph: opens a session of the engine's.
        recent: how many stay open beside the first.

    Raises:
        BundleError: the bundle does not hold the precision.
    """

    def __init__(self, bundle: Bundle, stored: str, open_graph: Callable[[GraphFile], Session], recent: int) -> None:
        self._bundle, self._entry = bundle, bundle.precision(stored)
        self._open_graph, self._recent = open_graph, recent
        self._main: _Key | None = None
        self._places: OrderedDict[_Key, _Place[Session]] = OrderedDict()
        self._changing = threading.Lock()
        forks.renew_in_child(self)

    def get(self, outputs: Sequence[str], graph: Graph) -> Session:
        """The session that has ``outputs``.

        Raises:
            BundleError: a file is not what the manifest says, or the engine cannot open it.
        """
        key = self._key(outputs, graph)
        place = self._place(key)
        with place.opening:
            if place.session is None:
                place.session = self._open_graph(self._checked(*key))
            return place.session

    def forget(self, session: Session) -> None:
        """Open a graph again when it is next needed."""
        with self._changing:
            self._places = OrderedDict(item for item in self._places.items() if item[1].session is not session)

    def renew(self) -> None:
        for place in self._places.values():
            forks.abandon(place.session)
        self._places, self._changing = OrderedDict(), threading.Lock()

    def _key(self, outputs: Sequence[str], graph: Graph) -> _Key:
        public, needed = self._bundle.manifest.outputs, tuple(sorted(set(outputs)))
        if graph == "graph" and set(needed) <= set(public):
            return "graph", public
        return "layers" if graph == "graph" else graph, needed

    def _place(self, key: _Key) -> _Place[Session]:
        """The place of a session, which is now the latest; that of the one not asked for the longest is given up."""
        with self._changing:
            self._main = self._main or key
            place = self._places.setdefault(key, _Place())
            self._places.move_to_end(key)
            others = [other for other in self._places if other != self._main]
            oldest = self._places.pop(others[0]) if len(others) > self._recent else None
        if oldest is not None:
            with forks.held_off():  # while it is closed, if nobody runs it
                del oldest
        return place

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
        return GraphFile(name, path, file, outputs, main=(name, outputs) == self._main)

    def _check_names(self, file: OnnxFile) -> None:
        manifest, found = self._bundle.manifest, (file.inputs, file.outputs)
        if found != (expected := (manifest.inputs, manifest.outputs)):
            raise BundleError(
                f"The graph in {self._bundle.folder} has inputs {found[0]} and outputs {found[1]}, "
                f"where its manifest says {expected[0]} and {expected[1]}."
            )
