"""Files of a checkpoint that say what cannot be: refused with file and field before anything is built of them."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import speech
from w2v_export import fields
from w2v_export.description import describe, describe_architecture
from w2v_export.fields import LAYOUTS
from w2v_export.refusals import refuse_early
from w2v_models import CATALOGUE, CheckpointError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import FAMILIES as TINY_FAMILIES  # noqa: E402
from families import save  # noqa: E402
from w2v_export.checkpoint import load, seeded  # noqa: E402
from w2v_export.families import FAMILIES  # noqa: E402
from w2v_export.precision.gate import run  # noqa: E402

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
#: What only training, or the convolutions behind the encoder, takes from a config; and the ids of a tokenizer.
WITHOUT_EFFECT = {
    *("activation_dropout", "attention_dropout", "conformer_conv_dropout", "feat_proj_dropout"),
    *("feat_quantizer_dropout", "final_dropout", "hidden_dropout", "layerdrop", "initializer_range"),
    *("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks"),
    *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks", "replace_prob"),
    *("codevector_dim", "proj_codevector_dim", "num_codevector_groups", "num_codevectors_per_group"),
    *("contrastive_logits_temperature", "diversity_loss_weight", "num_negatives", "num_clusters", "num_ctc_classes"),
    *("ctc_loss_reduction", "ctc_zero_infinity", "pad_token_id", "bos_token_id", "eos_token_id"),
    "max_source_positions",  # the table of positions grows where it is too short
}


@pytest.fixture
def large(checkpoints, tmp_path) -> Path:
    """A copy of the checkpoint of kind ``large``, to be changed."""
    return shutil.copytree(checkpoints("large"), tmp_path / "tiny")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Any:
    """Tiny checkpoints of every family by name, made once."""
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            made[name] = save(tmp_path_factory.mktemp("tiny") / name, name)
        return made[name]

    return checkpoint


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, random_weights: bool = False) -> str:
    """What an export says, in a second of the processor at most, before it imports PyTorch."""
    began = time.thread_time()
    with pytest.raises(CheckpointError) as caught:
        refuse_early(str(folder), folder.parent / "bundle", ["fp32"], None, random_weights, False, False)
    assert time.thread_time() - began < 1
    assert caught.value.exit_code == 2
    assert str(folder) in str(caught.value)
    return str(caught.value)


CONV = [10, 3, 3, 3, 3, 2, 2]
CONFIGS = [
    ({"num_hidden_layers": "12"}, "num_hidden_layers must be a whole number from 1 to 1000, not '12'"),
    ({"num_hidden_layers": 3.0}, "num_hidden_layers must be a whole number from 1 to 1000, not 3.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number from 1 to 1000, not True"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
    ({"num_hidden_layers": -3}, "num_hidden_layers must be"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers must be"),
    ({"num_hidden_layers": None}, "num_hidden_layers must be"),
    ({"num_attention_heads": 0}, "num_attention_heads must be"),
    ({"num_attention_heads": 7}, "num_attention_heads must divide hidden_size, but 7 does not divide 48"),
    ({"hidden_size": 10**9}, "hidden_size must be"),
    ({"intermediate_size": 60_000}, "config.json describes a model of at least 17"),
    ({"intermediate_size": 0}, "intermediate_size must be"),
    ({"hidden_act": "nonsense"}, "hidden_act must be one of gelu, gelu_10"),
    ({"hidden_act": {"name": "gelu"}}, "hidden_act must be one of"),
    ({"feat_extract_activation": "xielu"}, "feat_extract_activation must be one of"),
    ({"feat_extract_norm": "batch"}, "feat_extract_norm must be one of group, layer, not 'batch'"),
    ({"layer_norm_eps": "1e-5"}, "layer_norm_eps must be a number"),
    ({"layer_norm_eps": -1e-5}, "layer_norm_eps must be a number"),
    ({"do_stable_layer_norm": 1}, "do_stable_layer_norm must be true or false, not 1"),
    ({"conv_bias": "false"}, "conv_bias must be true or false"),
    ({"conv_kernel": [*CONV, 2]}, "conv_dim has 7, conv_kernel has 8, conv_stride has 7"),
    ({"conv_stride": [5]}, "conv_dim, conv_kernel, conv_stride must have the same number of entries"),
    ({"conv_dim": []}, "conv_dim must be a list of 1 to 32 entries"),
    ({"conv_dim": 512}, "conv_dim must be a list"),
    ({"conv_kernel": [10.0, 3, 3, 3, 3, 2, 2]}, "conv_kernel must be a list"),
    ({"conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "conv_stride must be a list"),
    ({"conv_stride": [1, 1, 1, 1, 1, 1, 1]}, "conv_kernel and conv_stride make a frame every 1 samples"),
    ({"conv_stride": [1000] * 7}, "conv_kernel and conv_stride make frames of"),
    ({"conv_kernel": [10, 1, 1, 1, 1, 1, 1], "feat_extract_norm": "group"}, "conv_kernel must be above 1 behind"),
    ({"num_conv_pos_embeddings": 0}, "num_conv_pos_embeddings must be"),
    ({"num_conv_pos_embedding_groups": 5}, "num_conv_pos_embedding_groups must divide hidden_size, but 5"),
    ({"adapter_attn_dim": 0}, "adapter_attn_dim must be"),
    ({"add_adapter": True, "adapter_kernel_size": 4}, "adapter_kernel_size must be 3 for an adapter_stride of 2"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantization_config must be left out: quantised"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads must be left out: attention without some of its heads"),
    ({"architectures": "Wav2Vec2ForCTC"}, "architectures must be a list"),
    ({"architectures": [3]}, "architectures must be a list"),
    ({"id2label": ["a"]}, "id2label must be an object from numbers to different names"),
    ({"id2label": {"a": "b"}}, "id2label must be"),
    ({"id2label": {"0": "a", "00": "b"}}, "id2label must be"),
    ({"id2label": {"0": "a", "1": "a"}}, "id2label must be"),
    ({"id2label": {"0": "\ud800"}}, "id2label must be"),
    ({"id2label": {"0": "x" * 300}}, "id2label must be"),
    ({"num_labels": 10**9}, "num_labels must be"),
    ({"vocab_size": 10**12}, "vocab_size must be"),
    ({"tdnn_dim": [512]}, "tdnn_dim has 1, tdnn_kernel has 5"),
    ({"use_weighted_layer_sum": "yes"}, "use_weighted_layer_sum must be"),
    ({"pooling_mode": ["mean"]}, "pooling_mode must be text"),
    ({"transformers_weights": "../model.safetensors"}, "transformers_weights must be a path below the folder"),
    ({"transformers_weights": "model.bin"}, "transformers_weights must be"),
    ({"transformers_weights": "gone.safetensors"}, "does not hold the file gone.safetensors, though its config names"),
    ({"transformers_weights": "gone.safetensors.index.json"}, "gone.safetensors.index.json cannot be read: No such"),
    ({"model_type": "bert"}, "model_type must be one of wav2vec2, hubert, unispeech, unispeech-sat, wavlm, data2vec-"),
    ({"model_type": ["wav2vec2"]}, "model_type must be one of"),
    ({"model_type": None}, "model_type must be one of"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), CONFIGS, ids=[says.split(" ")[0] for _, says in CONFIGS])
def test_a_config_that_cannot_be_is_refused_by_file_and_field(large, changes, says):
    """Of the wrong type, out of bounds, or at odds with another field."""
    edit(large / CONFIG, **changes)
    assert says in refusal(large)
    if "weights" not in "".join(changes) and "at least" not in says:
        assert f"{large / CONFIG}: " in refusal(large)
        assert says in refusal(large, random_weights=True)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("wavlm", {"num_buckets": 2}, "num_buckets must be a whole number from 4"),
        ("wavlm", {"num_buckets": 320, "max_bucket_distance": 80}, "max_bucket_distance must be larger than a quarter"),
        ("data2vec", {"conv_pos_kernel_size": 0}, "conv_pos_kernel_size must be"),
        ("data2vec", {"num_conv_pos_embeddings": 10**6}, "num_conv_pos_embeddings must be a whole number from 1 to 64"),
        ("conformer-relative", {"position_embeddings_type": "absolute"}, "position_embeddings_type must be one of"),
        ("conformer-relative", {"conv_depthwise_kernel_size": 8}, "conv_depthwise_kernel_size must be odd"),
        (
            "conformer-rotary",
            {"num_attention_heads": 16},
            "hidden_size must be an even multiple of num_attention_heads",
        ),
        ("conformer-rotary", {"rotary_embedding_base": 0}, "rotary_embedding_base must be a number"),
        ("w2v-bert", {"feature_projection_input_dim": 80}, "feature_projection_input_dim must be num_mel_bins times"),
        ("w2v-bert", {"left_max_position_embeddings": -1}, "left_max_position_embeddings must be"),
        ("w2v-bert", {"use_intermediate_ffn_before_adapter": True}, "use_intermediate_ffn_before_adapter needs add_ad"),
        ("w2v-bert", {"add_adapter": True, "adapter_stride": 4}, "adapter_kernel_size must be 5 for an adapter_stride"),
        ("hubert", {"add_adapter": True}, "add_adapter must be left out: transformers has no convolutions after"),
        ("hubert", {"feat_proj_layer_norm": 0}, "feat_proj_layer_norm must be true or false"),
    ],
)
def test_fields_of_one_family_are_checked_in_it(tiny, tmp_path, name, changes, says):
    """What the other families do not have."""
    folder = shutil.copytree(tiny(name), tmp_path / "tiny")
    edit(folder / CONFIG, **changes)
    assert says in refusal(folder, random_weights=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling_rate": 16000.0}, "sampling_rate must be a whole number from 1000 to 192000, not 16000.0"),
        ({"sampling_rate": 0}, "sampling_rate must be"),
        ({"sampling_rate": 1}, "sampling_rate must be"),
        ({"sampling_rate": 10**9}, "sampling_rate must be"),
        ({"sampling_rate": "16000"}, "sampling_rate must be"),
        ({"sampling_rate": None}, "sampling_rate must be"),
        ({"do_normalize": 1}, "do_normalize must be true or false, not 1"),
        ({"return_attention_mask": "no"}, "return_attention_mask must be"),
        ({"feature_size": 80}, "feature_size must be 1, not 80"),
        ({"padding_side": "left"}, 'padding_side must be "right"'),
        ({"padding_value": "0"}, "padding_value must be a number"),
        ({"feature_extractor_type": "WhisperFeatureExtractor"}, '"Wav2Vec2FeatureExtractor", not \'Whisper'),
        ({"feature_extractor": [1]}, "must hold an object, not [1]"),
    ],
)
def test_a_feature_extractor_that_cannot_be_is_refused(large, changes, says):
    """As for the config."""
    edit(large / PREPROCESSOR, **changes)
    for random_weights in (False, True):
        assert f"{large / PREPROCESSOR}" in refusal(large, random_weights)
        assert says in refusal(large, random_weights)


@pytest.mark.parametrize("changes", [{"stride": 3}, {"num_mel_bins": 0}, {"return_attention_mask": False}])
def test_a_log_mel_extractor_that_the_graph_does_not_know_is_refused(tiny, tmp_path, changes):
    """What the reference would compute in another way."""
    folder = shutil.copytree(tiny("w2v-bert"), tmp_path / "tiny")
    edit(folder / PREPROCESSOR, **changes)
    assert f"{next(iter(changes))} must be" in refusal(folder)


CONTENTS = [
    (b"[1, 2]", "must hold an object, not [1, 2]"),
    (b"3", "must hold an object, not 3"),
    (b"", "is not JSON"),
    (b'{"model_type": "wav2vec2"', "is not JSON"),
    (b'{"model_type": NaN}', "is not JSON: NaN is not a number"),
    (b'{"a": 1, "a": 2}', "is not JSON: an object names a more than once"),
    (b'{"a": "\xff\xfe"}', "is not JSON"),
    ('{"a": 1}'.encode("utf-16"), "is not JSON"),
    (b"[" * 100_000, "is not JSON"),
    (b'{"num_hidden_layers": ' + b"9" * 10_000 + b"}", "is not JSON"),
    (b" " * (16 << 20) + b"{}", "is larger than 16 MiB"),
]


@pytest.mark.parametrize(("content", "says"), CONTENTS)
@pytest.mark.parametrize("name", [CONFIG, PREPROCESSOR, "processor_config.json", "vocab.json", "added_tokens.json"])
def test_a_file_that_is_no_object_is_refused(large, name, content, says):
    """Whatever it holds instead, and however much of it."""
    (large / name).write_bytes(content)
    assert f"{large / name} " in refusal(large)
    assert says in refusal(large)


@pytest.mark.parametrize("content", ['{"a": "b"}', '{"a": 1.5}', '{"eng": {"a": "b"}}', '{"eng": {"a": 0}, "b": 1}'])
def test_a_vocabulary_of_something_else_is_refused(large, content):
    """Neither tokens with their numbers nor such a list a language."""
    (large / "vocab.json").write_text(content)
    assert f"{large / 'vocab.json'}: it must hold an object from tokens to numbers, or" in refusal(large)


@pytest.mark.parametrize("name", [CONFIG, PREPROCESSOR, "processor_config.json", "vocab.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link to a pipe", "dangling link"])
def test_what_is_no_regular_file_is_never_opened(large, name, kind):
    """A pipe that nobody writes to, and its like: refused at once, and weights are looked for elsewhere."""
    path = large / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.chdir(large), socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a pipe":
        os.mkfifo(large / "pipe")
        path.symlink_to("pipe")
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    said = refusal(large)
    if name == "model.safetensors":
        assert "holds no weights" in said
        assert name in said.partition("it holds")[2]
    else:
        assert f"{path} " in said
        assert "is not a regular file" in said or "No such file or directory" in said


def test_the_command_refuses_a_pipe_in_place_of_a_config(large):
    """In a process of its own: exit 2 and one sentence, before PyTorch is imported."""
    (large / CONFIG).unlink()
    os.mkfifo(large / CONFIG)
    code = (
        f"import sys; sys.argv = ['w2v-export', '--model', {str(large)!r}, '--output', {str(large.parent / 'b')!r}]\n"
    )
    code += "from w2v_export.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == f"w2v-export: error: {large / CONFIG} is not a regular file, so it was not opened.\n"


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom permissions stop."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["", CONFIG, PREPROCESSOR, "model.safetensors"])
def test_what_may_not_be_read_is_named(checkpoints, name):
    """A folder or a file without permission."""
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o777)
        folder = Path(shutil.copytree(checkpoints("large"), f"{above}/tiny"))
        for path in (folder, *folder.iterdir()):
            path.chmod(0o755)
        (folder / name).chmod(0)
        with without_privileges():
            assert "Permission denied" in refusal(folder)
            assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_in_place_of_the_folder_is_refused(large, name):
    """What is there is no folder, so that the hub is not asked for it."""
    with contextlib.chdir(large), pytest.raises(CheckpointError, match=rf"{name} is a file; give the folder"):
        describe(name)


def test_the_extractor_may_stand_in_the_processors_file(large):
    """Where newer releases keep it; if both are there they must agree, for releases differ in which they take."""
    settings = json.loads((large / PREPROCESSOR).read_text()) | {"do_normalize": False}
    (large / "processor_config.json").write_text(json.dumps({"feature_extractor": settings}))
    assert "differ in do_normalize" in refusal(large)
    (large / PREPROCESSOR).unlink()
    assert describe(str(large)).extractor["do_normalize"] is False
    (large / "processor_config.json").write_text("{}")
    said = refusal(large)
    assert "holds no preprocessor_config.json, and no processor_config.json with a feature_extractor" in said
    assert "its do_normalize changes every embedding, and the weights do not tell it" in said
    assert "save_pretrained" not in said


def test_more_weights_than_the_machine_holds_are_refused(large, monkeypatch):
    """Random weights need no files, so their number is bounded by the memory there is."""
    edit(large / CONFIG, hidden_size=4096, num_hidden_layers=1000, intermediate_size=65536)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 22}.__getitem__)
    said = refusal(large, random_weights=True)
    assert "describes a model of at least 6039797" in said
    assert "take 2416 GB, but this machine has 17 GB of memory" in said


def test_the_tables_are_those_of_transformers():
    """Every family's fields have transformers' defaults; what is not among them has no effect on an embedding."""
    assert list(LAYOUTS) == list(FAMILIES)
    for model_type, layout in LAYOUTS.items():
        family = FAMILIES[model_type]
        for table, kind in ((layout.config, family.config), (layout.extractor, family.extractor)):
            parameters = inspect.signature(kind.__init__).parameters
            theirs = {name: parameter.default for name, parameter in parameters.items() if name in table}
            theirs = {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()}
            assert theirs == {name: table[name].default for name in theirs}
            # In transformers 5 every config has the general fields among its own.
            general = inspect.signature(transformers.PretrainedConfig.__init__).parameters
            own = parameters.keys() - table.keys() - fields.REFUSED.keys() - general.keys() - {"self", "kwargs"}
            assert own <= WITHOUT_EFFECT


def test_the_catalogue_is_described():
    """Every entry passes the checks that files must pass, and is what it says."""
    for variant in CATALOGUE:
        described = describe_architecture(variant.id)
        assert not list(fields.config_problems(described.config))
        assert not list(fields.frame_problems(described.layout, described.config, described.extractor))
        known = {name: value for name, value in variant.config.items() if name in described.config}
        assert described.config | known == described.config
        assert described.architecture.conv.stride == 320
    assert fields.least_weights(describe_architecture("facebook/wav2vec2-xls-r-2b").config) > 2e9


def test_what_has_no_effect_has_none(large):
    """Fields of training, of transformers' own attributes, and of nobody: left out, whatever they hold."""
    expected = load(str(large)).run(speech(0.3)).frames
    odd = dict.fromkeys(WITHOUT_EFFECT, "\ud800") | {"use_return_dict": True, "to_dict": 1, "is_decoder": "x"}
    odd |= {"torch_dtype": "float16", "dtype": "nonsense", "attn_implementation": 7, "return_dict": False, "": []}
    edit(large / CONFIG, **odd)
    assert np.array_equal(load(str(large)).run(speech(0.3)).frames, expected)


NASTY = (
    *(None, True, False, "", "12", 12.0, -1, 0, 1, 2, 3, 5, 16, 48, 2**31, 10**7, 10**30, 1e308, -1e-5, [], [0], [1]),
    *([1, 2], {}, {"0": "a"}, [[]], ["a"], "gelu", "relu", "group", "layer", "relative", "rotary", "x" * 999, "\ud800"),
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_changed_checkpoint_is_refused_by_name_or_right(tiny, data):
    """Any field changed to anything: an error that names the folder, or a graph that computes what PyTorch does."""
    name = data.draw(st.sampled_from([*TINY_FAMILIES, "classifier-weighted", "x-vector", "ctc-bert"]))
    folder, file = tiny(name), data.draw(st.sampled_from([CONFIG, CONFIG, PREPROCESSOR]))
    original = (folder / file).read_text()
    content = json.loads(original)
    layout = LAYOUTS[json.loads((folder / CONFIG).read_text())["model_type"]]
    known = list(layout.config if file == CONFIG else layout.extractor)
    for _ in range(data.draw(st.integers(1, 2))):
        field = data.draw(st.sampled_from([*known, *content]))
        value = data.draw(st.sampled_from(NASTY))
        if isinstance(content.get(field), list) and content[field] and data.draw(st.booleans()):
            value = [value, *content[field][1:]]
        content[field] = value
    random_weights, began = data.draw(st.booleans()), time.thread_time()
    (folder / file).write_text(json.dumps(content))
    try:
        checkpoint = seeded(str(folder), 0) if random_weights else load(str(folder))
    except CheckpointError as error:
        said = str(error)
    else:
        said = str(folder)
        assert_right(checkpoint)
    finally:
        (folder / file).write_text(original)
    assert str(folder) in said
    assert time.thread_time() - began < 10


@torch.inference_mode()
def assert_right(checkpoint: Any) -> None:
    """The graph computes what PyTorch does, as far as deep stacks of random weights let roundings stay small."""
    waveform = speech(0.3, checkpoint.architecture.sample_rate)
    expected = checkpoint.run(waveform).frames
    found = run(checkpoint.graph(), waveform)[1][0, : len(expected)].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * max(1, np.abs(expected).max()))
