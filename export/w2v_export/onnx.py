"""From the inference form to ``model.onnx``: optimum's exporter, with our own configuration and graph."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx
import torch
from optimum.exporters.onnx import OnnxConfig
from optimum.exporters.onnx.convert import export
from optimum.utils import NormalizedConfig

from w2v_export.graph import InferenceGraph, register_symbolics
from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE, LENGTHS, LOGITS, WAVEFORM

#: The newest operator set that the TorchScript exporter writes.
TRACED_OPSET: Final = 20
#: The first with ``Attention`` taking ``nonpad_kv_seqlen``. No operator that we emit changed meaning in between.
OPSET: Final = 24
#: The IR version that came with that operator set.
IR_VERSION: Final = 11
#: Tensors of at least this many bytes go to the external data file; axes and scalars stay in the graph.
EXTERNAL_BYTES: Final = 1024

GRAPH_NAME: Final = "model.onnx"


class InferenceOnnxConfig(OnnxConfig):
    """What optimum needs to know of :class:`~w2v_export.graph.InferenceGraph`: its axes and an example."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig

    def __init__(self, model: InferenceGraph) -> None:
        super().__init__(model.config, task="feature-extraction")
        self.example_samples = 4 * model.receptive_field
        self.head = model.head is not None

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {WAVEFORM: {0: "batch", 1: "samples"}, LENGTHS: {0: "batch"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        outputs = {
            LAST_HIDDEN_STATE: {0: "batch", 1: "frames"},
            FRAME_LENGTHS: {0: "batch"},
            EMBEDDING: {0: "batch"},
        }
        return outputs | ({LOGITS: {0: "batch"}} if self.head else {})

    def generate_dummy_inputs(self, framework: str = "pt", **shapes: int) -> dict[str, torch.Tensor]:  # noqa: ARG002
        lengths = torch.tensor([self.example_samples, self.example_samples // 2])
        return {WAVEFORM: torch.randn(2, self.example_samples), LENGTHS: lengths}


def export_graph(model: InferenceGraph, folder: Path) -> Path:
    """Write ``model.onnx`` and its external data file ``model.onnx_data`` into ``folder``; return the graph's path.

    The graph holds standard ONNX operators of operator set :data:`OPSET` only, and its batch and time axes are
    dynamic.
    """
    path = folder / GRAPH_NAME
    register_symbolics(TRACED_OPSET)
    with _quiet():
        # The dynamic-axes fix would open the graph in ONNX Runtime before its operator set is raised.
        export(model, InferenceOnnxConfig(model), path, opset=TRACED_OPSET, disable_dynamic_axes_fix=True)
    graph = onnx.load(path)
    for data in folder.glob(f"{GRAPH_NAME}?data"):
        data.unlink()
    finish(graph)
    onnx.save(
        graph,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{GRAPH_NAME}_data",
        size_threshold=EXTERNAL_BYTES,
    )
    onnx.checker.check_model(path, full_check=True)
    return path


def finish(graph: onnx.ModelProto) -> None:
    """Raise the operator set, and drop what the trace left behind: names of modules, documentation strings."""
    del graph.opset_import[:]
    graph.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    graph.ir_version = IR_VERSION
    graph.producer_name, graph.producer_version = "w2v-onnx", ""
    for node in graph.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")


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
