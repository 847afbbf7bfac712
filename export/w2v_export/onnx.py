"""From the inference forms to ONNX files that share one file of weights: optimum's exporter with our own graphs."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx.external_data_helper import set_external_data
from optimum.exporters.onnx import OnnxConfig
from optimum.exporters.onnx.convert import export
from optimum.utils import NormalizedConfig

from w2v_export.graph import HeadGraph, InferenceGraph, WindowGraph, register_symbolics
from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE, LENGTHS, LOGITS, MOMENTS, WAVEFORM

#: The newest operator set that the TorchScript exporter writes.
TRACED_OPSET: Final = 20
#: The first with ``Attention`` taking ``nonpad_kv_seqlen``. No operator that we emit changed meaning in between.
OPSET: Final = 24
#: The IR version that came with that operator set.
IR_VERSION: Final = 11
#: Tensors of at least this many bytes go to the external data file; axes and scalars stay in the graph.
EXTERNAL_BYTES: Final = 1024

GRAPH_NAME: Final = "model.onnx"
WINDOWS_NAME: Final = "windows.onnx"
HEAD_NAME: Final = "head.onnx"
DATA_NAME: Final = f"{GRAPH_NAME}_data"

Axes = dict[str, dict[int, str]]


class GraphOnnxConfig(OnnxConfig):
    """What optimum needs to know of one of our modules: an example of its inputs, and all dynamic axes."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig

    def __init__(self, model: Any, example: dict[str, torch.Tensor], inputs: Axes, outputs: Axes) -> None:
        super().__init__(model.config, task="feature-extraction")
        self._example, self._inputs, self._outputs = example, inputs, outputs

    @property
    def inputs(self) -> Axes:
        return self._inputs

    @property
    def outputs(self) -> Axes:
        return self._outputs

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        return dict(self._example)


@dataclass(frozen=True)
class Graphs:
    """The files of one precision."""

    graph: Path
    windows: Path
    head: Path | None
    data: Path


def export_graphs(model: InferenceGraph, folder: Path) -> Graphs:
    """Write the graph of ``model``, those for windows and head, and their common weights into ``folder``.

    The graphs hold standard ONNX operators of operator set :data:`OPSET` only, and their axes are dynamic.
    """
    samples, batch = 4 * model.receptive_field, {0: "batch"}
    waveform = {WAVEFORM: torch.randn(2, samples), LENGTHS: torch.tensor([samples, samples // 2])}
    axes: Axes = {WAVEFORM: {0: "batch", 1: "samples"}, LENGTHS: batch}
    frames: Axes = {LAST_HIDDEN_STATE: {0: "batch", 1: "frames"}, FRAME_LENGTHS: batch}
    logits: Axes = {LOGITS: batch} if model.head is not None else {}
    kernel = model.first_kernel

    whole = GraphOnnxConfig(model, waveform, axes, frames | {EMBEDDING: batch} | logits)
    proto = _trace(model, whole, folder / GRAPH_NAME)
    onnx.save(
        proto,
        folder / GRAPH_NAME,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=DATA_NAME,
        size_threshold=EXTERNAL_BYTES,
    )
    weights = {
        tensor.name: tensor for tensor in onnx.load(folder / GRAPH_NAME, load_external_data=False).graph.initializer
    }

    windows = WindowGraph(model)
    moments = torch.rand(2, 2 + kernel + kernel**2) + 0.5
    config = GraphOnnxConfig(windows, waveform | {MOMENTS: moments}, axes | {MOMENTS: batch}, frames)
    _save_sharing(_trace(windows, config, folder / WINDOWS_NAME), folder / WINDOWS_NAME, weights)
    if model.head is not None:
        head = HeadGraph(model)
        example = {EMBEDDING: torch.randn(2, model.config.hidden_size)}
        config = GraphOnnxConfig(head, example, {EMBEDDING: batch}, logits)
        _save_sharing(_trace(head, config, folder / HEAD_NAME), folder / HEAD_NAME, weights)
    head_path = None if model.head is None else folder / HEAD_NAME
    for path in filter(None, (folder / GRAPH_NAME, folder / WINDOWS_NAME, head_path)):
        onnx.checker.check_model(path, full_check=True)
    return Graphs(folder / GRAPH_NAME, folder / WINDOWS_NAME, head_path, folder / DATA_NAME)


def _trace(model: torch.nn.Module, config: GraphOnnxConfig, path: Path) -> onnx.ModelProto:
    """Trace a module through optimum's exporter and return it with its weights, raised to our operator set."""
    register_symbolics(TRACED_OPSET)
    with _quiet():
        # The dynamic-axes fix would open the graph in ONNX Runtime before its operator set is raised.
        export(model.eval(), config, path, opset=TRACED_OPSET, disable_dynamic_axes_fix=True)
    proto = onnx.load(path)
    path.unlink()
    path.with_name(f"{path.name}_data").unlink(missing_ok=True)  # written by the exporter beyond 2 GiB
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "w2v-onnx", ""
    for node in proto.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    return proto


def _save_sharing(proto: onnx.ModelProto, path: Path, weights: dict[str, onnx.TensorProto]) -> None:
    """Save a graph whose large weights are those of the main graph: same name, same shape, same place on disk."""
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) < EXTERNAL_BYTES:
            continue
        shared = weights[tensor.name]
        if (shared.dims, shared.data_type) != (tensor.dims, tensor.data_type):
            raise ValueError(f"{path.name}: {tensor.name} is not the weight of that name in {GRAPH_NAME}")
        place = {entry.key: entry.value for entry in shared.external_data}
        set_external_data(tensor, place["location"], int(place["offset"]), int(place["length"]))
        tensor.ClearField("raw_data")
    onnx.save(proto, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on tracing and deprecation, which the user can do nothing about."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "optimum")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
