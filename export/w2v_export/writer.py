"""Write the graphs as ONNX files that share one file of weights, with PyTorch's TorchScript exporter.

The exporter never holds the weights: it traces graphs that take their weights as inputs, and these inputs become
references into one external data file, which is written tensor by tensor. So a model may be larger than a protobuf's
2 GB, and each further graph adds only its nodes.

Only :func:`_trace` calls the exporter, which is PyTorch's legacy one. ``torch.onnx.export(dynamo=True)`` in its place
would need: our operators (``graph.tensors``, ``graph.quantised``) as ``torch.library`` operators with an entry in its
``custom_translation_table``, not as symbolics; ``dynamic_shapes`` for ``dynamic_axes``; onnxscript; and the names of
nodes and weights by which the runtime cuts graphs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
import torch
from onnx.external_data_helper import set_external_data

from w2v_export.graph import quantised, tensors
from w2v_export.graph.inference import EncoderGraph, FeatureGraph, HeadGraph, InferenceGraph, MelGraph
from w2v_export.graph.logmel import LogMelFrontEnd
from w2v_models.manifest import (
    FEATURES,
    LAYER_WEIGHTS,
    LENGTHS,
    MOMENTS,
    POOLED,
    WAVEFORM,
    Architecture,
    Head,
    frames_output,
    public_outputs,
)
from w2v_runtime.graphs.onnx_file import OnnxFile

#: The newest operator set that the TorchScript exporter writes.
TRACED_OPSET: Final = 20
#: The first operator set whose ``Attention`` has ``nonpad_kv_seqlen``. The other operators used are the same in both.
OPSET: Final = 24
#: The IR version that came with that operator set.
IR_VERSION: Final = 11
#: Tensors of at least this many bytes go to the external data file; axes and scalars stay in the graph.
EXTERNAL_BYTES: Final = 1024
#: The node that adds the position embedding to the projected features, in encoders that have one.
_ENTRY_SUM: Final = "/encoder/entry/Add"
#: The alignment in bytes of tensors in the external data file, so that engines can memory-map them.
ALIGNMENT: Final = 4096

GRAPH: Final = "model"
LAYERS: Final = "layers"
ENCODER: Final = "encoder"
HEAD: Final = "head"
MEL: Final = "mel"

_BATCH: Final = {0: "batch"}


def _axes(name: str, values: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """The dynamic axes of one of a graph's inputs and outputs: the batch, and time if it has one.

    Frames that are not as many as layer 0 has, behind an adapter or in a head, have an axis of their own.
    """
    if name == LAYER_WEIGHTS:
        return {}
    if name == WAVEFORM:
        return _BATCH | {1: "samples"}
    if values[name].ndim < 3:
        return _BATCH
    own = frames_output("0") in values and values[name].shape[1] != values[frames_output("0")].shape[1]
    return _BATCH | {1: f"{name}_frames" if own else "frames"}


@dataclass(frozen=True)
class Graphs:
    """The files of one precision; ``head`` and ``mel`` are None if the model has no such graph."""

    graph: Path
    layers: Path
    features: Path
    encoder: Path
    head: Path | None
    mel: Path | None
    data: Path


def export_graphs(
    model: InferenceGraph, architecture: Architecture, head: Head | None, folder: Path, suffix: str = ""
) -> Graphs:
    """Write the graphs of ``model`` and their shared weights into ``folder``; file names are ``<graph><suffix>.onnx``.

    The graphs hold standard ONNX operators of operator set :data:`OPSET` only, and their axes are dynamic.
    """
    samples = 4 * architecture.conv.receptive_field + (head.shortest if head else 0) * architecture.conv.stride
    whole = {WAVEFORM: torch.randn(2, samples), LENGTHS: torch.tensor([samples, samples - 1])}
    weights = {LAYER_WEIGHTS: torch.rand(architecture.layers + 1)}
    moments = {MOMENTS: torch.rand(2, model.front_end.moments_size) + 0.5}
    features = torch.randn(2, architecture.conv.num_frames(samples), architecture.hidden_size)
    protos = {
        LAYERS: _trace(model, whole | weights, folder),
        FEATURES: _trace(FeatureGraph(model), whole | moments, folder),
        ENCODER: _trace(EncoderGraph(model), {FEATURES: features} | weights, folder),
    }
    if model.head is not None and head is not None and head.level == "utterance":
        states = list(torch.rand(architecture.layers + 1, 2, head.shortest, architecture.hidden_size))
        channels = model.head.frames(states, states[-1]).shape[-1]
        pooled = torch.rand(2, len(head.pooling) * channels)
        protos[HEAD] = _trace(HeadGraph(model.head), {POOLED: pooled}, folder)
    if isinstance(model.front_end, LogMelFrontEnd):
        protos[MEL] = _trace(MelGraph(model.front_end), {WAVEFORM: whole[WAVEFORM]}, folder)
    if model.names_axes:
        for name in (LAYERS, ENCODER):
            _name_axes(protos[name], architecture.hidden_size)
    paths = {name: folder / f"{name}{suffix}.onnx" for name in (GRAPH, *protos)}
    data = folder / f"{paths[GRAPH].name}_data"
    places = _write_weights(model, protos.values(), data)
    for name, proto in protos.items():
        _refer(proto, model, data.name, places)
        onnx.save(proto, paths[name])
    public = OnnxFile.read(paths[LAYERS]).cut(public_outputs(head))
    paths[GRAPH].write_bytes(public)
    for name, path in paths.items():
        onnx.checker.check_model(path, full_check=name != LAYERS)
    long = paths[FEATURES], paths[ENCODER]
    return Graphs(paths[GRAPH], paths[LAYERS], *long, paths.get(HEAD), paths.get(MEL), data)


def _trace(model: torch.nn.Module, inputs: dict[str, torch.Tensor], folder: Path) -> onnx.ModelProto:
    """Trace a module and raise the graph to :data:`OPSET`; the weights are still inputs."""
    tensors.register_symbolics(TRACED_OPSET)
    quantised.register_symbolics(TRACED_OPSET)
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    path = folder / "traced.onnx"
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            model,
            (inputs,),  # a mapping at the end holds arguments by name
            path,
            export_params=False,
            opset_version=TRACED_OPSET,
            do_constant_folding=False,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={name: _axes(name, inputs | outputs) for name in inputs | outputs},
            dynamo=False,
        )
    proto = onnx.load(path)
    path.unlink()
    raise_opset(proto)
    _declare(proto, outputs)
    proto.producer_name, proto.producer_version = "w2v-onnx", ""
    for node in proto.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    return proto


def _declare(proto: onnx.ModelProto, outputs: dict[str, torch.Tensor]) -> None:
    """Declare the outputs' shapes, of which the exporter loses some sizes behind operators that it does not know."""
    for value in proto.graph.output:
        axes, shape = _axes(value.name, outputs), outputs[value.name].shape
        kind = value.type.tensor_type.elem_type
        named = [axes.get(axis, size) for axis, size in enumerate(shape)]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, named))


def raise_opset(proto: onnx.ModelProto) -> None:
    """Declare a traced graph to be of operator set :data:`OPSET`, which its ``Attention`` needs."""
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    proto.ir_version = IR_VERSION


def _name_axes(proto: onnx.ModelProto, hidden_size: int) -> None:
    """Declare the shape of the encoder's first sum, (batch, frames, hidden).

    ONNX Runtime infers the following shapes from it. It fuses a sum with a norm only if the two shapes are known equal.
    """
    half = any(tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.input)
    number = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    for node in proto.graph.node:
        if node.name == _ENTRY_SUM:
            value = onnx.helper.make_tensor_value_info(node.output[0], number, ["batch", "frames", hidden_size])
            proto.graph.value_info.append(value)


def _inputs_of_nodes(proto: onnx.ModelProto) -> set[str]:
    return {name for node in proto.graph.node for name in node.input}


def _write_weights(model: torch.nn.Module, protos: Iterable[onnx.ModelProto], path: Path) -> dict[str, tuple[int, int]]:
    """Write all large weights that a graph uses to one file; return each one's offset and length in bytes by name."""
    used = set[str]().union(*(_inputs_of_nodes(proto) for proto in protos))
    places: dict[str, tuple[int, int]] = {}
    with path.open("wb") as file:
        for name, tensor in model.state_dict().items():
            if name in used and tensor.nbytes >= EXTERNAL_BYTES:
                file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
                places[name] = file.tell(), tensor.nbytes
                file.write(tensor.contiguous().numpy().data)  # numpy's tofile hides the reason of a disk error
    return places


def _refer(proto: onnx.ModelProto, model: torch.nn.Module, data: str, places: dict[str, tuple[int, int]]) -> None:
    """Turn a graph's weights from inputs into initializers: large ones in the common file, small ones in the graph."""
    weights, used = model.state_dict(), _inputs_of_nodes(proto)
    inputs = [value for value in proto.graph.input if value.name not in weights]
    named = [value.name for value in proto.graph.input if value.name in weights and value.name in used]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    for name in named:
        array = weights[name].contiguous().numpy()
        tensor = onnx.TensorProto(
            name=name, dims=array.shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        )
        if name in places:
            tensor.raw_data = b""  # the next call requires the field to be present
            set_external_data(tensor, data, *places[name])
            tensor.ClearField("raw_data")
        else:
            tensor.raw_data = array.tobytes()
        proto.graph.initializer.append(tensor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about tracing and deprecation, which the user cannot act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
