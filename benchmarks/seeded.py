"""What is measured: models with seeded weights, in the form that each peer reads, and recordings. Both are kept."""

from __future__ import annotations

import importlib.util
import json
import shutil
import string
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from peers import BUNDLE, CHECKPOINT, CTRANSLATE2, FP16_BUNDLE, OPTIMUM, RATE, Array
from processes import call, work_folder

from w2v_export.signals import speech_like

#: Models at their true size.
MODELS = {"base": "facebook/wav2vec2-base-960h", "large": "facebook/wav2vec2-large-robust"}
#: wav2vec 2.0 with the true kernels and strides but less arithmetic, for figures that are not about the engine's own
#: time: channels of the convolutions, blocks, hidden size, and width of the feed-forward network.
SIZES = {"tiny": (24, 2, 48, 96), "small": (192, 4, 256, 1024)}


def prepare(name: str, *forms: str) -> Path:
    """Write what is missing of ``forms`` and can be had here: the folder that holds them.

    A process of its own for each form, which takes its name when it is whole: PyTorch and the converters need
    gigabytes, which must not count as anyone's peak.
    """
    folder = work_folder() / "models" / name
    for form in forms:
        if not (folder / form).exists() and (form not in CTRANSLATE2.values() or _ctranslate2_reads(folder)):
            print(f"{name}: writing its {form}", file=sys.stderr, flush=True)
            staging = folder / f"{form}.unfinished"
            shutil.rmtree(staging, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            call(FORMS[form], name, folder, staging)
            staging.rename(folder / form)
    return folder


def _ctranslate2_reads(folder: Path) -> bool:
    """CTranslate2 knows the architecture with a layer norm after each convolution only."""
    config = json.loads((folder / CHECKPOINT / "config.json").read_text())
    return importlib.util.find_spec("ctranslate2") is not None and config["feat_extract_norm"] == "layer"


def save_checkpoint(name: str, folder: Path, output: Path) -> None:  # noqa: ARG001
    """A checkpoint folder of transformers."""
    from w2v_export.checkpoint import seeded

    checkpoint = seeded(MODELS[name], 0)
    checkpoint.model.save_pretrained(output)
    checkpoint.extractor.save_pretrained(output)


def export_optimum(name: str, folder: Path, output: Path) -> None:  # noqa: ARG001
    """The export of optimum itself."""
    from optimum.exporters.onnx import main_export

    main_export(str(folder / CHECKPOINT), str(output), task="feature-extraction", no_post_process=True)


def convert_ctranslate2(name: str, folder: Path, output: Path, quantization: str) -> None:  # noqa: ARG001
    """CTranslate2's form; its converter takes a model with a CTC head and a vocabulary, which are made up here."""
    from ctranslate2.converters import TransformersConverter
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC

    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        with_head = Wav2Vec2ForCTC.from_pretrained(folder / CHECKPOINT)
        with_head.config.return_hidden = True
        with_head.save_pretrained(temporary)
        tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *string.ascii_uppercase]
        vocabulary = Path(temporary) / "vocab.json"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Wav2Vec2CTCTokenizer(vocabulary).save_pretrained(temporary)
        TransformersConverter(temporary).convert(str(output), quantization=quantization)


def export(name: str, folder: Path, output: Path, precisions: tuple[str, ...]) -> None:
    """This package's bundle; one of :data:`SIZES` in fp32 only."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

    from w2v_export import export_bundle

    if name in MODELS:
        export_bundle(MODELS[name], output, precision=precisions, random_weights=True)
        return
    (channels, layers, hidden, wide), config = SIZES[name], folder / "config"
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": 4}
    Wav2Vec2Config(conv_dim=[channels] * 7, **sizes).save_pretrained(config)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(config)
    export_bundle(config, output, random_weights=True)


FORMS: dict[str, Callable[[str, Path, Path], None]] = {
    CHECKPOINT: save_checkpoint,
    OPTIMUM: export_optimum,
    CTRANSLATE2["fp32"]: partial(convert_ctranslate2, quantization="float32"),
    CTRANSLATE2["int8"]: partial(convert_ctranslate2, quantization="int8"),
    BUNDLE: partial(export, precisions=("fp32", "int8")),
    FP16_BUNDLE: partial(export, precisions=("fp32", "fp16")),
}


def lognormal(count: int, median: float, sigma: float = 0.5) -> list[float]:
    """Durations in seconds as corpora of utterances have them."""
    durations: list[float] = np.clip(np.random.default_rng(1).lognormal(np.log(median), sigma, count), 0.5, 30).tolist()
    return durations


def utterances(durations: Sequence[float]) -> list[Array]:
    """Waveforms of so many seconds."""
    return [speech_like(round(seconds * RATE), RATE, seed=i % 8) for i, seconds in enumerate(durations)]


def write_recordings(folder: Path, durations: Sequence[float]) -> Path:
    """WAV files of so many seconds at 16 kHz, a thousand in a folder, unless they are there.

    Each begins elsewhere in ten seconds of babble and repeats them, so that making many or long ones is quick.
    """
    if folder.exists():
        return folder
    babble = (speech_like(10 * RATE, RATE) * 32767).astype(np.int16)
    for i, seconds in enumerate(durations):
        path = folder / f"{i // 1000:03}" / f"{i:06}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        piece, left = np.roll(babble, -997 * i), round(seconds * RATE)
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            while left > 0:
                file.write(piece[:left])
                left -= len(piece)
    return folder
