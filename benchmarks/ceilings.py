"""How much arithmetic a forward pass is, and how fast this machine's engines multiply matrices of its shapes.

A ceiling is the model's own matrix products and nothing else: no norm, no softmax, no copy. What an engine reaches
there is the most that a forward pass in its precision can reach.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from w2v_models.manifest import Architecture

#: The positional convolution of every wav2vec 2.0 checkpoint of the catalogue.
POSITIONAL_KERNEL, POSITIONAL_GROUPS = 128, 16
REPEATS = 2

#: (m, k, n): rows, what is summed over, columns.
Shape = tuple[int, int, int]


def conv_lengths(architecture: Architecture, samples: int) -> list[int]:
    """Frames after each convolution."""
    lengths, length = [], samples
    for kernel, stride in zip(architecture.conv.kernels, architecture.conv.strides, strict=True):
        length = (length - kernel) // stride + 1
        lengths.append(length)
    return lengths


def products(architecture: Architecture, samples: int) -> Counter[Shape]:
    """The matrix products of one utterance, with how often each occurs.

    Convolutions but the first as products over frames, the projection into the encoder, and in each block four of the
    attention and two of the feed-forward network.
    """
    conv, hidden, wide = architecture.conv, architecture.hidden_size, architecture.intermediate_size
    lengths = conv_lengths(architecture, samples)
    frames, found = lengths[-1], Counter[Shape]()
    for i in range(1, len(conv.channels)):
        found[lengths[i], conv.kernels[i] * conv.channels[i - 1], conv.channels[i]] += 1
    found[frames, conv.channels[-1], hidden] += 1
    found[frames, hidden, hidden] += 4 * architecture.layers
    found[frames, hidden, wide] += architecture.layers
    found[frames, wide, hidden] += architecture.layers
    return found


def arithmetic(architecture: Architecture, samples: int) -> dict[str, int]:
    """Additions and multiplications of a forward pass over one utterance, by part.

    ``front end`` and ``linear`` are Σ 2·m·k·n of :func:`products`. With T frames, T₀ after the first convolution
    (kernel k₀, c₀ channels), hidden size D, L layers and a positional convolution of kernel K in G groups, ``first
    convolution`` is 2·T₀·k₀·c₀, ``positional convolution`` 2·T·K·D²/G, and ``attention`` L·4·T²·D (scores and weighted
    values). Norms, softmax and GELU are not counted.
    """
    conv, hidden = architecture.conv, architecture.hidden_size
    first, *others = conv_lengths(architecture, samples)
    kernels_and_channels = zip(others, conv.kernels[1:], conv.channels, conv.channels[1:], strict=False)
    front_end = sum(2 * length * kernel * before * after for length, kernel, before, after in kernels_and_channels)
    every = sum(2 * m * k * n * count for (m, k, n), count in products(architecture, samples).items())
    return {
        "front end": front_end,
        "linear": every - front_end,
        "first convolution": 2 * first * conv.kernels[0] * conv.channels[0],
        "positional convolution": 2 * others[-1] * POSITIONAL_KERNEL * hidden * hidden // POSITIONAL_GROUPS,
        "attention": architecture.layers * 4 * others[-1] * others[-1] * hidden,
    }


#: Multiplies once.
Product = Callable[[], Any]


def torch_product(shape: Shape, threads: int, precision: str, device: str = "cpu") -> Product:
    """PyTorch's, into a tensor that is there already."""
    import torch

    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    m, k, n = shape
    x, w = torch.randn(m, k).to(device, dtype), torch.randn(k, n).to(device, dtype)
    y = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.matmul(x, w, out=y)


def onnxruntime_product(shape: Shape, threads: int, precision: str) -> Product:
    """ONNX Runtime's, from and to memory that is there already."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it would slow the next shape's session
    session = onnxruntime.InferenceSession(_graph(shape, precision), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.random.default_rng(0).standard_normal(shape[:2], np.float32))
    output = np.zeros((shape[0], shape[2]), np.float32)
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(output))
    return lambda: session.run_with_iobinding(binding)


def openvino_product(shape: Shape, threads: int, precision: str) -> Product:
    """OpenVINO's, compiled for the shape."""
    import openvino

    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    core = openvino.Core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("this processor has no bf16")
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(_graph(shape, "fp32")), "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(np.random.default_rng(0).standard_normal(shape[:2], np.float32)))
    return lambda: request.infer()


def _graph(shape: Shape, precision: str) -> bytes:
    """The product x · w; in int8 with x quantised on the way, as ONNX Runtime joins it to one kernel."""
    from onnx import numpy_helper, parser

    m, k, n = shape
    weight = np.random.default_rng(1).standard_normal((k, n), dtype=np.float32)
    constants, nodes = {"w": weight}, "y = MatMul(x, w)"
    if precision == "int8":
        scale = np.abs(weight).max(axis=0) / 127
        constants = {"w": np.round(weight / scale).astype(np.int8), "w_scale": scale}
        nodes = """
            q, x_scale, zero = DynamicQuantizeLinear(x)
            sum = MatMulInteger(q, w, zero)
            float_sum = Cast<to = 1>(sum)
            scale = Mul(x_scale, w_scale)
            y = Mul(float_sum, scale)
        """
    signature = f"product (float[{m}, {k}] x) => (float[{m}, {n}] y)"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {signature} {{ {nodes} }}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    text: bytes = model.SerializeToString()
    return text


#: Engines by name: the precision, and what makes a product in it.
CEILINGS = {
    "PyTorch fp32": ("fp32", torch_product),
    "ONNX Runtime fp32": ("fp32", onnxruntime_product),
    "OpenVINO fp32": ("fp32", openvino_product),
    "PyTorch bf16": ("bf16", torch_product),
    "OpenVINO bf16": ("bf16", openvino_product),
    "ONNX Runtime int8": ("int8", onnxruntime_product),
}


class Ceiling:
    """The matrix products of an architecture on one of :data:`CEILINGS`, which takes turns beside the peers."""

    def __init__(self, name: str, architecture: Architecture, threads: int) -> None:
        self._precision, self._product = CEILINGS[name]
        self._architecture, self._threads = architecture, threads
        self._ready: dict[Shape, Product] = {}

    def seconds(self, audio: Sequence[npt.NDArray[np.float32]], level: str) -> float:  # noqa: ARG002
        """Seconds of all products of one utterance: each shape timed alone, the better of two, and weighted."""
        (waveform,) = audio
        counts = products(self._architecture, len(waveform))
        return sum(count * self._seconds(shape) for shape, count in counts.items())

    def _seconds(self, shape: Shape) -> float:
        if shape not in self._ready:
            self._ready[shape] = self._product(shape, self._threads, self._precision)
            self._ready[shape]()
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            self._ready[shape]()
            times.append(time.perf_counter() - start)
        return min(times)
