"""What ONNX Runtime makes of the graphs: the kernels that their operators are written for, each as often as meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import families  # noqa: E402
from conftest import save_checkpoint  # noqa: E402
from w2v_export.checkpoint import load  # noqa: E402
from w2v_export.graph.quantised import quantisable  # noqa: E402
from w2v_export.precision.int8 import install, round_product, turn_channels_last  # noqa: E402
from w2v_export.writer import export_graphs  # noqa: E402
from w2v_runtime.graphs.onnx_file import OnnxFile  # noqa: E402

#: What all checkpoints here are made of: blocks, convolutions after the first, and how many of those have kernel 3.
BLOCKS, LEVELS, KERNEL_3 = 3, 6, 4
#: Rows that are quantised: once a convolution, for the projection, and in a block for the three products that share
#: their input, the attention's output and both ends of the feed-forward.
QUANTISED = LEVELS + 1 + 4 * BLOCKS
#: Products in int8: two a convolution with kernel 3, one a convolution with kernel 2, the projection, six a block.
PRODUCTS = LEVELS + KERNEL_3 + 1 + 6 * BLOCKS


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Counter[str]]:
    """Kernels by checkpoint, precision and graph: how many of each are left after ONNX Runtime's optimisation."""
    written: dict[tuple[str, str], Path] = {}

    def write(kind: str, precision: str) -> Path:
        folder = tmp_path_factory.mktemp("fused")
        save = save_checkpoint if kind in ("base", "large") else families.save
        checkpoint = load(str(save(folder / "checkpoint", kind)))
        graph = checkpoint.graph()
        if precision == "int8":
            turn_channels_last(graph)
            install(graph, {name: round_product(product, None) for name, product in quantisable(graph).items()})
        export_graphs(graph, checkpoint.architecture, checkpoint.head_entry, folder)
        return folder

    def count(kind: str, precision: str, graph: str = "model") -> Counter[str]:
        if (kind, precision) not in written:
            written[kind, precision] = write(kind, precision)
        return optimised(written[kind, precision] / f"{graph}.onnx")

    return count


def optimised(path: Path) -> Counter[str]:
    """Operators of a graph with weights beside it, as a session on one thread runs it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # an optimised model is for this machine alone, and a warning says so
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    entries = {
        "session.model_external_initializers_file_folder_path": str(path.parent),
        "session.optimized_model_external_initializers_file_name": "optimised.data",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    file = OnnxFile.read(path)
    onnxruntime.InferenceSession(file.cut(file.outputs), options, providers=["CPUExecutionProvider"])
    proto = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(node.op_type for node in proto.graph.node)


def chosen(counts: Counter[str], names: str) -> dict[str, int]:
    return {name: counts[name] for name in names.split()}


ENCODER = "Attention BiasGelu Gelu LayerNormalization"
#: Every norm of the model and no other: one before the projection, one at the encoder's ends, two a block, and where
#: each convolution has one, those too. The activations are those of the convolutions and of the position.
EXPECTED = {
    "base": {"Attention": BLOCKS, "BiasGelu": BLOCKS, "Gelu": LEVELS + 2, "LayerNormalization": 2 + 2 * BLOCKS},
    "large": {"Attention": BLOCKS, "BiasGelu": BLOCKS, "Gelu": LEVELS + 2, "LayerNormalization": 9 + 2 * BLOCKS},
}


#: One graph, and the two of long recordings.
GRAPHS = [("model",), ("features", "encoder")]


def together(kernels: Callable[[str, str, str], Counter[str]], kind: str, precision: str, graphs: tuple[str, ...]):
    return sum((kernels(kind, precision, graph) for graph in graphs), Counter[str]())


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("kind", ["base", "large"])
def test_attention_norms_and_activations_are_one_kernel_each(kernels, kind, precision, graphs):
    """An Attention and a BiasGelu a block, a LayerNormalization for every norm, and nothing that they are made of."""
    counts = together(kernels, kind, precision, graphs)
    counts["LayerNormalization"] += counts["SkipLayerNormalization"]  # a norm that took in the sum before it
    assert chosen(counts, ENCODER) == EXPECTED[kind]
    assert chosen(counts, "Softmax Erf Pow ReduceMean FusedMatMul") | {"FusedMatMul": 0} == dict.fromkeys(
        ("Softmax", "Erf", "Pow", "ReduceMean", "FusedMatMul"), 0
    )


@pytest.mark.parametrize(("kind", "transposes"), [("base", 3), ("large", 2 + 2 * LEVELS)])
def test_fp32_turns_around_no_more_than_it_must(kernels, kind, transposes):
    """Convolutions are Conv; channels turn around them where norms want them last, and around the position."""
    assert chosen(kernels(kind, "fp32"), "Conv Transpose") == {"Conv": LEVELS + 1, "Transpose": transposes}


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("kind", ["base", "large"])
def test_every_int8_product_is_one_kernel(kernels, kind, graphs):
    """Products are joined with their scales; equal inputs are quantised once; the position alone is a Conv, turned."""
    counts = together(kernels, kind, "int8", graphs)
    joined = {"MatMulIntegerToFloat": PRODUCTS, "QuantizeLinear": QUANTISED, "Conv": 1, "Transpose": 2}
    assert chosen(counts, " ".join(joined)) == joined
    assert chosen(counts, "MatMulInteger ConvInteger DequantizeLinear DynamicQuantizeLinear") == {
        "MatMulInteger": 0,
        "ConvInteger": 0,
        "DequantizeLinear": 0,
        "DynamicQuantizeLinear": 0,
    }


@pytest.mark.parametrize("kind", ["base", "large"])
def test_int8_leaves_no_product_of_weights_in_fp32(kernels, kind):
    """Beside the first convolution and, in base, the group norm's statistics, no product is left in floats."""
    fp32, int8 = kernels(kind, "fp32"), kernels(kind, "int8")
    floats = "MatMul FusedMatMul Gemm"
    before, after = (sum(chosen(counts, floats).values()) for counts in (fp32, int8))
    assert before - after == 1 + 6 * BLOCKS
    assert after == {"base": 5, "large": 1}[kind]


def test_a_conformer_is_joined_too(kernels):
    """Ten products a block, the positions in fp32, and a depthwise convolution that stays a Conv."""
    counts = kernels("conformer-relative", "int8")
    assert chosen(counts, "MatMulIntegerToFloat MatMulInteger Attention Conv") == {
        "MatMulIntegerToFloat": LEVELS + KERNEL_3 + 1 + 10 * BLOCKS,
        "MatMulInteger": 0,
        "Attention": BLOCKS,
        "Conv": BLOCKS,
    }
    assert counts["LayerNormalization"] == LEVELS + 1 + 1 + 1 + 5 * BLOCKS
