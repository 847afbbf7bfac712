"""Heads beside the encoder: rebuilt from a checkpoint's weights, equal to transformers' own and to the model cards'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from w2v_export.heads.recognise import build_head  # noqa: E402
from w2v_models.errors import CheckpointError  # noqa: E402

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "conv_dim": [24, 24, 24],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 4, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 40,
    "tdnn_dim": [32, 40, 24],
    "tdnn_kernel": [5, 3, 1],
    "tdnn_dilation": [1, 3, 1],
    "xvector_output_dim": 20,
    "vocab_size": 7,
    "id2label": {0: "angry", 1: "happy", 2: "sad"},
}
POST_NORM = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def randomised(model: Any, seed: int = 0) -> Any:
    """The model with random numbers in every parameter, sized so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim > 1 and not name.endswith("original0"):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 * noise)
    return model.eval()


def tiny(family: str, task: str, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**(SIZES | options))
    config.architectures = [f"{family}{task}"]
    return randomised(getattr(transformers, f"{family}{task}")(config))


def beside_encoder(model: Any) -> dict[str, Any]:
    prefix = f"{model.base_model_prefix}."
    return {name: value for name, value in model.state_dict().items() if not name.startswith(prefix)}


def utterance(samples: int = 8000, seed: int = 0) -> Any:
    return torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))


def hidden_states(model: Any, inputs: Any) -> tuple[list[Any], Any]:
    """Layers 0 … L as the blocks take and give them, and ``last_hidden_state``."""
    layers: list[Any] = []
    blocks = model.base_model.encoder.layers
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: layers.append(args[0].clone()))]
    hooks += [block.register_forward_hook(lambda _, args, output: layers.append(output[0].clone())) for block in blocks]
    last = model.base_model(inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    return layers, last


def pooled(frames: Any, pooling: tuple[str, ...]) -> Any:
    """The statistics that ``pooling`` names over the frames of one utterance, in float64."""
    statistics = {"mean": frames.double().mean(1), "std1": frames.double().std(1, correction=1)}
    return torch.cat([statistics[name] for name in pooling], dim=-1).float()


def difference(left: Any, right: Any) -> float:
    assert left.shape == right.shape
    return float((left - right).abs().max())


def outputs(head: Any, layers: list[Any], last: Any) -> dict[str, Any]:
    frames = head.frames(layers, last)
    assert frames.shape[:2] == (1, last.shape[1] - 2 * head.margin)
    return head.vector(pooled(frames, head.pooling)) if head.level == "utterance" else {"logits": frames}


TASKS = ("ForSequenceClassification", "ForXVector", "ForAudioFrameClassification")
CASES = [
    *(("Wav2Vec2", norm, summed) for norm in (POST_NORM, STABLE) for summed in (False, True)),
    ("Hubert", POST_NORM, True),
    ("WavLM", STABLE, True),
    ("UniSpeechSat", POST_NORM, False),
    ("Data2VecAudio", {}, True),
    ("Wav2Vec2Conformer", {}, True),
]


def name_of(case: Any) -> str:
    if isinstance(case, dict):
        return {None: "own", True: "stable", False: "post"}[case.get("do_stable_layer_norm")]
    return {True: "summed", False: "last"}.get(case, str(case))


@pytest.mark.parametrize(
    ("family", "norm", "summed", "task"),
    [(*case, task) for case in CASES for task in TASKS if hasattr(transformers, f"{case[0]}{task}")],
    ids=name_of,
)
def test_head_equals_transformers(family: str, norm: dict[str, Any], summed: bool, task: str) -> None:
    """Every output of a head of transformers comes out of its weights and the encoder's layers, to 1e-5."""
    model = tiny(family, task, use_weighted_layer_sum=summed, **norm)
    head = build_head(beside_encoder(model), model.config, None)
    assert head is not None
    head.sums_last = transformers.__version__ < "5"
    found = outputs(head, *hidden_states(model, utterance()))
    reference = model(utterance())
    assert difference(found["logits"], reference.logits) <= 1e-5
    if task == "ForXVector":
        assert difference(found["embeddings"], reference.embeddings) <= 1e-5
    else:
        assert set(found) == {"logits"}
        assert head.labels == ("angry", "happy", "sad")


@pytest.mark.parametrize("task", TASKS)
def test_head_of_wav2vec2_bert_equals_transformers(task: str) -> None:
    """w2v-BERT's heads, which stand on filter banks' frames, are the same modules."""
    model = tiny("Wav2Vec2Bert", task, use_weighted_layer_sum=True, feature_projection_input_dim=16)
    inputs = torch.randn(1, 90, 16, generator=torch.Generator().manual_seed(0))
    head = build_head(beside_encoder(model), model.config, None)
    found = outputs(head, *hidden_states(model, inputs))
    reference = model(inputs)
    assert difference(found["logits"], reference.logits) <= 1e-5
    if task == "ForXVector":
        assert difference(found["embeddings"], reference.embeddings) <= 1e-5


@pytest.mark.parametrize("norm", [POST_NORM, STABLE], ids=name_of)
def test_ctc_equals_transformers(norm: dict[str, Any]) -> None:
    """A transcription head gives the reference's logits of each frame, its columns named by the vocabulary."""
    model = tiny("Wav2Vec2", "ForCTC", **norm)
    vocabulary = ("<pad>", "|", "a", "b", "c", "d", "e")
    head = build_head(beside_encoder(model), model.config, vocabulary)
    assert (head.kind, head.level, head.pooling, head.margin) == ("ctc", "frame", (), 0)
    assert head.labels == vocabulary
    found = outputs(head, *hidden_states(model, utterance()))
    assert difference(found["logits"], model(utterance()).logits) <= 1e-5


def test_ctc_labels_without_a_fitting_vocabulary() -> None:
    """Columns take the config's labels where the vocabulary does not fit, and numbers where neither does."""
    model = tiny("Wav2Vec2", "ForCTC")
    numbered = build_head(beside_encoder(model), model.config, ("a", "b"))
    assert numbered.labels == tuple(f"token_{index}" for index in range(7))
    model.config.id2label = dict(enumerate("ABCDEFG"))
    assert build_head(beside_encoder(model), model.config, None).labels == tuple("ABCDEFG")


def test_words_for_each_head() -> None:
    """Kind, level, pooling and labels are those a caller builds the graph by."""
    sequence = tiny("Wav2Vec2", "ForSequenceClassification", id2label=None, num_labels=4)
    head = build_head(beside_encoder(sequence), sequence.config, None)
    assert (head.kind, head.level, head.pooling, head.margin) == ("sequence-classification", "utterance", ("mean",), 0)
    assert head.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    speaker = tiny("WavLM", "ForXVector")
    head = build_head(beside_encoder(speaker), speaker.config, None)
    assert (head.kind, head.level, head.pooling, head.margin) == ("x-vector", "utterance", ("mean", "std1"), 5)
    assert head.labels == tuple(f"x{index}" for index in range(20))
    assert not head.training
    frame = tiny("Wav2Vec2", "ForAudioFrameClassification")
    head = build_head(beside_encoder(frame), frame.config, None)
    assert (head.kind, head.level, head.pooling, head.margin) == ("frame-classification", "frame", (), 0)


def test_valid_frames_of_an_x_vector_ignore_what_follows() -> None:
    """Of n valid encoder frames come n - 2·margin head frames that no later frame changes; of too few, none."""
    model = tiny("Wav2Vec2", "ForXVector")
    head = build_head(beside_encoder(model), model.config, None)
    layers, last = hidden_states(model, utterance())
    padded = torch.cat([last, 1e3 * torch.ones(1, 9, 48)], dim=1)
    valid = last.shape[1] - 2 * head.margin
    assert torch.equal(head.frames([], padded)[:, :valid], head.frames(layers, last))
    assert [head.frames([], last[:, :size]).shape[1] for size in (0, 3, 10, 11, 12)] == [0, 0, 0, 1, 2]


def test_x_vector_exports_with_free_time(tmp_path: Path) -> None:
    """The exported x-vector layers give PyTorch's frames at lengths other than the traced one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny("Wav2Vec2", "ForXVector", use_weighted_layer_sum=True)
    head = build_head(beside_encoder(model), model.config, None)

    class Frames(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, *hidden: Any) -> Any:
            return self.head.frames(list(hidden), hidden[-1])

    def hidden(time: int) -> list[Any]:
        return [torch.randn(2, time, 48, generator=torch.Generator().manual_seed(k)) for k in range(4)]

    names = [f"hidden{k}" for k in range(4)]
    file = tmp_path / "head.onnx"
    torch.onnx.export(
        Frames().eval(),
        tuple(hidden(30)),
        file,
        input_names=names,
        output_names=["frames"],
        dynamic_axes={name: {0: "batch", 1: "time"} for name in names},
        opset_version=18,
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for time in (11, 30, 200):
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, hidden(time), strict=True)})
        np.testing.assert_allclose(found, head.frames(hidden(time), hidden(time)[-1]).numpy(), atol=1e-5)


class CardRegressionHead(torch.nn.Module):
    """As on the model cards of audeering's emotion and age models (there also called ModelHead)."""

    def __init__(self, config: Any, num_labels: int) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = torch.nn.Dropout(config.final_dropout)
        self.out_proj = torch.nn.Linear(config.hidden_size, num_labels)

    def forward(self, features: Any) -> Any:
        x = self.dropout(features)
        x = self.dense(x)
        x = torch.tanh(x)
        x = self.dropout(x)
        return self.out_proj(x)


class CardEmotionModel(transformers.Wav2Vec2PreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.wav2vec2 = transformers.Wav2Vec2Model(config)
        self.classifier = CardRegressionHead(config, config.num_labels)

    def forward(self, input_values: Any) -> Any:
        hidden = torch.mean(self.wav2vec2(input_values)[0], dim=1)
        return hidden, self.classifier(hidden)


class CardAgeGenderModel(transformers.Wav2Vec2PreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.wav2vec2 = transformers.Wav2Vec2Model(config)
        self.age = CardRegressionHead(config, 1)
        self.gender = CardRegressionHead(config, 3)

    def forward(self, input_values: Any) -> Any:
        hidden = torch.mean(self.wav2vec2(input_values)[0], dim=1)
        return hidden, self.age(hidden), torch.softmax(self.gender(hidden), dim=1)


def test_regression_equals_the_model_card() -> None:
    """audeering's emotion head gives the model card's numbers, named by the config."""
    model = randomised(CardEmotionModel(transformers.Wav2Vec2Config(**SIZES, **STABLE)))
    head = build_head(beside_encoder(model), model.config, None)
    assert (head.kind, head.labels, head.pooling) == ("regression", ("angry", "happy", "sad"), ("mean",))
    found = outputs(head, *hidden_states(model, utterance()))
    assert difference(found["logits"], model(utterance())[1]) <= 1e-5


def test_age_and_gender_equal_the_model_card() -> None:
    """audeering's age and the three genders' probabilities come as one output of four columns."""
    model = randomised(CardAgeGenderModel(transformers.Wav2Vec2Config(**SIZES, **STABLE)))
    head = build_head(beside_encoder(model), model.config, None)
    assert (head.kind, head.labels) == ("age-gender", ("age", "female", "male", "child"))
    found = outputs(head, *hidden_states(model, utterance()))["logits"]
    _, age, gender = model(utterance())
    assert difference(found, torch.cat([age, gender], dim=1)) <= 1e-5
    assert float(found[0, 1:].sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", ["Wav2Vec2", "UniSpeech", "UniSpeechSat", "Wav2Vec2Conformer"])
def test_pretraining_leaves_no_head(family: str) -> None:
    """What only pre-training needs is no head."""
    options = {"codevector_dim": 16, "proj_codevector_dim": 16, "num_ctc_classes": 5, "num_clusters": 6}
    model = tiny(family, "ForPreTraining", **options)
    weights = beside_encoder(model) | {"masked_spec_embed": torch.zeros(48)}
    assert len(weights) > 5
    assert build_head(weights, model.config, None) is None


def test_head_beside_remnants_of_pretraining() -> None:
    """A head is found among weights of pre-training, and layer weights that the config does not use stay aside."""
    model = tiny("Wav2Vec2", "ForSequenceClassification")
    weights = beside_encoder(model) | {"project_q.weight": torch.zeros(3, 3), "layer_weights": torch.zeros(4)}
    assert build_head(weights, model.config, None).kind == "sequence-classification"


def config(**options: Any) -> Any:
    return transformers.Wav2Vec2Config(**(SIZES | options))


def linear(outputs: int, inputs: int, *names: str) -> dict[str, Any]:
    weights = {f"{name}.weight": torch.zeros(outputs, inputs) for name in names}
    return weights | {f"{name}.bias": torch.zeros(outputs) for name in names}


REGRESSION = linear(48, 48, "classifier.dense") | linear(3, 48, "classifier.out_proj")
XVECTOR = (
    linear(32, 48, "projector")
    | linear(32, 160, "tdnn.0.kernel")
    | linear(40, 96, "tdnn.1.kernel")
    | linear(24, 40, "tdnn.2.kernel")
    | linear(20, 48, "feature_extractor")
    | linear(20, 20, "classifier")
)


@pytest.mark.parametrize(
    ("weights", "options", "says"),
    [
        (
            linear(2, 48, "age_head", "voice"),
            {},
            ["no known head: age_head.bias, age_head.weight, voice.bias", "x-vector ("],
        ),
        (linear(3, 48, "classifier") | linear(7, 48, "lm_head"), {}, ["no known head: classifier.bias"]),
        (REGRESSION, {"id2label": {0: "a", 1: "b"}}, ["3 outputs but config.json names 2 labels (a, b)", "id2label"]),
        (REGRESSION, {"id2label": {}}, ["3 outputs but config.json names no labels"]),
        (REGRESSION, {"pooling_mode": "max"}, ["pooling_mode to 'max'"]),
        (
            REGRESSION,
            {"hidden_size": 40},
            ["regression head", "of the wrong shape: classifier.dense.bias (48,) for (40,), classifier.dense.weight"],
        ),
        (
            REGRESSION | {"classifier.out_proj.weight": torch.zeros(3)},
            {},
            ["out_proj.weight is of the wrong shape, (3,)"],
        ),
        (REGRESSION | linear(0, 48, "classifier.out_proj"), {"id2label": {}}, ["wrong shape, (0, 48)"]),
        (
            REGRESSION | {"layer_weights": torch.zeros(4)},
            {"use_weighted_layer_sum": True},
            ["unexpected: layer_weights"],
        ),
        (linear(3, 48, "classifier"), {"architectures": ["MyModel"]}, ["ForAudioFrameClassification", "MyModel"]),
        (linear(3, 48, "classifier"), {}, ["architectures: none"]),
        (
            linear(40, 48, "projector") | linear(3, 40, "classifier"),
            {"use_weighted_layer_sum": True},
            ["sequence-classification head", "missing: layer_weights"],
        ),
        (XVECTOR, {"tdnn_kernel": [5, 2, 1]}, ["7 frames, an odd number", "tdnn_kernel"]),
        (XVECTOR, {"tdnn_kernel": [5, 3]}, ["one number for each layer"]),
        (XVECTOR | linear(24, 24, "tdnn.3.kernel"), {}, ["unexpected: tdnn.3.kernel.bias, tdnn.3.kernel.weight"]),
    ],
)
def test_refused_heads(weights: Mapping[str, Any], options: dict[str, Any], says: list[str]) -> None:
    """Unknown, ambiguous or misfitting heads are refused in words that name the weights or the config's option."""
    with pytest.raises(CheckpointError) as refusal:
        build_head(weights, config(**options), None)
    for words in says:
        assert words in str(refusal.value)
