"""Matrix products in int8, in PyTorch and in ONNX Runtime, against plain arithmetic."""

from __future__ import annotations

import io
import math

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

import families  # noqa: E402
from w2v_export.checkpoint import load  # noqa: E402
from w2v_export.graph import tensors  # noqa: E402
from w2v_export.graph.quantised import (  # noqa: E402
    QuantisedConv,
    QuantisedDense,
    quantisable,
    quantise_rows,
    register_symbolics,
)
from w2v_export.graph.tensors import Dense  # noqa: E402
from w2v_export.graph.waveform import StridedConv  # noqa: E402
from w2v_export.writer import TRACED_OPSET, raise_opset  # noqa: E402
from w2v_runtime.engines.saturation import saturates  # noqa: E402

BATCH, ROWS, INPUTS, OUTPUTS = 2, 12, 24, 10
CONVOLUTIONS = [(2, 2), (3, 2), (5, 2)]
#: Of the sum of magnitudes: what float32 leaves of a product that int8 holds without loss.
ROUNDING = 1e-6


def bytes_of(*shape: int, seed: int) -> np.ndarray:
    """Integers that 8 bits hold: -127 … 127, with the largest magnitude in every row of the last axis."""
    random = np.random.default_rng(seed)
    values = random.integers(-126, 127, shape)
    np.put_along_axis(values, random.integers(shape[-1], size=(*shape[:-1], 1)), 127, axis=-1)
    return values.astype(np.float64)


def powers(*shape: int, seed: int) -> np.ndarray:
    """Powers of two from 2^-10 to 2^10, which scale without loss."""
    return 2.0 ** np.random.default_rng(seed).integers(-10, 11, shape)


def dense(weight: np.ndarray, bias: bool = False, smoothing: np.ndarray | None = None) -> QuantisedDense:
    values = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(9)) if bias else None
    factors = None if smoothing is None else torch.from_numpy(smoothing).float()
    return QuantisedDense(Dense(torch.from_numpy(weight).float(), values), factors).eval()


def strided(weight: np.ndarray, stride: int, bias: bool = False) -> QuantisedConv:
    """From (channels out, channels in, kernel)."""
    outputs, inputs, kernel = weight.shape
    conv = nn.Conv1d(inputs, outputs, kernel, stride, bias=bias)
    conv.weight = nn.Parameter(torch.from_numpy(weight).float())
    return QuantisedConv(conv).eval()


def both(module: nn.Module, x: np.ndarray) -> list[np.ndarray]:
    """A module's answer in PyTorch, and in ONNX Runtime after an export with another shape."""
    values = torch.from_numpy(x).float()
    tensors.register_symbolics(TRACED_OPSET)
    register_symbolics(TRACED_OPSET)
    file = io.BytesIO()
    axes = {"x": {0: "batch", 1: "rows"}, "y": {0: "batch", 1: "frames"}}
    example = (torch.randn(3, 20, x.shape[2]),)
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
    torch.onnx.export(module, example, file, **names, opset_version=TRACED_OPSET, dynamo=False)
    proto = onnx.load_from_string(file.getvalue())
    raise_opset(proto)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1" if saturates() else "0")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        return [module(values).numpy(), session.run(None, {"x": values.numpy()})[0]]


def assert_exact(answers: list[np.ndarray], expected: np.ndarray, magnitudes: np.ndarray) -> None:
    for answer in answers:
        assert answer.shape == expected.shape
        assert (np.abs(answer - expected) <= ROUNDING * magnitudes).all()


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_layer_of_bytes_is_exact(bias):
    """What 8 bits hold, times a power of two for each row and column, is multiplied without loss, and biased after."""
    x = bytes_of(BATCH, ROWS, INPUTS, seed=0) * powers(BATCH, ROWS, 1, seed=1)
    weight = bytes_of(OUTPUTS, INPUTS, seed=2).T * powers(1, OUTPUTS, seed=3)
    module = dense(weight, bias)
    added = module.bias.detach().numpy().astype(np.float64) if bias else np.zeros(OUTPUTS)
    assert_exact(both(module, x), x @ weight + added, np.abs(x) @ np.abs(weight) + np.abs(added))


def test_smoothing_moves_what_sticks_out_into_the_weights():
    """Channels of magnitudes 2^-10 … 2^10 against weights of their inverse: exact with smoothing, and lost without."""
    factors = powers(INPUTS, seed=4)
    x = bytes_of(BATCH, ROWS, INPUTS, seed=0) * factors
    weight = bytes_of(OUTPUTS, INPUTS, seed=2).T / factors[:, None]
    expected, magnitudes = x @ weight, np.abs(x) @ np.abs(weight)
    assert_exact(both(dense(weight, smoothing=factors), x), expected, magnitudes)
    for answer in both(dense(weight), x):
        assert np.abs(answer - expected).max() > 0.1 * magnitudes.max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), CONVOLUTIONS)
def test_a_convolution_of_bytes_is_exact(kernel, stride, bias):
    """The same for a strided convolution: a row is a block of one stride, and each part of its kernel has a scale."""
    channels, parts = 6, math.ceil(kernel / stride)
    blocks = bytes_of(BATCH, ROWS, stride * channels, seed=0)
    taps = [min(stride, kernel - part * stride) for part in range(parts)]
    if parts > 1:  # a part that sees less than a block still finds it scaled by the whole block
        blocks[..., 0] = 127
    x = (blocks * powers(BATCH, ROWS, 1, seed=1)).reshape(BATCH, ROWS * stride, channels)
    weights = [
        bytes_of(OUTPUTS, count * channels, seed=10 + part).reshape(OUTPUTS, count, channels).transpose(0, 2, 1)
        * powers(OUTPUTS, 1, 1, seed=20 + part)
        for part, count in enumerate(taps)
    ]
    weight = np.concatenate(weights, axis=2)
    module = strided(weight, stride, bias)
    added = module.bias.detach().numpy().astype(np.float64) if bias else np.zeros(OUTPUTS)

    def convolved(of: np.ndarray, by: np.ndarray) -> np.ndarray:
        answer = F.conv1d(torch.from_numpy(of).transpose(1, 2), torch.from_numpy(by), stride=stride)
        return answer.transpose(1, 2).numpy()[:, : ROWS - parts + 1]

    magnitudes = convolved(np.abs(x), np.abs(weight)) + np.abs(added)
    assert_exact(both(module, x), convolved(x, weight) + added, magnitudes)


def in_eight_bits(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of the rows of a float32 matrix, (n, k) and (n, 1)."""
    scale = np.abs(rows).max(-1, keepdims=True) * np.float32(1 / 127)
    return np.rint(rows / scale).astype(np.int64), scale


def product(x: np.ndarray, weight: np.ndarray, seen: int | None = None) -> np.ndarray:
    """(n, k) times (m, k) in 8 bits; of the rows, the first ``seen`` numbers are multiplied."""
    rows, row_scale = in_eight_bits(x)
    columns, column_scale = in_eight_bits(weight)
    return (rows[:, :seen] @ columns.T) * row_scale.astype(np.float64) * column_scale.T


def test_a_dense_layer_rounds_rows_and_columns():
    """Any numbers: round to nearest, one scale a row and one a column, integers summed; near the exact product."""
    random = np.random.default_rng(0)
    x = random.standard_normal((BATCH, ROWS, INPUTS)).astype(np.float32)
    weight = random.standard_normal((OUTPUTS, INPUTS)).astype(np.float32)
    expected = np.stack([product(rows, weight) for rows in x])
    assert_exact(both(dense(weight.T), x), expected, np.full_like(expected, np.abs(expected).max()))
    error = np.linalg.norm(expected - x @ weight.T) / np.linalg.norm(x @ weight.T)
    assert 1e-3 < error < 2e-2


@pytest.mark.parametrize(("kernel", "stride"), CONVOLUTIONS)
def test_a_convolution_rounds_blocks_of_one_stride(kernel, stride):
    """Any numbers: every part of the kernel multiplies the block it stands over, in that block's scale."""
    channels, random = 6, np.random.default_rng(0)
    x = random.standard_normal((BATCH, ROWS * stride, channels)).astype(np.float32)
    weight = random.standard_normal((OUTPUTS, channels, kernel)).astype(np.float32)
    parts = np.split(weight.transpose(0, 2, 1), range(stride, kernel, stride), axis=1)
    frames = ROWS - len(parts) + 1
    rows = x.reshape(BATCH, ROWS, stride * channels)
    expected = np.zeros((BATCH, frames, OUTPUTS))
    for shift, part in enumerate(parts):
        flat = part.reshape(OUTPUTS, -1)
        expected += np.stack([product(row[shift : shift + frames], flat, flat.shape[1]) for row in rows])
    answers = both(strided(weight, stride), x)
    assert_exact(answers, expected, np.full_like(expected, np.abs(expected).max()))


def test_a_row_depends_on_nothing_but_itself():
    """Beside rows a million times louder, of zeros and of NaN, a row's result is the same to the last bit."""
    random = np.random.default_rng(0)
    weight, row = random.standard_normal((INPUTS, OUTPUTS)), random.standard_normal((1, 1, INPUTS))
    beside = np.concatenate([1e6 * row + 3, np.zeros_like(row), row, np.full_like(row, np.nan), -1e-6 * row], axis=1)
    module = dense(weight, bias=True)
    for alone, among in zip(both(module, row), both(module, beside), strict=True):
        assert np.array_equal(among[:, 2], alone[:, 0])
        assert np.array_equal(among[0, 1], module.bias.detach().numpy())


def test_rows_use_the_whole_range():
    """The largest magnitude of a row becomes 1 or 255 around the zero point 128, however small or large it is."""
    x = torch.tensor([[[1.0, -0.5, 0.0], [-3e-20, 1e-20, 0.0], [2e20, 1e18, 0.0], [0.0, 0.0, 0.0]]])
    rows, scale = quantise_rows(x, 3)
    assert rows.tolist() == [[[255, 64, 128], [1, 170, 128], [255, 129, 128], [128, 128, 128]]]
    assert scale.shape == (1, 4, 1)
    assert torch.allclose(scale[0, :3, 0] * 127, x[0, :3].abs().amax(1), rtol=1e-6)


TRANSFORMER = [f"attention.{part}" for part in ("query", "key", "value", "output")]
TRANSFORMER += ["feed_forward.expand", "feed_forward.contract"]
WAVLM = [part.replace("attention.", "attention.attend.") for part in TRANSFORMER]
CONFORMER = ["first.expand", "first.contract", *TRANSFORMER[:4], "convolution.expand", "convolution.contract"]
CONFORMER += ["second.expand", "second.contract"]


@pytest.mark.parametrize(
    ("name", "levels", "parts", "beside"),
    [
        ("unispeech-sat", 6, TRANSFORMER, []),
        ("wavlm", 6, WAVLM, ["attention.gate.project"]),
        ("mms", 6, TRANSFORMER, ["adapter.contract", "adapter.expand"]),
        ("conformer-relative", 6, CONFORMER, ["attention.position"]),
        ("w2v-bert", 0, CONFORMER, ["attention.distances"]),
    ],
)
def test_the_products_of_frames_are_found(tmp_path, name, levels, parts, beside):
    """All strided convolutions, the projection and the dense layers of each block, but for small ones and positions."""
    graph = load(str(families.save(tmp_path / name, name))).graph()
    found = quantisable(graph)
    assert list(found) == [
        *(f"front_end.conv_layers.{level}.conv" for level in range(1, levels + 1)),
        "projection.dense",
        *(f"encoder.blocks.{block}.{part}" for block in range(3) for part in parts),
    ]
    every = {key for key, module in graph.named_modules() if isinstance(module, Dense | StridedConv)}
    assert every - set(found) == {f"encoder.blocks.{block}.{part}" for block in range(3) for part in beside}
    assert all(graph.get_submodule(key) is module for key, module in found.items())
