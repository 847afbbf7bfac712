"""float16 end to end: the form for GPUs, what the gate sees and refuses, its kernels, batches and windows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import families  # noqa: E402
from conftest import save_checkpoint, speech  # noqa: E402
from test_fused import BLOCKS, LEVELS, optimised  # noqa: E402
from w2v_export import export_bundle  # noqa: E402
from w2v_export.checkpoint import Checkpoint, load  # noqa: E402
from w2v_export.graph.encoder import PositionalConv  # noqa: E402
from w2v_export.graph.half import BlockedPositionalConv, halve, shape_for_gpu  # noqa: E402
from w2v_export.precision import fp16  # noqa: E402
from w2v_export.precision.gate import run  # noqa: E402
from w2v_export.references import reference_outputs  # noqa: E402
from w2v_export.signals import scale  # noqa: E402
from w2v_export.writer import export_graphs  # noqa: E402
from w2v_models.errors import ParityError  # noqa: E402
from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE  # noqa: E402
from w2v_models.tolerances import TOLERANCES  # noqa: E402
from w2v_runtime import Embedder  # noqa: E402
from w2v_runtime.embedding.parity import difference  # noqa: E402
from w2v_runtime.embedding.windows import Windowing  # noqa: E402

RATE = 16000
#: Operators that are no layout and no mask.
COMPUTING = ("MatMul", "Attention", "LayerNormalization", "Gelu", "Add", "Conv")
#: Families whose parts are not those of wav2vec 2.0, and one with a head.
KINDS = (
    "base",
    "large",
    "hubert-batch-norm",
    "wavlm",
    "data2vec",
    "conformer-relative",
    "conformer-rotary",
    "w2v-bert",
    "mms",
    "x-vector",
)
FRAMES = TOLERANCES["fp16"]["frames"].min_cosine


def saved(folder: Path, kind: str) -> Path:
    save = save_checkpoint if kind in ("base", "large") else families.save
    return save(folder / "checkpoint", kind)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> Any:
    """Bundles of fp32 and fp16 by kind; made once."""
    made: dict[str, Path] = {}

    def bundle(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = export_bundle(saved(folder, kind), folder / "bundle", precision=("fp32", "fp16")).folder
        return made[kind]

    return bundle


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_holds_the_tolerance_through_the_embedder(bundles, kind) -> None:
    bundle = bundles(kind)
    waveform = speech(3.1)
    exact, half = (
        Embedder(bundle, device="cpu", precision=precision).embed((waveform, RATE), level="frame").values
        for precision in ("fp32", "fp16")
    )
    assert half.dtype == np.float32
    assert FRAMES <= difference(half, exact)[2] < 1 - 1e-9  # near, and truly of another precision


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_for_gpus_computes_the_same(tmp_path, kind) -> None:
    checkpoint = load(str(saved(tmp_path, kind)))
    graph = checkpoint.graph()
    for samples in (1000, 4001, 33333):
        waveform = speech(samples / RATE)
        with torch.inference_mode():
            before = run(checkpoint.graph(), waveform)[1][0].numpy()
            if samples == 1000:
                shape_for_gpu(graph)
            after = run(graph, waveform)[1][0].numpy()
        assert difference(after, before)[0] < 2e-5


@pytest.mark.parametrize("time", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("kernel", [3, 16, 127, 128])
def test_a_blocked_convolution_is_the_convolution(kernel, time) -> None:
    embedding = torch.nn.Module()
    embedding.conv = torch.nn.Conv1d(12, 12, kernel, groups=3)
    embedding.activation = torch.nn.GELU()
    plain = PositionalConv(embedding)
    x = torch.randn(2, time, 12)
    with torch.inference_mode():
        expected = plain(x, None)
        assert expected.shape == x.shape
        torch.testing.assert_close(BlockedPositionalConv(plain)(x, None), expected, rtol=0, atol=2e-6)


def test_the_file_holds_half_the_bytes_and_standard_operators(bundles) -> None:
    folder = bundles("base") / "onnx"
    half, exact = (onnx.load(folder / f"{name}.onnx", load_external_data=False) for name in ("model_fp16", "model"))
    assert {node.domain for node in half.graph.node} == {""}
    types = {tensor.data_type for tensor in half.graph.initializer if "encoder.blocks" in tensor.name}
    assert types == {onnx.TensorProto.FLOAT16}
    for end in ("input", "output"):
        mine, theirs = ([value.type for value in getattr(proto.graph, end)] for proto in (half, exact))
        assert [t.tensor_type.elem_type for t in mine] == [t.tensor_type.elem_type for t in theirs]
    blocks = sum(np.prod(t.dims) for t in exact.graph.initializer if "encoder.blocks" in t.name)
    assert sum(np.prod(t.dims) for t in half.graph.initializer if "encoder.blocks" in t.name) == blocks
    attention = [node for node in half.graph.node if node.op_type == "Attention"]
    assert len(attention) == BLOCKS
    for node in attention:
        assert {a.name: a.i for a in node.attribute}["softmax_precision"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [  # a residual sum and the norm behind it are one kernel
        ("base", {"SkipLayerNormalization": 2 * BLOCKS, "LayerNormalization": 2, "BiasGelu": BLOCKS}),
        # Of its sums, only the last goes nowhere but into a norm; all others are the next sum's, too.
        ("large", {"SkipLayerNormalization": 1, "LayerNormalization": LEVELS + 2 + 2 * BLOCKS, "BiasGelu": BLOCKS}),
    ],
)
def test_what_onnxruntime_joins_of_the_form_for_gpus(tmp_path, kind, kernels) -> None:
    """In float32, for which the processor has all joined kernels; float16 has the same operators, and casts."""
    names: dict[str, Counter[str]] = {}
    for name in ("fp32", "fp16"):
        checkpoint = load(str(saved(tmp_path / name, kind)))
        graph = checkpoint.graph()
        shape_for_gpu(graph)
        if name == "fp16":
            halve(graph)
        (tmp_path / name / "onnx").mkdir()
        export_graphs(graph, checkpoint.architecture, checkpoint.head_entry, tmp_path / name / "onnx")
        proto = onnx.load(tmp_path / name / "onnx" / "model.onnx", load_external_data=False)
        names[name] = Counter(n.op_type for n in proto.graph.node if n.op_type in COMPUTING)
    found = optimised(tmp_path / "fp32" / "onnx" / "model.onnx")
    assert found["Attention"] == BLOCKS
    assert found["Conv"] == found["FusedConv"] == 0
    assert {name: found[name] for name in kernels} == kernels
    assert found["Expand"] == 0  # what moves the positional kernel is a constant
    assert names["fp16"] == names["fp32"]


def test_a_batch_changes_an_embedding_by_rounding_only(bundles) -> None:
    embedder = Embedder(bundles("large"), device="cpu", precision="fp16")
    waveforms = [speech(seconds) for seconds in (0.7, 2.3, 1.1)]
    names = [LAST_HIDDEN_STATE, FRAME_LENGTHS, EMBEDDING]
    frames, lengths, pooled = embedder.forward(waveforms, names, fill=np.nan)
    for i, waveform in enumerate(waveforms):
        alone, _, vector = embedder.forward([waveform], names)
        assert difference(frames[i, : lengths[i]], alone[0])[0] < 2e-2
        assert difference(pooled[i][None], vector)[0] < 5e-3


@pytest.mark.parametrize("peak", [1e-5, 100.0])
@pytest.mark.parametrize("kind", ["base", "wavlm", "w2v-bert"])
def test_loudness_costs_no_accuracy(bundles, kind, peak) -> None:
    """WavLM's samples are not normalised here, so that they reach the first convolution as small as they are."""
    waveform = scale(speech(2.0), peak)
    exact, half = (
        Embedder(bundles(kind), device="cpu", precision=precision).embed((waveform, RATE), level="frame").values
        for precision in ("fp32", "fp16")
    )
    assert np.isfinite(half).all()
    assert difference(half, exact)[2] >= FRAMES


def test_long_audio_in_windows(bundles) -> None:
    windowing = Windowing(window=2, context=0.5, whole=3)
    exact, half = (
        Embedder(bundles("base"), device="cpu", precision=precision, windowing=windowing)
        .embed((speech(9.0), RATE), level="frame")
        .values
        for precision in ("fp32", "fp16")
    )
    assert difference(half, exact)[2] >= FRAMES


def hard(folder: Path, factor: float) -> Checkpoint:
    """The tiny large model, whose last block writes ``factor`` times as much into one channel of the stream."""
    import transformers

    save_checkpoint(folder / "checkpoint", "large")
    model = transformers.Wav2Vec2Model.from_pretrained(folder / "checkpoint")
    with torch.no_grad():
        model.encoder.layers[-1].feed_forward.output_dense.bias[3] = factor
    model.save_pretrained(folder / "checkpoint")
    return load(str(folder / "checkpoint"))


def converted(checkpoint: Checkpoint) -> None:
    references = reference_outputs(checkpoint, [], lambda i, n: None)
    fp16.convert(checkpoint.graph(), references, RATE)


def test_a_large_channel_passes_as_trained_models_have_it(tmp_path) -> None:
    converted(hard(tmp_path, 2000.0))


def test_a_number_beyond_float16_is_refused(tmp_path) -> None:
    with pytest.raises(ParityError, match="on loud speech the model's numbers leave float16's range"):
        converted(hard(tmp_path, 1e5))


def test_what_loses_its_digits_is_refused(tmp_path) -> None:
    """A channel that is the same in all of a row's neighbours takes their digits, though nothing overflows."""
    checkpoint = load(str(saved(tmp_path, "base")))
    block = checkpoint.encoder.encoder.layers[0]
    with torch.no_grad():
        block.feed_forward.intermediate_dense.bias += 500.0
        block.feed_forward.output_dense.weight -= block.feed_forward.output_dense.weight.mean(1, keepdim=True)
    with pytest.raises(ParityError, match="fp16 cannot be had within its tolerance: the smallest cosines are"):
        converted(checkpoint)


def test_rounding_is_that_of_float16() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64, 3)
    with fp16.Rounded():
        product = x.half() @ weight.half()
        overflow = torch.tensor([60000.0]).half() * torch.tensor([2.0]).half()
    assert product.dtype == torch.float16
    torch.testing.assert_close(product, (x.half().float() @ weight.half().float()).half(), rtol=0, atol=0)
    assert overflow.isinf().all()


def test_all_precisions_share_a_bundle(tmp_path) -> None:
    folder = export_bundle(saved(tmp_path, "base"), tmp_path / "bundle", precision=("fp32", "int8", "fp16")).folder
    values = {
        precision: Embedder(folder, device="cpu", precision=precision).embed((speech(2.0), RATE), level="frame").values
        for precision in ("fp32", "int8", "fp16")
    }
    assert difference(values["fp16"], values["fp32"])[2] >= FRAMES
    assert TOLERANCES["int8"]["frames"].min_cosine <= difference(values["int8"], values["fp32"])[2] < FRAMES
