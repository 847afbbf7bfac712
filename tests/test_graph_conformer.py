"""The Conformer encoders against transformers, each utterance alone there and all in one padded batch here."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import onnx  # noqa: E402

from traced import opened  # noqa: E402
from w2v_export.graph.conformer import DistanceIndex, SinusoidalPositions, bert, conformer, shift  # noqa: E402
from w2v_export.graph.encoder import Frames  # noqa: E402
from w2v_export.graph.tensors import register_symbolics, valid  # noqa: E402

HIDDEN = 48
LENGTHS = (37, 61, 8, 1)
TINY = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "conv_depthwise_kernel_size": 7,
    "conv_dim": [16],
    "conv_kernel": [10],
    "conv_stride": [5],
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "left_max_position_embeddings": 9,
    "right_max_position_embeddings": 3,
    "max_source_positions": 50,  # the reference grows its table beyond it
}
CASES = [("conformer", kind) for kind in ("relative", "rotary", None)]
CASES += [("bert", kind) for kind in ("relative_key", "relative", "rotary", None)]
BUILDERS = {"conformer": conformer, "bert": bert}


def model_of(family: str, kind: str | None, seed: int = 0):
    """A tiny model whose parameters and statistics are all random: many start at zero or one, and hide mistakes."""
    torch.manual_seed(seed)
    name = {"conformer": "Wav2Vec2Conformer", "bert": "Wav2Vec2Bert"}[family]
    config = getattr(transformers, f"{name}Config")(**TINY, position_embeddings_type=kind)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1 or "pos_bias" in name or "distance_embedding" in name:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5)
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(0, 0.5)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 2)
    return model


def batch_of(lengths=LENGTHS, seed: int = 1):
    """Projected features of utterances, and the batch of them with zeros in the padding."""
    generator = torch.Generator().manual_seed(seed)
    utterances = [torch.randn(1, length, HIDDEN, generator=generator) for length in lengths]
    padded = torch.nn.utils.rnn.pad_sequence([utterance[0] for utterance in utterances], batch_first=True)
    return utterances, padded, torch.tensor(lengths)


@torch.inference_mode()
def reference(model, x):
    """The layers by hooks on the blocks, and the last hidden state, of one utterance alone."""
    layers = []
    blocks = model.encoder.layers
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: layers.append(inputs[0].clone()))]
    hooks += [block.register_forward_hook(lambda _, __, output: layers.append(output[0].clone())) for block in blocks]
    last = model.encoder(x.clone()).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*layers, last]


@torch.inference_mode()
def encode(encoder, x, lengths):
    layers, last = encoder(x, Frames(lengths, valid(lengths, x.shape[1])))
    return [*layers, last]


def assert_as_alone(model, utterances, outputs):
    for row, utterance in enumerate(utterances):
        expected = reference(model, utterance)
        assert len(outputs) == len(expected)
        for output, value in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output[row, : utterance.shape[1]], value[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_layer_is_that_of_the_utterance_alone(family, kind):
    """All layers and the last hidden state of a padded batch are the reference's, with finite padding."""
    model = model_of(family, kind)
    utterances, x, lengths = batch_of()
    outputs = encode(BUILDERS[family](model), x, lengths)
    assert all(output.isfinite().all() for output in outputs)
    assert_as_alone(model, utterances, outputs)


class LastHiddenState(torch.nn.Module):
    """The encoder with the inputs of a graph."""

    def __init__(self, encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x, lengths):
        return self.encoder(x, Frames(lengths, valid(lengths, x.shape[1])))[1]


def session_of(module, inputs, axes, path):
    """Trace a module as the exporter does, and open it."""
    register_symbolics(20)
    torch.onnx.export(
        module.eval(),
        inputs,
        path,
        dynamo=False,
        opset_version=20,
        input_names=list(axes),
        output_names=["last"],
        dynamic_axes=axes,
    )
    return opened(onnx.load(path))


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_graph_in_onnx_runtime_is_the_reference_at_any_shape(family, kind, tmp_path):
    """One trace gives the reference's last hidden state for other batches and times, one frame included."""
    model = model_of(family, kind)
    _, x, lengths = batch_of((19, 12))
    axes = {"x": {0: "batch", 1: "time"}, "lengths": {0: "batch"}}
    session = session_of(LastHiddenState(BUILDERS[family](model)), (x, lengths), axes, tmp_path / "encoder.onnx")
    for shape in (LENGTHS, (23,), (1,), (120, 119, 2)):
        utterances, x, lengths = batch_of(shape)
        (last,) = session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
        for row, utterance in enumerate(utterances):
            expected = reference(model, utterance)[-1]
            torch.testing.assert_close(
                torch.from_numpy(last[row, : utterance.shape[1]]), expected[0], rtol=0, atol=2e-5
            )


@pytest.mark.filterwarnings("ignore")
def test_sinusoids_of_a_minute_are_the_reference_s(tmp_path):
    """At 3000 frames ONNX Runtime's sines and cosines are those of the reference's table, to float32 rounding."""
    time = 3000

    class Positions(SinusoidalPositions):
        """Of a padded batch."""

        def forward(self, x):
            return super().forward(x, Frames(torch.tensor([1])))

    positions = Positions(HIDDEN)
    session = session_of(positions, (torch.zeros(1, 5, HIDDEN),), {"x": {0: "batch", 1: "time"}}, tmp_path / "p.onnx")
    (table,) = session.run(None, {"x": torch.zeros(1, time, HIDDEN).numpy()})
    expected = model_of("conformer", "relative").encoder.embed_positions(torch.zeros(1, time, HIDDEN))[0]
    table = torch.from_numpy(table)[1:]
    torch.testing.assert_close(table[:, : HIDDEN // 2], expected[:, 0::2], rtol=0, atol=3e-7)
    torch.testing.assert_close(table[:, HIDDEN // 2 :], expected[:, 1::2], rtol=0, atol=3e-7)


def test_shift_puts_the_score_of_each_distance_at_its_key():
    """Row i, key j holds the score of distance i - j, for any number of frames."""
    for time in (1, 2, 5):
        columns = torch.arange(2 * time).expand(2, 3, time, 2 * time)
        keys = torch.arange(time)
        distances = (keys[:, None] - keys[None, :]).expand(2, 3, time, time)
        assert torch.equal(time - shift(columns), distances)


def test_distances_are_clipped_and_counted_from_the_far_left():
    """The index is 0 for keys at least ``left`` frames back, and left + right for those as far ahead."""
    assert DistanceIndex(2, 1)(torch.zeros(1, 4, HIDDEN), Frames(torch.tensor([4]))).tolist() == [
        [2, 3, 3, 3],
        [1, 2, 3, 3],
        [0, 1, 2, 3],
        [0, 0, 1, 2],
    ]
