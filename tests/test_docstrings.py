"""Examples in docstrings are run as they stand, in a folder that holds the files they name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest
import soundfile

import w2v_models
import w2v_runtime
from conftest import speech

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import w2v_export  # noqa: E402

#: A base model whose vectors are as long as the real one's, with one block.
WIDE = {
    "hidden_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "intermediate_size": 64,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
}


def modules(package: ModuleType) -> list[ModuleType]:
    """A package's modules with examples."""
    names = [found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    sources = [(name, importlib.util.find_spec(name).loader.get_source(name)) for name in names]
    return [importlib.import_module(name) for name, source in sources if ">>> " in source]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, its bundle by the name of the model that it stands for, and a recording of two seconds."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**WIDE)).save_pretrained(folder / "checkpoint")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder / "checkpoint")
    w2v_export.export_bundle(folder / "checkpoint", folder / "facebook--wav2vec2-base-960h")
    soundfile.write(folder / "speech.wav", speech(2), 16000)
    return folder


@pytest.mark.parametrize("package", [w2v_models, w2v_runtime, w2v_export], ids=lambda package: package.__name__)
def test_every_example_says_what_comes_out(package, folder, monkeypatch, capsys):
    """None fails, and each of the three packages has some."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("W2V_HOME", str(folder))
    results = [doctest.testmod(module) for module in modules(package)]
    assert [result.failed for result in results] == [0] * len(results), capsys.readouterr().out
    assert sum(result.attempted for result in results) >= 2
