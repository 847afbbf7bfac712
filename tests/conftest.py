"""Shared pieces of the tests: tiny checkpoints of each kind, saved as users save them, and their bundles."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_AUDIO = REPOSITORY.parent / "shared" / "audio"

#: True conv kernels and strides, so that frames are those of the real models; everything else is small.
TINY = {
    "conv_dim": [24] * 7,
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
GROUP = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
LABELS = ("arousal", "dominance", "valence")


def pytest_collection_finish() -> None:
    """Leave what the libraries made out of every later search for garbage, which would take a quarter of a second."""
    gc.collect()
    gc.freeze()


def speech(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Something with pitch, syllables and noise: (samples,) float32."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = 110 + 30 * random.random() + 20 * np.sin(2 * np.pi * 0.8 * time)
    voice = sum(np.sin(k * 2 * np.pi * np.cumsum(pitch) / rate) / k for k in range(1, 12))
    wave = 0.1 * voice * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time + seed)) + 0.005 * random.standard_normal(len(time))
    return wave.astype(np.float32)


def save_checkpoint(folder: Path, kind: str, seed: int = 0) -> Path:
    """Save a tiny checkpoint with ``save_pretrained``: kind is ``base`` (ForCTC), ``large`` or ``emotion``."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = transformers.Wav2Vec2Config(**TINY, **(GROUP if kind == "base" else LAYER), vocab_size=32)
    model = transformers.Wav2Vec2ForCTC(config) if kind == "base" else transformers.Wav2Vec2Model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    if kind == "emotion":
        config.id2label = dict(enumerate(LABELS))
        config.architectures = ["EmotionModel"]
        config.save_pretrained(folder)
        weights = {f"wav2vec2.{name}": value.contiguous() for name, value in model.state_dict().items()}
        size = config.hidden_size
        weights |= {
            "classifier.dense.weight": torch.randn(size, size) / size**0.5,
            "classifier.dense.bias": torch.randn(size) * 0.1,
            "classifier.out_proj.weight": torch.randn(3, size) / size**0.5,
            "classifier.out_proj.bias": torch.randn(3) * 0.1,
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        model.save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=kind != "base")
    extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoint folders by kind, made once."""
    made: dict[str, Path] = {}

    def checkpoint(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_checkpoint(tmp_path_factory.mktemp("checkpoints") / f"tiny-{kind}", kind)
        return made[kind]

    return checkpoint


@pytest.fixture(scope="session")
def bundles(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny bundles by kind, exported once.

    ``W2V_TEST_BUNDLES`` names a folder of bundles made beforehand, for an environment without PyTorch.
    """
    ready = os.environ.get("W2V_TEST_BUNDLES")
    made: dict[str, Path] = {}

    def bundle(kind: str) -> Path:
        if ready:
            return Path(ready) / kind
        if kind not in made:
            from w2v_export import export_bundle

            folder = tmp_path_factory.mktemp("bundles") / kind
            made[kind] = export_bundle(checkpoints(kind), folder).folder
        return made[kind]

    return bundle


@pytest.fixture(scope="session")
def relatives(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path], bundles: Callable[[str], Path]
) -> Callable[[str], tuple[Path, Path]]:
    """The checkpoint and the bundle of what ``families`` names, and of the three above, made once."""
    from families import save
    from w2v_export import export_bundle

    made: dict[str, tuple[Path, Path]] = {}

    def relative(name: str) -> tuple[Path, Path]:
        if name in ("base", "large", "emotion"):
            return checkpoints(name), bundles(name)
        if name not in made:
            folder = tmp_path_factory.mktemp("relatives")
            checkpoint = save(folder / name, name)
            made[name] = checkpoint, export_bundle(checkpoint, folder / "bundle").folder
        return made[name]

    return relative


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """A folder of five short recordings of unequal lengths, two in a folder below."""
    folder = tmp_path / "recordings"
    (folder / "b").mkdir(parents=True)
    for i, name in enumerate(("a.wav", "b/a.wav", "b/c.flac", "d.wav", "e.wav")):
        soundfile.write(folder / name, speech(0.4 + 0.37 * i, seed=i), 16000)
    return folder


@pytest.fixture
def shared_audio() -> Path:
    """Real recordings, where they are at hand."""
    if not SHARED_AUDIO.is_dir():
        pytest.skip("the shared recordings are not here")
    return SHARED_AUDIO
