"""Every kind of checkpoint that transformers and its users save: exported with transformers' numbers, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import speech
from w2v_models import TOLERANCES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import save  # noqa: E402
from w2v_export import export_bundle  # noqa: E402
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
    """As transformers saves a processor since release 5, with the feature extractor inside ``processor_config.json``."""
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
