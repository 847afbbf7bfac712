"""An engine's sessions: which graph of the bundle serves a request, checked and opened when first needed.

The public graph (``model.onnx``) serves requests for its own outputs; any other layer, such as ``--layer 6``, is served
by the graph of all layers, cut to that layer (:meth:`~w2v_runtime.graphs.onnx_file.OnnxFile.cut`), so that the blocks
after it are skipped.
"""

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
#: Names of a bundle's graphs: fields of a precision in the manifest. "graph" stands for the layers graph too.
Graph = Literal["graph", "features", "encoder", "head", "mel"]


@dataclass(frozen=True)
class GraphFile:
    """A checked graph, and the outputs that a session of it is to keep; ``name`` is its field in the manifest.

    ``main`` says whether it is the graph that the engine was opened for.
    """

    name: str
    path: Path
    content: OnnxFile
    outputs: tuple[str, ...]
    main: bool


#: What identifies a session: the graph's name, and the outputs that are kept.
_Key = tuple[str, tuple[str, ...]]


@dataclass(eq=False)
class _Place(Generic[Session]):
    """Holds a session once it is open; one thread opens it under the lock, others that need it wait."""

    session: Session | None = None
    opening: threading.Lock = field(default_factory=threading.Lock)


class Sessions(Generic[Session]):
    """An engine's sessions, one for each graph and set of outputs. Threads may share them.

    The public graph serves requests for its own outputs, the graph of all layers serves all others. The first session
    stays open, and of the others the most recently used. A request always gets the same graph, whatever was asked
    before, so that its results are the same bit for bit. A forked process opens its own sessions.

    Args:
        bundle: the bundle that holds the graphs.
        stored: a precision that the bundle holds.
        open_graph: opens a session of the engine's for a checked graph.
        recent: how many sessions stay open beside the first.

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
        """The session that computes ``outputs``, opened if need be.

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
        """Drop a session, so that its graph is opened again when it is next needed."""
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
        """The holder of a session, now the most recently used; beyond the limit, the least recently used is dropped."""
        with self._changing:
            self._main = self._main or key
            place = self._places.setdefault(key, _Place())
            self._places.move_to_end(key)
            others = [other for other in self._places if other != self._main]
            oldest = self._places.pop(others[0]) if len(others) > self._recent else None
        if oldest is not None:
            with forks.held_off():  # no fork while the session is closed, which happens here if no run holds it
                del oldest
        return place

    def _checked(self, name: str, outputs: tuple[str, ...]) -> GraphFile:
        """Read one of the bundle's graphs; check its hash and content, and the hashes of its weight files.

        Raises:
            BundleError: the bundle lacks the graph, or a file is not what the manifest says.
        """
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
