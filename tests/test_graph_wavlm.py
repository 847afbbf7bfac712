"""The encoder of WavLM against transformers, each utterance alone there and all of them in one padded batch here."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from traced import opened  # noqa: E402
from w2v_export.graph.encoder import Encoder, Frames  # noqa: E402
from w2v_export.graph.tensors import register_symbolics, valid  # noqa: E402
from w2v_export.graph.wavlm import RelativePosition, wavlm  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Constant folding:UserWarning")  # the exporter on its own padding

HIDDEN = 48
LENGTHS = (37, 61, 8, 1)
TOLERANCE = 2e-5
#: Few buckets and a short reach, so that utterances of a second meet exact, logarithmic and saturated distances.
CONFIG = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": [24] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 32,
    "max_bucket_distance": 40,
}


def seeded(model, seed: int = 0):
    """Give every parameter random values: norms, biases, gates and tables as well, which start as ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("bias", "rel_attn_embed.weight")):
                parameter.copy_(0.5 * noise)
            elif "norm" in name or "original0" in name or "const" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def utterances(lengths=LENGTHS, seed: int = 1) -> list:
    """Projected features (frames, hidden) of utterances of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, HIDDEN, generator=generator) for length in lengths]


def padded(features: list) -> tuple:
    """A batch that is zero in the padding, and its lengths."""
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True), torch.tensor([len(x) for x in features])


@torch.no_grad()
def reference(model, x) -> list:
    """Layers 0 … L of one utterance alone, then ``last_hidden_state``: what hooks on the blocks see."""
    blocks, layers = model.encoder.layers, []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: layers.append(inputs[0][0].clone()))]
    hooks += [
        block.register_forward_hook(lambda _, __, outputs: layers.append(outputs[0][0].clone())) for block in blocks
    ]
    try:
        last = model.encoder(x[None].clone()).last_hidden_state[0]
    finally:
        for hook in hooks:
            hook.remove()
    return [*layers, last]


@torch.no_grad()
def batched(encoder: Encoder, features: list) -> list:
    """Layers 0 … L of one padded batch, then ``last_hidden_state``, (batch, time, hidden) each."""
    x, lengths = padded(features)
    layers, last = encoder(x, Frames(lengths, valid(lengths, x.shape[1])))
    return [*layers, last]


def assert_equal_alone_and_batched(model, encoder: Encoder) -> None:
    """Every layer of every utterance, alone in the reference and in one batch here, and padding stays finite."""
    features = utterances()
    ours = batched(encoder, features)
    assert len(ours) == len(model.encoder.layers) + 2
    assert all(layer.isfinite().all() for layer in ours)
    for row, x in enumerate(features):
        for layer, expected in zip(ours, reference(model, x), strict=True):
            assert (layer[row, : len(x)] - expected).abs().max() <= TOLERANCE


class LastHiddenState(torch.nn.Module):
    """An encoder as a graph of its own."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x, lengths):
        return self.encoder(x, Frames(lengths, valid(lengths, x.shape[1])))[1]


def traced(encoder: Encoder, opset: int = 20) -> onnxruntime.InferenceSession:
    """An encoder through the TorchScript exporter, traced with two utterances of 12 and 7 frames."""
    register_symbolics(opset)
    axes = {"x": {0: "batch", 1: "frames"}, "lengths": {0: "batch"}, "last": {0: "batch", 1: "frames"}}
    file = io.BytesIO()
    torch.onnx.export(
        LastHiddenState(encoder).eval(),
        padded(utterances((12, 7))),
        file,
        input_names=["x", "lengths"],
        output_names=["last"],
        dynamic_axes=axes,
        opset_version=opset,
        dynamo=False,
    )
    return opened(onnx.load_from_string(file.getvalue()))


def assert_equal_in_onnx(model, encoder: Encoder) -> None:
    """A traced encoder equals the reference on batches of other sizes than it was traced with."""
    session = traced(encoder)
    for lengths in (LENGTHS, (1,), (90,), (3, 50, 49)):
        features = utterances(lengths)
        x, sizes = padded(features)
        (last,) = session.run(None, {"x": x.numpy(), "lengths": sizes.numpy()})
        assert last.shape == x.shape
        assert np.isfinite(last).all()
        for row, feature in enumerate(features):
            expected = reference(model, feature)[-1].numpy()
            assert np.abs(last[row, : len(feature)] - expected).max() <= TOLERANCE


def tiny(stable: bool, **options):
    return seeded(transformers.WavLMModel(transformers.WavLMConfig(**CONFIG | options, do_stable_layer_norm=stable)))


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("kernel", [16, 15])
def test_a_padded_batch_equals_single_runs_in_every_layer(stable, kernel):
    """Layers 0 … L and the last hidden state are those of transformers on each utterance alone."""
    model = tiny(stable, num_conv_pos_embeddings=kernel)
    assert_equal_alone_and_batched(model, wavlm(model))


@pytest.mark.parametrize("stable", [False, True])
def test_the_traced_graph_equals_single_runs(stable):
    """ONNX Runtime gives the numbers of transformers, on other shapes than the graph was traced with."""
    model = tiny(stable)
    assert_equal_in_onnx(model, wavlm(model))


@pytest.mark.parametrize(("buckets", "furthest"), [(320, 800), (32, 40), (64, 1000)])
def test_every_distance_falls_into_the_bucket_of_the_reference(buckets, furthest):
    """The table, constant beyond the furthest distance, holds the reference's bucket of all distances up to 20000."""
    model = tiny(False, num_buckets=buckets, max_bucket_distance=furthest, num_hidden_layers=1)
    attention = model.encoder.layers[0].attention
    with torch.no_grad():  # embeds each bucket as its own number
        attention.rel_attn_embed.weight.copy_(torch.arange(float(buckets))[:, None].expand(-1, 4))
    position = RelativePosition(attention)
    distances = torch.arange(-20000, 20001)
    ours = position.table[:, distances.clamp(-furthest, furthest) + furthest]
    assert torch.equal(ours[0].long(), attention._relative_positions_bucket(distances))
    frames = torch.zeros(2, 200, HIDDEN)
    assert torch.equal(position(frames, Frames(torch.tensor([200, 200])))[0], attention.compute_bias(200, 200))


def test_the_position_bias_is_made_once_for_all_blocks():
    """A graph of three blocks gathers positions once and repeats nothing but the gate."""
    encoder = wavlm(tiny(False))
    calls = []
    encoder.shared.register_forward_hook(lambda *_: calls.append(1))
    batched(encoder, utterances())
    assert calls == [1]
    tables = [name for name, _ in encoder.named_parameters() if name.endswith("table")]
    assert tables == ["shared.table"]


def test_a_longer_neighbour_changes_nothing():
    """The frames of an utterance are the same however much padding its batch gives it, to float rounding."""
    encoder = wavlm(tiny(True))
    short, long, longer = utterances((20, 60, 200))
    runs = [batched(encoder, batch)[-1][0, :20] for batch in ([short], [short, long], [short, longer])]
    for one, other in pairwise(runs):
        assert (one - other).abs().max() <= TOLERANCE
