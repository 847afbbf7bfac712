"""The encoder of data2vec against transformers, each utterance alone there and all of them in one padded batch here."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_graph_wavlm import (  # noqa: E402
    CONFIG,
    TOLERANCE,
    assert_equal_alone_and_batched,
    assert_equal_in_onnx,
    padded,
    reference,
    seeded,
    utterances,
)
from w2v_export.graph.data2vec import data2vec  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Constant folding:UserWarning")  # the exporter on its own padding

SHAPE = {key: value for key, value in CONFIG.items() if "bucket" not in key}


def tiny(kernel: int = 7, levels: int = 4):
    options = {"conv_pos_kernel_size": kernel, "num_conv_pos_embeddings": levels}
    return seeded(transformers.Data2VecAudioModel(transformers.Data2VecAudioConfig(**SHAPE | options)))


@pytest.mark.parametrize("kernel", [7, 6, 19])
@pytest.mark.parametrize("levels", [1, 5])
def test_a_padded_batch_equals_single_runs_in_every_layer(kernel, levels):
    """Layers 0 … L and the last hidden state are those of transformers on each utterance alone."""
    model = tiny(kernel, levels)
    assert_equal_alone_and_batched(model, data2vec(model))


@pytest.mark.parametrize("kernel", [7, 6])
def test_the_traced_graph_equals_single_runs(kernel):
    """ONNX Runtime gives the numbers of transformers, on other shapes than the graph was traced with."""
    model = tiny(kernel)
    assert_equal_in_onnx(model, data2vec(model))


@torch.no_grad()
def test_the_reference_lets_padding_into_its_positions():
    """Transformers' own batch differs from its single runs, so that masking each level is what makes ours equal."""
    model = tiny()
    features = utterances()
    x, lengths = padded(features)
    mask = torch.arange(x.shape[1])[None, :] < lengths[:, None]
    last = model.encoder(x.clone(), attention_mask=mask).last_hidden_state
    assert (last[0, : len(features[0])] - reference(model, features[0])[-1]).abs().max() > 100 * TOLERANCE
