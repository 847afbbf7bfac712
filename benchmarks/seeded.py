"""One seeded model in the form that each peer reads; kept in the work folder.

    python benchmarks/seeded.py FORM MODEL FOLDER

A process of its own for each form: PyTorch and the converters need gigabytes, which must not count as anyone's peak.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

CHECKPOINT, OPTIMUM, BUNDLE = "checkpoint", "optimum", "bundle"
#: CTranslate2's folders by the precision of the weights in them.
CTRANSLATE2 = {"fp32": "ctranslate2-fp32", "int8": "ctranslate2-int8"}
_EXPORT = "from w2v_export.cli import main; main()"


def prepare(model: str, folder: Path) -> None:
    """Write every form of ``model`` that is not below ``folder`` yet and can be had here."""
    folder.mkdir(parents=True, exist_ok=True)
    for form in FORMS:
        if not (folder / form).exists() and (form not in CTRANSLATE2.values() or _ctranslate2_reads(folder)):
            _say(f"{model}: writing its {form}")
            subprocess.run([sys.executable, __file__, form, model, folder], check=True, stdout=subprocess.DEVNULL)
    if not (folder / BUNDLE).exists():
        _say(f"{model}: exporting the bundle")
        options = ("--random-weights", "--precision", "fp32,int8", "--output", folder / BUNDLE)
        subprocess.run(
            [sys.executable, "-c", _EXPORT, "--model", model, *options], check=True, stdout=subprocess.DEVNULL
        )


def _ctranslate2_reads(folder: Path) -> bool:
    """CTranslate2 knows the architecture with a layer norm after each convolution only."""
    config = json.loads((folder / CHECKPOINT / "config.json").read_text())
    return importlib.util.find_spec("ctranslate2") is not None and config["feat_extract_norm"] == "layer"


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def save_checkpoint(model: str, folder: Path, output: Path) -> None:  # noqa: ARG001
    """A checkpoint folder of transformers."""
    from w2v_export.checkpoint import seeded

    checkpoint = seeded(model, 0)
    checkpoint.model.save_pretrained(output)
    checkpoint.extractor.save_pretrained(output)


def export_optimum(model: str, folder: Path, output: Path) -> None:  # noqa: ARG001
    """The export of optimum itself."""
    from optimum.exporters.onnx import main_export

    main_export(str(folder / CHECKPOINT), str(output), task="feature-extraction", no_post_process=True)


def convert_ctranslate2(model: str, folder: Path, output: Path) -> None:  # noqa: ARG001
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
        quantization = "int8" if output.name.startswith(CTRANSLATE2["int8"]) else "float32"
        TransformersConverter(temporary).convert(output, quantization=quantization)


FORMS: dict[str, Callable[[str, Path, Path], None]] = {
    CHECKPOINT: save_checkpoint,
    OPTIMUM: export_optimum,
    CTRANSLATE2["fp32"]: convert_ctranslate2,
    CTRANSLATE2["int8"]: convert_ctranslate2,
}


def main(form: str, model: str, folder: Path) -> None:
    """Write one form; it takes its name when it is whole."""
    staging = folder / f"{form}.unfinished"
    shutil.rmtree(staging, ignore_errors=True)
    FORMS[form](model, folder, staging)
    staging.rename(folder / form)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
