"""Which files of a checkpoint's folder count, what of them is refused, and a reference that goes its own way."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import LABELS, speech
from w2v_models import CheckpointError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from families import EmotionModel, save  # noqa: E402
from test_heads import SIZES, STABLE, CardAgeGenderModel, randomised  # noqa: E402
from w2v_export import checkpoint as checkpoints_module  # noqa: E402
from w2v_export import export_bundle, weight_files  # noqa: E402
from w2v_export.checkpoint import load  # noqa: E402
from w2v_export.exporter import UnprovenError  # noqa: E402
from w2v_export.precision.gate import run  # noqa: E402
from w2v_runtime import Embedder  # noqa: E402

WAVEFORM = speech(0.7, seed=5)
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = "model.safetensors.index.json"
Weights = dict[str, Any]


@pytest.fixture
def emotion(checkpoints, tmp_path) -> Path:
    """A copy of the checkpoint with an emotion head, to be changed."""
    return shutil.copytree(checkpoints("emotion"), tmp_path / "tiny-emotion")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write(path: Path, weights: Weights) -> None:
    if path.suffix == ".safetensors":
        save_file(weights, path, metadata={"format": "pt"})
    else:
        torch.save(weights, path)


def split(folder: Path, weights: Weights, suffix: str, shards: int = 2) -> None:
    """Write weights as shards with their index, as transformers names them."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = [f"{stem}-{i + 1:05}-of-{shards:05}{suffix}" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(weights)}
    for file in names:
        write(folder / file, {name: weights[name] for name in weights if weight_map[name] == file})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def wrong(weights: Weights) -> Weights:
    """The same weights with other values, the head's among them."""
    return {name: value * 1.5 + 0.1 for name, value in weights.items()}


def recipe(folder: Path) -> np.ndarray:
    """The logits of the model card's recipe."""
    model, extractor = EmotionModel.from_pretrained(folder).eval(), transformers.Wav2Vec2FeatureExtractor
    inputs = extractor.from_pretrained(folder)(WAVEFORM, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        return model(inputs.input_values)[1][0].numpy()


@torch.inference_mode()
def graph_logits(folder: Path) -> np.ndarray:
    """The logits of the graph's encoder and the graph's head."""
    checkpoint = load(str(folder))
    _, last, _ = run(checkpoint.graph(), WAVEFORM)
    frames = checkpoint.architecture.conv.num_frames(len(WAVEFORM))
    return checkpoint.head.vector(last[:, :frames].mean(1))["logits"][0].numpy()


STRAYS = (
    "model_best.safetensors",
    "model.fp16.safetensors",
    "model-00002-of-00002.safetensors",
    "pytorch_model_ema.bin",
    "pytorch_model-00001-of-00001.bin",
    "optimizer.bin",
    "training_args.bin",
)


@pytest.mark.parametrize("form", ["single", "index", "pickle", "pickled index", "named", "named index"])
def test_the_head_is_that_of_the_files_that_transformers_loads(emotion, form):
    """Whatever else lies beside them, under names that sort before or behind, the logits are the recipe's."""
    weights = load_file(emotion / SAFETENSORS)
    expected = recipe(emotion)
    (emotion / SAFETENSORS).unlink()
    for name in STRAYS:
        write(emotion / name, wrong(weights))
    if form == "single":
        write(emotion / PICKLE, wrong(weights))
        split(emotion, wrong(weights), ".safetensors", 1)
        split(emotion, wrong(weights), ".bin", 1)
        write(emotion / SAFETENSORS, weights)
    elif form == "index":
        split(emotion, weights, ".safetensors", 3)
        write(emotion / PICKLE, wrong(weights))
    elif form == "pickle":
        split(emotion, wrong(weights), ".bin", 1)
        write(emotion / PICKLE, weights)
    elif form == "pickled index":
        split(emotion, weights, ".bin", 3)
    else:
        write(emotion / SAFETENSORS, wrong(weights))
        name = "chosen.safetensors" if form == "named" else "chosen.safetensors.index.json"
        edit(emotion / "config.json", transformers_weights=name)
        if form == "named":
            write(emotion / name, weights)
        else:
            split(emotion, weights, ".safetensors", 3)
            (emotion / INDEX).rename(emotion / name)
    assert np.abs(recipe(emotion) - expected).max() < 1e-6
    assert np.abs(graph_logits(emotion) - expected).max() < 2e-5
    assert np.abs(load(str(emotion)).run(WAVEFORM).head - expected).max() < 2e-5


def test_a_bundle_of_a_folder_with_strays_answers_as_the_recipe(emotion, tmp_path):
    """From end to end."""
    for name in STRAYS:
        write(emotion / name, wrong(load_file(emotion / SAFETENSORS)))
    embedder = Embedder(export_bundle(emotion, tmp_path / "bundle"))
    assert embedder.labels == LABELS
    assert np.abs(embedder.embed((WAVEFORM, 16000)).logits - recipe(emotion)).max() < 2e-5


@pytest.mark.parametrize("name", ["classifier", "x-vector", "ctc-bert"])
def test_strays_change_no_head_of_transformers(tmp_path, name):
    """The same for heads that transformers has."""
    folder = save(tmp_path / name, name)
    expected = load(str(folder)).head.state_dict()
    weights = load_file(folder / SAFETENSORS)
    for stray in STRAYS:
        write(folder / stray, wrong(weights))
    found = load(str(folder)).head.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_order_is_that_of_transformers(tmp_path):
    """For every choice of the four names, the first is the one that transformers itself resolves to."""
    resolve = transformers.modeling_utils._get_resolved_checkpoint_files
    given = {"variant", "subfolder", "from_tf", "from_flax", "use_safetensors", "transformers_explicit_filename"}
    options = dict.fromkeys(resolve.__code__.co_varnames[: resolve.__code__.co_argcount])
    options |= {"subfolder": "", "from_tf": False, "from_flax": False} if "from_tf" in options else {}
    assert given <= options.keys() or "download_kwargs" in options
    for present in itertools.chain.from_iterable(itertools.combinations(weight_files.ORDER, n) for n in range(1, 5)):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        for name in present:
            weight_map = {"w": f"model-1{Path(name.removesuffix('.index.json')).suffix}"}
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            (folder / weight_map["w"]).touch()
        theirs, _ = resolve(**options | {"pretrained_model_name_or_path": folder})
        assert list(map(str, weight_files.find(folder, None))) == theirs, present


def test_a_wrong_loader_of_the_head_does_not_prove_itself(emotion, tmp_path, monkeypatch):
    """Where the graph's head comes from other weights than transformers', the export is refused by its logits."""
    right = checkpoints_module.read
    monkeypatch.setattr(checkpoints_module, "read", lambda files: wrong(right(files)))
    with pytest.raises(UnprovenError) as caught:
        export_bundle(emotion, tmp_path / "bundle")
    assert {row.output for row in caught.value.rows if not row.within("fp32")} == {"logits"}


def test_a_head_of_transformers_under_another_name_is_compared_with_transformers(checkpoints, tmp_path):
    """A class of one's own with the weights of ``ForCTC`` is that head, and its reference transformers' class."""
    folder = shutil.copytree(checkpoints("base"), tmp_path / "tiny")
    expected = load(str(folder)).run(WAVEFORM).head
    edit(folder / "config.json", architectures=["MyRecogniser"])
    checkpoint = load(str(folder))
    assert type(checkpoint.model) is transformers.Wav2Vec2ForCTC
    assert np.array_equal(checkpoint.run(WAVEFORM).head, expected)


@torch.inference_mode()
def test_the_reference_of_a_cards_model_is_that_model(tmp_path):
    """Age and gender as audeering's card has them; the emotion head around the encoder of another family."""
    config = transformers.Wav2Vec2Config(**SIZES, **STABLE, architectures=["AgeGenderModel"])
    card = randomised(CardAgeGenderModel(config))
    card.save_pretrained(tmp_path / "age")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "age")
    checkpoint = load(str(tmp_path / "age"))
    _, age, gender = card(torch.from_numpy(WAVEFORM)[None])
    assert np.abs(checkpoint.run(WAVEFORM).head - torch.hstack([age, gender])[0].numpy()).max() < 1e-5

    folder = save(tmp_path / "hubert", "hubert")
    edit(folder / "config.json", architectures=["EmotionModel"], id2label=dict(enumerate(LABELS)))
    plain = load_file(folder / SAFETENSORS)
    head = {name: value for name, value in load_file(tmp_path / "age" / SAFETENSORS).items() if "gender" in name}
    head = {name.replace("gender", "classifier"): value for name, value in head.items()}
    write(folder / SAFETENSORS, {f"hubert.{name}": value for name, value in plain.items()} | head)
    outputs, checkpoint = load(str(folder)).run(WAVEFORM), load(str(folder))
    assert isinstance(checkpoint.model, transformers.HubertPreTrainedModel)
    pooled = torch.from_numpy(outputs.frames).mean(0)
    hidden = torch.tanh(pooled @ head["classifier.dense.weight"].T + head["classifier.dense.bias"])
    expected = hidden @ head["classifier.out_proj.weight"].T + head["classifier.out_proj.bias"]
    assert np.abs(outputs.head - expected.numpy()).max() < 1e-5
    assert np.abs(checkpoint.head.vector(pooled[None])["logits"][0].numpy() - outputs.head).max() < 1e-5


@pytest.mark.parametrize("architecture", ["ForCTC", "HubertForXVector", "Hubert", ""])
def test_an_architecture_that_transformers_lacks_is_decided_by_the_weights(tmp_path, architecture):
    """A name that only looks like one of its classes leads to no attribute error."""
    folder = save(tmp_path / "hubert", "hubert")
    edit(folder / "config.json", architectures=[architecture])
    if architecture == "HubertForXVector":
        with pytest.raises(CheckpointError, match=r"names HubertForXVector, but the weights hold no x-vector head"):
            load(str(folder))
    else:
        assert type(load(str(folder)).model) is transformers.HubertModel


def indexed(folder: Path, change: Any) -> None:
    """Turn the checkpoint into shards, and change their index."""
    split(folder, load_file(folder / SAFETENSORS), ".safetensors")
    (folder / SAFETENSORS).unlink()
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(change(index)))


def moved(index: Any) -> Any:
    """One weight said to be in the other file."""
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "model-00002-of-00002.safetensors"
    return index


def added(index: Any) -> Any:
    """A weight that no file has."""
    index["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    return index


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: [index], "must hold an object, not [{"),
        (lambda index: {}, "it lacks metadata, weight_map"),
        (lambda index: index | {"metadata": None}, "metadata must be an object, not None"),
        (lambda index: {"metadata": {}}, "it lacks weight_map"),
        (lambda index: index | {"weight_map": []}, "weight_map must be an object from the names of weights"),
        (lambda index: index | {"weight_map": {}}, "weight_map must be"),
        (lambda index: index | {"weight_map": {"a": 1}}, "weight_map must be"),
        (lambda index: index | {"weight_map": {"a": "../model.safetensors"}}, "a path below the folder"),
        (lambda index: index | {"weight_map": {"a": "/etc/x.safetensors"}}, "a path below the folder"),
        (lambda index: index | {"weight_map": {"a": "shard.bin"}}, "ends in .safetensors"),
        (lambda index: index | {"weight_map": {"a": "gone.safetensors"}}, "does not hold the file gone.safetensors"),
        (moved, "00001-of-00002.safetensors does not hold what its index says: it holds besides"),
        (added, "00001-of-00002.safetensors does not hold what its index says: it lacks more"),
    ],
)  # fmt: skip
def test_an_index_is_what_it_says(emotion, change, says):
    """Of another form, leading elsewhere, or at odds with its shards: refused with the file and what is wrong."""
    indexed(emotion, change)
    with pytest.raises(CheckpointError) as caught:
        load(str(emotion))
    assert says in str(caught.value)
    assert "model" in str(caught.value)
    assert str(emotion) in str(caught.value)


@pytest.mark.parametrize("names", [["adapter_config.json"], ["adapter_model.safetensors"], ["adapter_model.bin"]])
@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_refused_with_what_merges_it(emotion, names, alone):
    """Beside base weights, which transformers would load without it, and alone."""
    if alone:
        for path in emotion.iterdir():
            path.unlink()
    for name in names:
        (emotion / name).write_text('{"peft_type": "LORA", "base_model_name_or_path": "facebook/wav2vec2-base"}')
    for arguments in ({}, {"random_weights": True}):
        with pytest.raises(CheckpointError) as caught:
            export_bundle(emotion, emotion.parent / "bundle", **arguments)
        assert names[0] in str(caught.value)
        assert f"PeftModel.from_pretrained(base_model, '{emotion}').merge_and_unload()" in str(caught.value)
        assert caught.value.exit_code == 2


def test_a_folder_without_weights_says_what_it_holds(emotion):
    """The names that were looked for, and those that are there; nor does it do without a config."""
    (emotion / SAFETENSORS).rename(emotion / "checkpoint_best.pt")
    (emotion / "fairseq").mkdir()
    with pytest.raises(CheckpointError) as caught:
        load(str(emotion))
    assert "holds no weights (model.safetensors, " in str(caught.value)
    assert "it holds checkpoint_best.pt, config.json, fairseq/, preprocessor_config.json." in str(caught.value)
    (emotion / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds checkpoint_best\.pt, perhaps a checkpoint of fairseq's"):
        load(str(emotion))
    (emotion / "checkpoint_best.pt").rename(emotion / "best.weights")
    with pytest.raises(CheckpointError, match=r"holds no config\.json.*it holds best\.weights, fairseq/, preprocessor"):
        load(str(emotion))


class Harmless:
    """Something that weights are not."""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "holds 'list' in place of weights by name"),
        ({}, "holds 'dict' in place of weights by name"),
        ({"state_dict": {"a": torch.zeros(2)}, "epoch": 3}, "does not hold weights alone, but also epoch, state_dict"),
        ({1: torch.zeros(2)}, "also 1"),
        ({"encoder.x": torch.zeros(2, dtype=torch.int8)}, "but strided int8: encoder.x"),
        ({"encoder.x": torch.zeros(2, dtype=torch.complex64)}, "but strided complex64: encoder.x"),
        ({"encoder.x": torch.zeros(2, 2).to_sparse()}, "but sparse_coo float32: encoder.x"),
        ({"encoder.x": Harmless()}, "cannot be read as weights"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_something_else_is_refused(emotion, content, says, zipped):
    """What is no dictionary of floating-point tensors, in the new form of the file and in the old."""
    (emotion / SAFETENSORS).unlink()
    torch.save(content, emotion / PICKLE, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(emotion / PICKLE) == zipped
    grow(emotion / PICKLE)
    with pytest.raises(CheckpointError) as caught:
        load(str(emotion))
    assert says in str(caught.value)
    assert str(emotion / PICKLE) in str(caught.value)


def grow(path: Path) -> None:
    """Lengthen a file, in a place that its reader passes over, to a size that may hold the tiny model's weights."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(f"{file.namelist()[0].split('/')[0]}/padding", bytes(1 << 20))
    else:
        with open(path, "ab") as file:
            file.write(bytes(1 << 20))


def test_an_old_pickle_gives_the_same_head(emotion):
    """A file of PyTorch before 1.6, which cannot be mapped into memory."""
    weights, expected = load_file(emotion / SAFETENSORS), recipe(emotion)
    (emotion / SAFETENSORS).unlink()
    torch.save(weights, emotion / PICKLE, _use_new_zipfile_serialization=False)
    assert np.abs(graph_logits(emotion) - expected).max() < 2e-5


def test_quantised_and_foreign_safetensors_are_refused(emotion):
    """Integers in place of weights, a file for TensorFlow, half a file, none, and what Git LFS leaves in its place."""
    path = emotion / SAFETENSORS
    whole, weights = path.read_bytes(), load_file(path)
    name = "wav2vec2.encoder.layers.0.attention.k_proj.weight"
    for content, says in (
        (weights | {name: torch.zeros(48, 48, dtype=torch.int8)}, f"but strided int8: {name}"),
        (
            whole.replace(b'"format":"pt"', b'"format":"tf"'),
            "model.safetensors holds weights for 'tf', not for PyTorch.",
        ),
        (whole[: len(whole) // 2], "cannot be read as weights: "),
        (b"\xff" * len(whole), "cannot be read as weights: "),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (whole[:1000], "bytes of weights are there (model.safetensors)"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            write(path, content)
        with pytest.raises(CheckpointError) as caught:
            load(str(emotion))
        assert says in str(caught.value)
        assert str(emotion) in str(caught.value)


@pytest.mark.parametrize("kind", ["large", "emotion"])
def test_a_weight_of_the_wrong_shape_is_named_with_both_shapes(checkpoints, tmp_path, kind):
    """In the encoder and in the head, under the name that the file has."""
    folder = shutil.copytree(checkpoints(kind), tmp_path / "tiny")
    weights = load_file(folder / SAFETENSORS)
    prefix = "" if kind == "large" else "wav2vec2."
    changed = {f"{prefix}encoder.layers.1.attention.q_proj.weight": torch.zeros(48, 47)}
    write(folder / SAFETENSORS, weights | changed)
    with pytest.raises(CheckpointError) as caught:
        load(str(folder))
    assert f"of the wrong shape: {next(iter(changed))} (48, 47) for (48, 48)." in str(caught.value)
    assert str(folder) in str(caught.value)
    if kind == "emotion":
        write(folder / SAFETENSORS, weights | {"classifier.dense.bias": torch.zeros(40)})
        with pytest.raises(CheckpointError) as caught:
            load(str(folder))
        assert f"{folder}: " in str(caught.value)
        assert "classifier.dense.bias (40,) for (48,)" in str(caught.value)


def test_weight_norm_of_an_old_name_and_the_wrong_shape_is_named(checkpoints, tmp_path):
    """The renamed parts of the positional convolution, under the name that the file has."""
    folder = shutil.copytree(checkpoints("large"), tmp_path / "tiny")
    weights = load_file(folder / SAFETENSORS)
    stem = "encoder.pos_conv_embed.conv"
    weights[f"{stem}.weight_g"] = weights.pop(f"{stem}.parametrizations.weight.original0")[:, :, :5].contiguous()
    write(folder / SAFETENSORS, weights)
    with pytest.raises(CheckpointError, match=rf"{stem}\.weight_g \(1, 1, 5\) for \(1, 1, 16\)"):
        load(str(folder))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["wav2vec2.encoder.layers.2.feed_forward.output_dense.bias", "classifier.dense.weight"]
)
def test_weights_that_are_not_finite_are_named_before_anything_is_written(emotion, name, value):
    """One number among them is enough; what is never used may hold it."""
    weights = load_file(emotion / SAFETENSORS)
    unused = "wav2vec2.masked_spec_embed"
    write(emotion / SAFETENSORS, weights | {unused: torch.full_like(weights[unused], value)})
    load(str(emotion))
    weights[name].view(-1)[7] = value
    write(emotion / SAFETENSORS, weights)
    with pytest.raises(CheckpointError) as caught:
        export_bundle(emotion, emotion.parent / "bundle")
    assert f"holds weights that are NaN or infinite: {name}. " in str(caught.value)
    assert "verify" not in str(caught.value)
    assert sorted(os.listdir(emotion.parent)) == ["tiny-emotion"]


def test_weights_of_which_pytorch_itself_computes_nan_are_refused(emotion):
    """Finite numbers that overflow on the way: the case is named, and no bundle is there to be verified."""
    weights = load_file(emotion / SAFETENSORS)
    weights["wav2vec2.encoder.layers.0.attention.q_proj.weight"].fill_(3e38)
    write(emotion / SAFETENSORS, weights)
    with pytest.raises(CheckpointError, match="PyTorch itself computes NaN or infinity of the case 'speech 1 s'"):
        export_bundle(emotion, emotion.parent / "bundle")
    assert sorted(os.listdir(emotion.parent)) == ["tiny-emotion"]
