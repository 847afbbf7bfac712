"""The rewrite of attention: which nodes become ONNX Runtime's own operator, with equal results, and which stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402

from w2v_runtime.graphs.flash import DOMAIN, with_flash_attention  # noqa: E402

HEADS, SIZE, TIME = 4, 32, 300


def attention(*optional: str, **attributes: int) -> bytes:
    """A model of one ``Attention`` with inputs q, k, v and the named optional ones in their places."""
    kinds = {"bias": (TensorProto.FLOAT, [1, HEADS, "t", "t"]), "lengths": (TensorProto.INT64, ["b"])}
    inputs = {name: (TensorProto.FLOAT, ["b", "t", SIZE]) for name in "qkv"}
    inputs |= {name: kinds[name] for name in optional if name}
    node = helper.make_node(
        "Attention", [*"qkv", *optional], ["y"], "one", q_num_heads=HEADS, kv_num_heads=HEADS, **attributes
    )
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "t", SIZE])]
    values = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    graph = helper.make_graph([node], "attention", values, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11).SerializeToString()


def operators(model: bytes) -> Counter:
    return Counter((node.domain, node.op_type) for node in onnx.load_from_string(model).graph.node)


def answer(model: bytes) -> np.ndarray:
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((3, TIME, SIZE), np.float32) for name in "qkv"}
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def test_attention_without_mask_is_rewritten_and_computes_the_same():
    plain = attention()
    rewritten = with_flash_attention(plain)
    onnx.checker.check_model(onnx.load_from_string(rewritten))
    assert operators(rewritten) == {(DOMAIN, "MultiHeadAttention"): 1}
    assert onnx.load_from_string(rewritten).graph.node[0].name == "one"
    np.testing.assert_allclose(answer(rewritten), answer(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optional", [("bias",), ("", "", "", "lengths"), ("bias", "", "", "lengths")])
def test_attention_with_a_bias_or_lengths_stays(optional):
    """The other operator would not be computed as flash attention, and takes lengths in another form."""
    model = attention(*optional)
    assert operators(with_flash_attention(model)) == operators(model)


def test_attributes_that_mean_something_else_keep_the_node():
    """A causal attention must not lose its mask."""
    model = attention(is_causal=1)
    assert operators(with_flash_attention(model)) == operators(model)
