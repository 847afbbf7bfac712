"""What is fuzzed: one function a target, which takes an input and raises where a promise is broken.

Whatever else is wrong with an input is an ``AudioError``, a ``RefusedError`` or a ``BundleError``, each one printable
line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from unittest import mock

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from journal_seeds import MADE, VALUES, write_output

from w2v_models.bundle import MANIFEST, Bundle
from w2v_models.errors import AudioError, BundleError, OutputError, RefusedError, W2VError
from w2v_models.manifest import Manifest
from w2v_runtime.audio import ffmpeg
from w2v_runtime.audio.reading import MAX_DECLARED_SECONDS, declared_seconds, open_audio, read_audio
from w2v_runtime.embedding.results import Embedding
from w2v_runtime.files.outputs import JOURNAL_SUFFIX, VALUES_SUFFIX, hidden
from w2v_runtime.graphs.onnx_file import OnnxFile, check_graph
from w2v_runtime.graphs.onnx_format import Tensor
from w2v_runtime.runs.journal import Header, Stamp
from w2v_runtime.runs.lists import read_list
from w2v_runtime.runs.readback import FinishedOutput
from w2v_runtime.runs.spool import Spool

RATE: Final = 16_000
#: A FLAC frame of silence holds 65 535 frames in about a dozen bytes; no other format comes near.
_FRAMES_PER_BYTE: Final = 8_192
#: The lowest sample rate that is read, in Hz.
_LOWEST_RATE: Final = 1_000
_HEADROOM: Final = 65_536
#: One in so many inputs, if it is no longer than this, is also read at once, from its bytes.
_WHOLE_EVERY: Final = 8
_WHOLE_SECONDS: Final = 60
_LONGEST_MESSAGE: Final = 2_000
#: Of the processor, for one input; tracing makes it many times slower than it is.
_SECONDS: Final = 10
#: The first byte of an input of the target ``bundle``: what the rest of it is.
MANIFEST_KIND: Final = b"m"
GRAPH_KIND: Final = b"g"
#: The first byte of an input of the target ``lists``: how its paths are separated.
LINES_KIND: Final = b"l"
NULL_KIND: Final = b"0"


class BrokenPromiseError(AssertionError):
    """An input for which a promise does not hold."""


def audio(content: bytes, folder: Path) -> None:
    """Read a file of any bytes: finite samples of a length that the bytes can hold, or ``AudioError``."""
    path = folder / "input.wav"
    path.write_bytes(content)
    with _bounded(), mock.patch.object(ffmpeg, "installed", return_value=False):
        with _only(AudioError):
            seconds = declared_seconds(path)
            _expect(0 <= seconds <= MAX_DECLARED_SECONDS, f"{seconds} s are declared")
        with _only(AudioError):
            decoded = _read_blocks(path, len(content))
            if len(content) % _WHOLE_EVERY == 0 and decoded <= _WHOLE_SECONDS:
                whole = read_audio(content, RATE)
                _expect(abs(whole.duration - decoded) < 1e-9, f"{whole.duration} s at once, {decoded} s in blocks")
                _check_samples(whole.samples)


def containers(content: bytes, folder: Path) -> None:
    """Read a file of any bytes in FFmpeg's process, which may crash: finite samples, or ``AudioError``; no hang."""
    path, start = folder / "input.bin", time.monotonic()
    path.write_bytes(content)
    with _only(AudioError):
        _read_blocks(path, len(content))
    _expect(time.monotonic() - start < ffmpeg.STALL_SECONDS, "it took as long as a stalled process")


def _read_blocks(path: Path, size: int) -> float:
    """Read a file block by block and return its seconds."""
    samples = 0
    with open_audio(path, RATE) as stream:
        for block in stream:
            samples += len(block)
            _check_samples(block)
        seconds = stream.duration
        _expect(all(_is_line(warning) for warning in stream.warnings), f"a warning is no line: {stream.warnings}")
    bound = (size + _HEADROOM) * _FRAMES_PER_BYTE
    _expect(0 < seconds * _LOWEST_RATE <= bound, f"{seconds} s from {size} bytes")
    _expect(abs(samples - seconds * RATE) <= 2, f"{samples} samples for {seconds} s")
    return seconds


def _check_samples(samples: np.ndarray) -> None:
    _expect(samples.ndim == 1 and samples.dtype == np.float32, f"{samples.dtype} {samples.shape}")
    _expect(bool(np.isfinite(samples).all()), "a sample is not finite")


def lists(content: bytes, folder: Path) -> None:
    """Read a list of any bytes: paths that stand in it, or ``RefusedError``."""
    null, content = content[:1] == NULL_KIND, content[1:]
    path = folder / "list"
    path.write_bytes(content)
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in content and not null
    with _bounded(), _only(RefusedError):
        for name in read_list(str(path), null):
            _expect(bool(name), "a path is empty")
            _expect(("\0" if null else "\n") not in name, f"{name!r} holds its separator")
            _expect(wide or os.fsencode(name) in content, f"{name!r} is not in the list")


def bundle(content: bytes, folder: Path) -> None:
    """Read a manifest or a graph of any bytes: a valid object, or ``BundleError``."""
    with _bounded():
        if content[:1] == MANIFEST_KIND:
            _manifest(content[1:], folder)
        elif content[:1] == GRAPH_KIND:
            _graph(content[1:], folder)


def _manifest(content: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content)
    with _only(BundleError):
        opened = Bundle.open(folder)
        manifest = opened.manifest
        again = Manifest.from_json(manifest.to_json())
        _expect(again == manifest and again.sha256 == manifest.sha256, "it does not read back as it was written")
        json.dumps(dataclasses.asdict(manifest), allow_nan=False)
        conv = manifest.architecture.conv
        _expect(conv.num_frames(conv.receptive_field) == 1, "one receptive field is not one frame")
        for record in manifest.files:
            _expect(not os.path.isabs(record.path) and ".." not in record.path.split("/"), f"{record.path} leads out")
            with _only(BundleError):
                opened.check(record)


def _graph(content: bytes, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(content)
    with _only(BundleError):
        file = OnnxFile.read(path)
        data = {"model.onnx_data": 1 << 20, "model.onnx.data": 1 << 20}
        check_graph(file, path, data)
        _expect_as_onnx_reads_it(file, content)
        for outputs in {file.outputs[:1], file.outputs[-1:], file.outputs}:
            cut = folder / "cut.onnx"
            cut.write_bytes(file.cut(outputs))
            again = OnnxFile.read(cut)
            _expect(again.outputs == outputs, f"{outputs} were asked for, {again.outputs} are there")
            check_graph(again, cut, data)


def _expect_as_onnx_reads_it(file: OnnxFile, content: bytes) -> None:
    """What was checked is what an engine will see: the reader here and protobuf's own understand the same."""
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:
        return  # engines read with protobuf, so they refuse it
    _expect(tuple(value.name for value in model.graph.output) == file.outputs, "protobuf reads other outputs")
    seen = Counter((tensor.name, tensor.data_type, tensor.dims, _place(tensor)) for tensor in file.tensors)
    read = Counter(
        (tensor.name, tensor.data_type, tuple(tensor.dims), _place_by_onnx(tensor)) for tensor in _tensors(model.graph)
    )
    _expect(seen == read, f"protobuf reads {read - seen} for {seen - read}")
    domains = {node.domain for node in _nodes(model.graph)}
    _expect(domains == file.node_domains, f"protobuf reads operators of {domains}")


def _place(tensor: Tensor) -> tuple[str, int, int | None] | None:
    external = tensor.external
    return (external.location, external.offset, external.length) if external else None


def _place_by_onnx(tensor: onnx.TensorProto) -> tuple[str, int, int | None] | None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = int(entries["length"]) if "length" in entries else None
    return entries.get("location", ""), int(entries.get("offset", "0")), length


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors: initializers and attributes, those of subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


@contextmanager
def _only(kind: type[W2VError]) -> Iterator[None]:
    """Let errors of one kind pass as what an input deserves, and everything else out."""
    try:
        yield
    except kind as error:
        _expect(_is_line(str(error)), f"the message is not a line: {error!r}")


@contextmanager
def _bounded() -> Iterator[None]:
    """Expect that the block ends in time, and leaves no thread, descriptor or process behind."""
    before, start = _held(), time.process_time()
    yield
    seconds = time.process_time() - start
    _expect(seconds < _SECONDS, f"it took {seconds:.0f} s of the processor")
    _expect(_held() == before, f"threads, descriptors: {before} before, {_held()} after")
    try:
        child = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    raise BrokenPromiseError(f"a child process {child}")


def _held() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def _is_line(text: str) -> bool:
    return 0 < len(text) < _LONGEST_MESSAGE and not set(text) & set("\r\n\0")


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise BrokenPromiseError(what)


def journal(content: bytes, folder: Path) -> None:
    """Go on from, and read back by, a journal of any bytes: what it rightly tells, or ``OutputError``."""
    output = folder / "out.npz"
    if not output.exists():
        write_output(output)
    hidden(output, JOURNAL_SUFFIX).write_bytes(content)
    hidden(output, VALUES_SUFFIX).write_bytes(VALUES)
    made = {embedding.path: embedding for embedding in MADE}
    with _bounded():
        with _only(OutputError):
            for _, embedding in FinishedOutput.open(output, "npz").results():
                _expect(embedding.values.shape == (4,), f"values of {embedding.values.shape}")
        with _only(OutputError):
            header = Header.read(hidden(output, JOURNAL_SUFFIX))
            if header is not None:
                _go_on(output, header, made)


def _go_on(output: Path, header: Header, made: dict[str, Embedding]) -> None:
    """What a record yields was written into it, number for number, unless whoever changed it made its checksum anew."""
    with contextlib.closing(Spool(output, header, resume=True)) as spool:
        for position, path in enumerate(made):
            spool.recall(position, path, Stamp(1000 + position, 10**18))
        _expect(all(map(os.fsencode, spool.gone())), "an input without a name is gone")
        _expect(spool.unchanged in (True, False) and spool.count <= len(made), f"{spool.count} inputs recalled")
        if not spool.complete:
            for embedding in spool.embeddings():
                _expect(embedding.path in made, f"{embedding.path!r} was never asked for")
                _expect(embedding.values.nbytes <= len(VALUES), f"values of {embedding.values.shape}")


TARGETS: Final[dict[str, Callable[[bytes, Path], None]]] = {
    "audio": audio,
    "containers": containers,
    "lists": lists,
    "bundle": bundle,
    "journal": journal,
}
