"""Write bundles that are each wrong in one way, as an attacker would make them: all hashes fit but where that is it.

python tests/make_attack_bundles.py BUNDLE FOLDER

``FOLDER/NAME`` is a bundle, ``FOLDER/outside`` what some of them point to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from w2v_models.bundle import MANIFEST, MAX_MANIFEST_BYTES, record

GRAPH: Final = "onnx/model.onnx"
ENCODER: Final = "onnx/encoder.onnx"
DATA: Final = "onnx/model.onnx_data"
OUTSIDE: Final = "outside"
#: What lies there: ordinary bytes, and a pipe that nobody writes to, on which a reader waits for ever.
SECRET: Final = "secret.bin"
PIPE: Final = "pipe"
#: No part of a graph's file is large, but what it computes is: that shows when it runs.
MADE_HUGE: Final = "tensor-made-huge"
READING: Final = frozenset(("embed", "show"))
LOADING: Final = frozenset(("embed", "verify"))


@dataclass(frozen=True)
class Attack:
    """A change to a whole bundle, the commands that must refuse it, and words of their message."""

    change: Callable[[Path], object]
    says: str
    refused_by: frozenset[str] = LOADING


def make(bundle: Path, folder: Path) -> None:
    """Write every attack of :data:`ATTACKS` below ``folder``, each a changed copy of ``bundle``."""
    outside = folder / OUTSIDE
    outside.mkdir(parents=True)
    (outside / SECRET).write_bytes(bytes(range(256)) * 4096)
    os.mkfifo(outside / PIPE)
    for name, attack in ATTACKS.items():
        shutil.copytree(bundle, folder / name)
        attack.change(folder / name)


def _manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], object]:
    """Change the decoded manifest."""

    def changed(folder: Path) -> None:
        data = json.loads((folder / MANIFEST).read_text())
        change(data)
        (folder / MANIFEST).write_text(json.dumps(data))

    return changed


def _number(name: str, text: str) -> Callable[[Path], object]:
    """Put ``text`` where the first number of this name stands in the manifest."""

    def changed(folder: Path) -> None:
        before, after = re.split(rf'(?<="{name}": )[-+.e0-9]+', (folder / MANIFEST).read_text(), maxsplit=1)
        (folder / MANIFEST).write_text(f"{before}{text}{after}")

    return changed


def _write(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and have the manifest vouch for it."""
    (folder / name).write_bytes(content)
    rehash(folder)


def rehash(folder: Path) -> None:
    """Bring the manifest's sizes and hashes up to what the bundle's files are now."""
    data = json.loads((folder / MANIFEST).read_text())
    for entry in _records(data):
        if (folder / entry["path"]).is_file():
            entry.update(asdict(record(folder, folder / entry["path"])))
    (folder / MANIFEST).write_text(json.dumps(data))


def _records(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        if data.keys() == {"path", "sha256", "size"}:
            yield data
        for value in data.values():
            yield from _records(value)
    elif isinstance(data, list):
        for value in data:
            yield from _records(value)


def _model(change: Callable[[onnx.ModelProto], None], name: str = GRAPH) -> Callable[[Path], object]:
    """Change the decoded graph."""

    def changed(folder: Path) -> None:
        model = onnx.load(folder / name, load_external_data=False)
        change(model)
        _write(folder, name, model.SerializeToString())

    return changed


def _external(**entries: str) -> Callable[[Path], object]:
    """Change where the first tensor outside the graph says it lies."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        places = {entry.key: entry.value for entry in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, value in places.items():
            tensor.external_data.add(key=key, value=value)

    return _model(change)


def _wired(node: onnx.NodeProto, *tensors: onnx.TensorProto) -> Callable[[Path], object]:
    """Add a node whose output ``attack`` the embedding depends on."""

    def change(model: onnx.ModelProto) -> None:
        last = next(item for item in model.graph.node if "embedding" in item.output)
        last.output[list(last.output).index("embedding")] = "before_attack"
        model.graph.initializer.extend(tensors)
        model.graph.node.append(node)
        model.graph.node.append(helper.make_node("ReduceMax", ["attack"], ["one"], keepdims=0))
        model.graph.node.append(helper.make_node("Add", ["before_attack", "one"], ["embedding"]))
        if node.domain:
            model.opset_import.append(helper.make_opsetid(node.domain, 1))

    return _model(change)


def _filled(elements: int) -> Callable[[Path], object]:
    """A node that fills a tensor of so many floats, from a graph of a few bytes more."""
    shape = helper.make_tensor("attack_shape", TensorProto.INT64, (1,), (elements,))
    return _wired(helper.make_node("ConstantOfShape", ["attack_shape"], ["attack"]), shape)


def _declared(model: onnx.ModelProto) -> None:
    tensor = TensorProto(name="huge", data_type=TensorProto.FLOAT, dims=(1 << 20, 1 << 20))
    model.graph.initializer.append(tensor)


def _renamed(name: str) -> Callable[[Path], object]:
    """Give an input or output another name, wherever it stands."""

    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        for value in (*graph.input, *graph.output):
            value.name = "other" if value.name == name else value.name
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["other" if item == name else item for item in names]

    return _model(change)


def _linked(name: str, target: str, hard: bool = False) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        (folder / name).unlink()
        outside = folder.parent / OUTSIDE / target
        if hard:
            (folder / name).hardlink_to(outside)
            rehash(folder)
        else:
            (folder / name).symlink_to(outside)

    return changed


def _instead(name: str, make_: Callable[[Path], object]) -> Callable[[Path], object]:
    """Put something that is no file in the place of one."""

    def changed(folder: Path) -> None:
        (folder / name).unlink()
        make_(folder / name)

    return changed


def _swapped(data: dict[str, Any]) -> None:
    entry = data["precisions"]["fp32"]
    entry["graph"], entry["layers"] = entry["layers"], entry["graph"]


def _set(*keys: str, to: Any) -> Callable[[Path], object]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return _manifest(change)


def _data_elsewhere(folder: Path) -> None:
    """The manifest vouches for another file of the same name; the one that the graph names leads outside."""
    (folder / "other").mkdir()
    (folder / DATA).rename(folder / "other" / "model.onnx_data")
    (folder / DATA).symlink_to(folder.parent / OUTSIDE / PIPE)
    data = json.loads((folder / MANIFEST).read_text())
    data["precisions"]["fp32"]["data"][0]["path"] = "other/model.onnx_data"
    (folder / MANIFEST).write_text(json.dumps(data))


def _library(folder: Path) -> None:
    (folder / "onnx" / "operators.so").write_bytes(b"\x7fELF")
    _set("custom_ops", to="onnx/operators.so")(folder)


def _halved(name: str) -> Callable[[Path], object]:
    return lambda folder: _write(folder, name, (folder / name).read_bytes()[: (folder / name).stat().st_size // 2])


def _flip(name: str) -> Callable[[Path], object]:
    def changed(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (folder / name).write_bytes(content)

    return changed


_INVALID: Final = "is not a valid manifest"

ATTACKS: Final[dict[str, Attack]] = {
    "no-folder": Attack(shutil.rmtree, "is not a folder", READING),
    "empty-folder": Attack(lambda b: (shutil.rmtree(b), b.mkdir()), "holds no manifest.json", READING),
    "manifest-empty": Attack(lambda b: (b / MANIFEST).write_bytes(b""), _INVALID, READING),
    "manifest-large": Attack(lambda b: os.truncate(b / MANIFEST, MAX_MANIFEST_BYTES + 1), "larger than", READING),
    "manifest-deep": Attack(lambda b: (b / MANIFEST).write_text("[" * 10**6), _INVALID, READING),
    "manifest-deep-field": Attack(_number("opset", "[" * 960 + "]" * 960), "opset must be of type int", READING),
    "manifest-huge-number": Attack(_number("max_abs", f"1{'0' * 400}"), "number within the range", READING),
    "manifest-endless-number": Attack(_number("max_abs", "9" * 10**6), _INVALID, READING),
    "manifest-nan": Attack(_number("max_abs", "NaN"), "NaN is not a number", READING),
    "manifest-twice": Attack(_number("opset", '3, "opset": 3'), "names opset more than once", READING),
    "manifest-surrogate": Attack(_set("source", "model", to="\ud800"), "text that UTF-8 can hold", READING),
    "manifest-version": Attack(_set("format_version", to=999), "format_version is 999; this release reads", READING),
    "manifest-without-version": Attack(_manifest(lambda d: d.pop("format_version")), "format_version is None", READING),
    "manifest-precision": Attack(
        _manifest(lambda d: d["precisions"].update(fp12=d["precisions"].pop("fp32"))), "fp12' is unknown", READING
    ),
    "manifest-folder": Attack(_instead(MANIFEST, Path.mkdir), "holds no manifest.json", READING),
    "manifest-pipe": Attack(_instead(MANIFEST, os.mkfifo), "holds no manifest.json", READING),
    "manifest-link-to-pipe": Attack(_linked(MANIFEST, PIPE), "holds no manifest.json", READING),
    "path-nul": Attack(_set("reference", "path", to="a\0b"), "is not a plain path inside the bundle", READING),
    "path-up": Attack(_set("reference", "path", to=f"../{OUTSIDE}/{PIPE}"), "is not a plain path", READING),
    "library-in-manifest": Attack(_library, "unknown fields: custom_ops", READING),
    "data-elsewhere": Attack(_data_elsewhere, "in one folder", READING),
    "graph-missing": Attack(lambda b: (b / GRAPH).unlink(), f"{GRAPH} cannot be read: No such file"),
    "graph-empty": Attack(lambda b: _write(b, GRAPH, b""), f"{GRAPH} is not an ONNX model"),
    "graph-halved": Attack(_halved(GRAPH), f"{GRAPH} is not an ONNX model"),
    "graph-flipped": Attack(_flip(GRAPH), f"{GRAPH} is not the file its manifest names \\(SHA-256 differs\\)"),
    "graph-of-ort": Attack(lambda b: _write(b, GRAPH, b"\x1c\0\0\0ORTM" + bytes(64)), "of its own format"),
    "graph-folder": Attack(_instead(GRAPH, Path.mkdir), f"{GRAPH} is not a regular file inside the bundle"),
    "graph-pipe": Attack(_instead(GRAPH, os.mkfifo), f"{GRAPH} is not a regular file inside the bundle"),
    "graph-link": Attack(_linked(GRAPH, SECRET), f"{GRAPH} is not a regular file inside the bundle"),
    "graph-output": Attack(_renamed("embedding"), "has inputs .* where its manifest says"),
    "graph-input": Attack(_renamed("waveform"), "has inputs .* where its manifest says"),
    "graphs-swapped": Attack(_manifest(_swapped), "has inputs .* where its manifest says"),
    "encoder-empty": Attack(
        lambda b: _write(b, ENCODER, b""), f"{ENCODER} is not an ONNX model", frozenset(("verify",))
    ),
    "data-missing": Attack(lambda b: (b / DATA).unlink(), f"{DATA} cannot be read: No such file"),
    "data-short": Attack(lambda b: os.truncate(b / DATA, 100), f"{DATA} has 100 bytes where its manifest says"),
    "data-short-rehashed": Attack(_halved(DATA), "lies beyond the"),
    "data-flipped": Attack(_flip(DATA), f"{DATA} is not the file its manifest names \\(SHA-256 differs\\)"),
    "data-link-to-pipe": Attack(_linked(DATA, PIPE), f"{DATA} is not a regular file inside the bundle"),
    "data-hard-link": Attack(_linked(DATA, SECRET, hard=True), f"{DATA} is a hard link"),
    "data-pipe": Attack(_instead(DATA, os.mkfifo), f"{DATA} is not a regular file inside the bundle"),
    "data-absolute": Attack(_external(location="/etc/passwd"), "which is not one of the bundle's"),
    "data-up": Attack(_external(location=f"../../{OUTSIDE}/{PIPE}"), "which is not one of the bundle's"),
    "data-nul": Attack(_external(location="model.onnx_data\0x"), "which is not one of the bundle's"),
    "data-other-file": Attack(_external(location="layers.onnx"), "which is not one of the bundle's"),
    "data-in-memory": Attack(_external(location="*/_ORT_MEM_ADDR_/*"), "which is not one of the bundle's"),
    "data-beyond-end": Attack(_external(offset=str(1 << 40)), "lies beyond the"),
    "data-before-start": Attack(_external(offset="-4096"), "lies beyond the"),
    "data-length": Attack(_external(length=str(1 << 50)), "bytes for"),
    "foreign-operator": Attack(
        _wired(helper.make_node("Evil", ["waveform"], ["attack"], domain="evil.example")), "needs operators of"
    ),
    "unknown-operator": Attack(_wired(helper.make_node("Evil", ["waveform"], ["attack"])), "cannot be opened"),
    "tensor-declared-huge": Attack(_model(_declared), "holds 0 bytes for"),
    MADE_HUGE: Attack(_filled(1 << 40), "", frozenset()),
}

if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
