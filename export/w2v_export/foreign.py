"""What is not a checkpoint of transformers, told by its files: other toolkits' models, archives, cut downloads."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: What transformers 4 ships and 5 does not; it needs fairseq to read the file.
_CONVERTER: Final = "transformers.models.wav2vec2.convert_wav2vec2_original_pytorch_checkpoint_to_pytorch"
#: Part of the name of the first convolution's weight in fairseq's checkpoints, and in no other toolkit's.
_FAIRSEQ_WEIGHT: Final = b"feature_extractor.conv_layers.0.0.weight"
_FAIRSEQ_SUFFIXES: Final = (".pt", ".pth")
_SEARCHED_BYTES: Final = 16 << 20
#: Suffixes of files that are being downloaded: by huggingface_hub, curl and wget scripts, aria2, browsers.
_UNFINISHED: Final = (".incomplete", ".part", ".aria2", ".crdownload")
_FINISH: Final = "hf download ORG/NAME --local-dir"


def toolkit(model: str, names: Iterable[str]) -> str | None:
    """Whose model it is by the names of its files, and what makes a checkpoint of it; None if nothing tells.

    Args:
        model: a folder or a hub id, for the message.
        names: the names of the files in it.
    """
    files = set(names)
    if any(name.endswith(".nemo") for name in files) or {"model_config.yaml", "model_weights.ckpt"} <= files:
        return (
            f"{model} holds a NeMo model. NeMo's encoders are of families of their own, which are not exported here; "
            "NeMo writes their ONNX itself: model.export('model.onnx')."
        )
    if "hyperparams.yaml" in files:
        return (
            f"{model} holds a SpeechBrain model. If its encoder is one of wav2vec 2.0's, save it for transformers: "
            "wrapper = model.mods.wav2vec2 (as hyperparams.yaml calls it); wrapper.model.save_pretrained(folder); "
            "wrapper.feature_extractor.save_pretrained(folder)."
        )
    if found := sorted(name for name in files if name.endswith(_FAIRSEQ_SUFFIXES)):
        return f"{model} holds {found[0]}, perhaps a checkpoint of fairseq's. {_conversion(found[0])}"
    return None


def single_file(path: Path) -> str:
    """What to do with a file that stands where a folder should: a sentence on its toolkit, or on its folder."""
    if path.suffix == ".nemo":
        return toolkit(os.fspath(path), [path.name]) or ""
    if path.suffix in _FAIRSEQ_SUFFIXES and _is_fairseq(path):
        return f"{path} is a checkpoint of fairseq's. {_conversion(os.fspath(path))}"
    return f"{path} is a file; give the folder that holds it beside its config.json, or a hub id such as org/name."


def unfinished(folder: Path) -> str:
    """The command that fetches a checkpoint into an empty folder, or ends its download; else empty."""
    with contextlib.suppress(OSError):  # what may not be listed is told elsewhere
        if not os.listdir(folder):
            return f" Fetch a checkpoint into it: {_FINISH} {folder}"
        for place in (folder, folder / ".cache" / "huggingface" / "download"):
            if place.is_dir() and any(name.endswith(_UNFINISHED) for name in os.listdir(place)):
                return f" Its download was not finished; go on with: {_FINISH} {folder}"
    return ""


def damaged(path: Path) -> str:
    """What to do about a file that cannot be read to its end."""
    return f"If its download was cut, fetch it again: {_FINISH} {path.parent} --include {path.name}"


def _conversion(file: str) -> str:
    return (
        "Convert it where fairseq and transformers 4 are installed, and export that folder: "
        f"python -m {_CONVERTER} --checkpoint_path {file} --pytorch_dump_folder_path FOLDER [--not_finetuned]"
    )


def _is_fairseq(path: Path) -> bool:
    """Whether a file that torch.save wrote names fairseq's first weight; its pickle is searched, and never run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
                return any(_FAIRSEQ_WEIGHT in archive.open(name).read(_SEARCHED_BYTES) for name in pickles)
        with path.open("rb") as file:
            return _FAIRSEQ_WEIGHT in file.read(_SEARCHED_BYTES)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return False
