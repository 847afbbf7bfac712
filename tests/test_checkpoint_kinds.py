"""Every kind of checkpoint that transformers and its users save: exported with transformers' numbers, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import LAYER, TINY, speech
from w2v_models import TOLERANCES, CheckpointError, RefusedError
from w2v_runtime.commands.models import app

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from families import NAMED, TDNN, save  # noqa: E402
from w2v_export import export_bundle  # noqa: E402
from w2v_export.checkpoint import draw, load  # noqa: E402
from w2v_export.description import describe_architecture  # noqa: E402
from w2v_runtime import Embedder  # noqa: E402

FRAMES = TOLERANCES["fp32"]["frames"].max_abs
POOLED = TOLERANCES["fp32"]["pooled"].max_abs
WAVEFORM = speech(1.3, seed=8)
CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"


@pytest.fixture
def copy(checkpoints, tmp_path) -> Any:
    """Copies of tiny checkpoints by name, to be changed."""

    def checkpoint(name: str) -> Path:
        if name in ("base", "large", "emotion"):
            return shutil.copytree(checkpoints(name), tmp_path / f"tiny-{name}")
        return save(tmp_path / f"tiny-{name}", name)

    return checkpoint


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; those set to ``...`` are taken out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))


@torch.inference_mode()
def answer(model: Any, extractor: Any) -> Any:
    """What a user's script gets of one recording."""
    return model.eval()(**extractor(WAVEFORM, sampling_rate=16000, return_tensors="pt"), return_dict=True)


@pytest.mark.parametrize(("kind", "normalises"), [("large", False), ("large", True), ("w2v-bert", None)])
def test_the_processors_file_alone_says_how_the_waveform_is_prepared(copy, tmp_path, kind, normalises):
    """As transformers saves a processor since release 5: the feature extractor is inside ``processor_config.json``."""
    folder = copy(kind)
    settings = json.loads((folder / PREPROCESSOR).read_text())
    if normalises is None:
        extractor, name = transformers.SeamlessM4TFeatureExtractor(), "Wav2Vec2BertProcessor"
        model = transformers.Wav2Vec2BertModel.from_pretrained(folder)
    else:
        settings |= {"do_normalize": normalises}
        extractor, name = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalises), "Wav2Vec2Processor"
        model = transformers.Wav2Vec2Model.from_pretrained(folder)
    (folder / PREPROCESSOR).unlink()
    tokenizer = {"backend": "custom", "pad_token": "<pad>", "tokenizer_class": "Wav2Vec2CTCTokenizer"}
    (folder / PROCESSOR).write_text(json.dumps({"feature_extractor": settings, "processor_class": name}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"processor_class": name}))
    embedder = Embedder(export_bundle(folder, tmp_path / "bundle"))
    mine = embedder.embed((WAVEFORM, 16000), level="frame").values
    assert np.abs(mine - answer(model, extractor).last_hidden_state[0, : len(mine)].numpy()).max() <= FRAMES


def logits(folder: Path, bundle: Path) -> np.ndarray:
    """What the exported bundle's head says of the recording: (K,), or (T, K)."""
    embedder = Embedder(export_bundle(folder, bundle))
    level = embedder.manifest.head.level
    return embedder.embed((WAVEFORM, 16000), level=level).logits


#: What a class of one's own, or a converter, leaves in ``architectures``.
NAMES = [
    ...,
    None,
    [],
    ["MyModel"],
    ["Wav2Vec2ForPreTraining"],
    ["Wav2Vec2ForCTC"],
    ["HubertForSequenceClassification"],
]


@pytest.mark.parametrize("named", NAMES, ids=lambda named: "-".join(named) if isinstance(named, list) else str(named))
@pytest.mark.parametrize("kind", ["base", "classifier"])
def test_the_weights_say_which_head_there_is(copy, tmp_path, kind, named):
    """CTC and a projected classifier, whatever the config has for the class's name."""
    folder = copy(kind)
    model = transformers.Wav2Vec2ForCTC if kind == "base" else transformers.HubertForSequenceClassification
    edit(folder / CONFIG, architectures=named)
    checkpoint = load(str(folder))
    assert type(checkpoint.model) is model
    theirs = answer(model.from_pretrained(folder), transformers.AutoFeatureExtractor.from_pretrained(folder))
    assert np.abs(checkpoint.run(WAVEFORM).head - theirs.logits[0].numpy()).max() <= FRAMES
    if named == ["MyModel"]:
        assert np.abs(logits(folder, tmp_path / "bundle") - theirs.logits[0].numpy()).max() <= FRAMES


@pytest.mark.parametrize("kind", ["base", "classifier", "x-vector", "frames", "ctc-bert"])
def test_what_a_config_says_of_running_changes_nothing(copy, kind):
    """Tuples in place of names, tracing, another attention, another precision: transformers' numbers as ever."""
    folder = copy(kind)
    expected = load(str(folder)).run(WAVEFORM)
    flash = "flash_attention_2"
    odd = {"torchscript": True, "return_dict": False, "use_return_dict": False, "output_hidden_states": True}
    odd |= {"output_attentions": True, "dtype": "float16", "pruned_heads": {}, "_attn_implementation": flash}
    odd |= {"attn_implementation": flash, "_attn_implementation_internal": "eager"}
    edit(folder / CONFIG, **odd)
    found = load(str(folder)).run(WAVEFORM)
    assert np.array_equal(found.layers, expected.layers)
    assert np.array_equal(found.head, expected.head)


def elsewhere(folder: Path, family: str, head: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """Save a head of wav2vec 2.0's around another encoder, as a class of one's own: that encoder, and that head."""
    torch.manual_seed(2)
    encoder = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**config))
    model = getattr(transformers, f"Wav2Vec2{head}")(transformers.Wav2Vec2Config(**config))
    encoder.config.architectures = [f"{family}{head}"]
    encoder.config.save_pretrained(folder)
    prefix = encoder.base_model_prefix
    weights = {f"{prefix}.{name}": value for name, value in encoder.state_dict().items()}
    weights |= {name: value for name, value in model.state_dict().items() if not name.startswith("wav2vec2.")}
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return encoder.eval(), model.eval()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("family", "head"),
    [("Hubert", "ForXVector"), ("UniSpeech", "ForXVector"), ("Hubert", "ForAudioFrameClassification")],
)
def test_a_head_around_an_encoder_where_transformers_has_none(tmp_path, family, head, weighted):
    """The logits are those of wav2vec 2.0's class of that name, fed with the other encoder's hidden states."""
    config = TINY | LAYER | TDNN | NAMED | {"use_weighted_layer_sum": weighted}
    assert not hasattr(transformers, f"{family}{head}")
    folder = tmp_path / "tiny"
    encoder, model = elsewhere(folder, family, head, config)

    class Fed(torch.nn.Module):
        def forward(self, *inputs: Any, **_: Any) -> Any:
            output = encoder(*inputs, output_hidden_states=True, return_dict=True)
            last = output.last_hidden_state
            return transformers.modeling_outputs.Wav2Vec2BaseModelOutput(last, last, output.hidden_states)

    model.wav2vec2 = Fed()
    with torch.inference_mode():
        inputs = transformers.Wav2Vec2FeatureExtractor()(WAVEFORM, sampling_rate=16000, return_tensors="pt")
        theirs = model(inputs.input_values)
    expected = (theirs.embeddings if head == "ForXVector" else theirs.logits)[0].numpy()
    assert np.abs(load(str(folder)).run(WAVEFORM).head - expected).max() <= POOLED
    assert np.abs(logits(folder, tmp_path / "bundle") - expected).max() <= POOLED


def test_a_head_that_is_named_and_not_there_is_refused(copy):
    """Its weights cannot be made up; the way out is the encoder alone."""
    folder = copy("hubert")
    edit(folder / CONFIG, architectures=["HubertForCTC"])
    with pytest.raises(CheckpointError, match=r"config\.json names HubertForCTC, but the weights hold no ctc head"):
        load(str(folder))


@pytest.mark.parametrize("kind", ["emotion", "classifier", "x-vector", "unknown"])
def test_without_its_head_the_encoder_is_exported_alone(copy, tmp_path, kind):
    """The same embeddings, and no logits; of a head that nobody knows too, whose refusal names it and the option."""
    folder = copy("classifier" if kind == "unknown" else kind)
    if kind == "unknown":
        weights = load_file(folder / "model.safetensors")
        renamed = {name.replace("projector.", "mixer.gate."): value for name, value in weights.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"no known head: classifier.*mixer\.gate\.weight.*--no-head exports"):
            export_bundle(folder, tmp_path / "bundle")
    embedder = Embedder(export_bundle(folder, tmp_path / "bundle", head=False))
    assert embedder.manifest.head is None
    assert embedder.manifest.outputs == ("last_hidden_state", "frame_lengths", "embedding")
    encoder = transformers.AutoModel.from_pretrained(folder)
    theirs = answer(encoder, transformers.AutoFeatureExtractor.from_pretrained(folder)).last_hidden_state[0].numpy()
    mine = embedder.embed((WAVEFORM, 16000))
    assert mine.logits is None
    assert np.abs(mine.values - theirs.mean(axis=0)).max() <= POOLED


def test_random_weights_have_no_head_on_demand(tmp_path):
    """Nor has an architecture of the catalogue."""
    described = describe_architecture("audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim")
    checkpoint = draw(described, 0, with_head=False)
    assert checkpoint.head is None
    assert type(checkpoint.model) is transformers.Wav2Vec2Model


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "|")
LANGUAGES = {
    "eng": (*SPECIAL, "a", "b"),
    "deu": (*SPECIAL, "x", "y", "z", "ß"),
    "azj-script_latin": (*SPECIAL, "ə", "b"),
}


@pytest.fixture
def mms(tmp_path) -> Path:
    """A tiny MMS checkpoint of three languages, as published: set to English, an adapter file for each."""
    folder = tmp_path / "tiny-mms"
    config = transformers.Wav2Vec2Config(**TINY, **LAYER, adapter_attn_dim=8, vocab_size=7)
    for seed, (language, tokens) in enumerate(reversed(LANGUAGES.items())):
        torch.manual_seed(0)
        model = transformers.Wav2Vec2ForCTC(config)
        torch.manual_seed(seed)
        model.lm_head = torch.nn.Linear(48, len(tokens))
        adapter = model._get_adapters()
        with torch.no_grad():
            for value in adapter.values():
                value.copy_(torch.randn(value.shape) / value.shape[-1] ** 0.5)
        folder.mkdir(exist_ok=True)
        save_file({name: value.detach() for name, value in adapter.items()}, folder / f"adapter.{language}.safetensors")
    model.save_pretrained(folder)
    numbered = {name: {token: index for index, token in enumerate(tokens)} for name, tokens in LANGUAGES.items()}
    (folder / "vocab.json").write_text(json.dumps(numbered))
    (folder / "tokenizer_config.json").write_text(json.dumps({"target_lang": "eng"}))
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("language", [None, *LANGUAGES])
@pytest.mark.parametrize("head", [True, False])
def test_a_language_of_mms_is_exported_with_its_adapter_and_its_labels(mms, tmp_path, language, head):
    """Frames, logits and labels as of transformers with ``target_lang``; the manifest has the default or the choice."""
    bundle = export_bundle(mms, tmp_path / "bundle", language=language, head=head)
    embedder = Embedder(bundle)
    assert embedder.manifest.source.language == (language or "eng")
    options = {"target_lang": language, "ignore_mismatched_sizes": True} if language else {}
    model = transformers.Wav2Vec2ForCTC.from_pretrained(mms, **options)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(mms)
    mine = embedder.embed((WAVEFORM, 16000), level="frame")
    assert np.abs(mine.values - answer(model.wav2vec2, extractor).last_hidden_state[0].numpy()).max() <= FRAMES
    if head:
        assert embedder.labels == LANGUAGES[language or "eng"]
        assert np.abs(mine.logits - answer(model, extractor).logits[0].numpy()).max() <= FRAMES
    shown = CliRunner().invoke(app, ["show", str(bundle.folder)])
    assert ["language", language or "eng"] in [line.split() for line in shown.stdout.splitlines()]


def test_a_language_that_is_not_there_is_refused_with_those_that_are(mms, copy, tmp_path):
    """Before any work; as is one for a model that has no adapters, or for random weights."""

    def said(folder: Path, language: str, **options: Any) -> str:
        with pytest.raises(RefusedError) as caught:
            export_bundle(folder, tmp_path / "bundle", language=language, **options)
        return str(caught.value)

    assert "vocab.json has no language 'fra'; it has azj-script_latin, deu, eng." in said(mms, "fra")
    assert "vocab.json has no language '../deu'" in said(mms, "../deu")
    (mms / "adapter.deu.safetensors").unlink()
    assert (
        "holds no adapter.deu.safetensors with the weights of deu; the adapters there: azj-script_latin, eng."
        in said(mms, "deu")
    )
    assert "random weights speak no language" in said(mms, "deu", random_weights=True)
    (mms / "vocab.json").write_text(json.dumps({"a": 0}))
    assert "has no vocab.json with languages" in said(mms, "eng")
    assert "config.json describes no model with an adapter for each language" in said(copy("base"), "eng")
