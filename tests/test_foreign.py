"""What is not a checkpoint of transformers: each kind is named, with the converter or the command that helps."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from w2v_models import CheckpointError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from w2v_export import export_bundle  # noqa: E402

CONVERTER = "transformers.models.wav2vec2.convert_wav2vec2_original_pytorch_checkpoint_to_pytorch"


def refusal(model: Path, folder: Path) -> str:
    """What the export says, without having written anything."""
    with pytest.raises(CheckpointError) as caught:
        export_bundle(model, folder / "bundle")
    assert not (folder / "bundle").exists()
    return str(caught.value)


def fairseq(path: Path, zipped: bool) -> None:
    """Save what fairseq's trainer saves of a wav2vec 2.0, as of now or as of before PyTorch 1.6."""
    model = {"mask_emb": torch.zeros(4), "feature_extractor.conv_layers.0.0.weight": torch.zeros(4, 1, 10)}
    state: dict[str, Any] = {"cfg": None, "args": None, "model": model, "optimizer_history": []}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_fairseq_is_named_with_its_converter(tmp_path, zipped):
    """As a file, and as the folder that holds it; its pickle is not run."""
    path = tmp_path / "models" / "wav2vec_small.pt"
    path.parent.mkdir()
    fairseq(path, zipped)
    told = refusal(path, tmp_path)
    assert told.startswith(f"{path} is a checkpoint of fairseq's. Convert it where fairseq and transformers 4 are")
    assert f"python -m {CONVERTER} --checkpoint_path {path} --pytorch_dump_folder_path FOLDER" in told
    told = refusal(path.parent, tmp_path)
    assert told.startswith(f"{path.parent} holds wav2vec_small.pt, perhaps a checkpoint of fairseq's. Convert it")


def test_another_file_belongs_into_a_folder(checkpoints, tmp_path):
    """Weights without a config say too little; a file of PyTorch's that is not fairseq's is not called that."""
    path = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(3)}, path)
    for file in (path, checkpoints("large") / "model.safetensors"):
        assert refusal(file, tmp_path) == (
            f"{file} is a file; give the folder that holds it beside its config.json, or a hub id such as org/name."
        )


def test_a_model_of_nemo_is_named(tmp_path):
    """As the archive, in a folder, and unpacked."""
    folder = tmp_path / "nemo"
    folder.mkdir()
    (tmp_path / "model_config.yaml").write_text("target: nemo.collections.asr.models.EncDecCTCModelBPE")
    with tarfile.open(folder / "stt_en.nemo", "w") as archive:
        archive.add(tmp_path / "model_config.yaml", "model_config.yaml")
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name in ("model_config.yaml", "model_weights.ckpt"):
        (unpacked / name).write_text("")
    for place in (folder, folder / "stt_en.nemo", unpacked):
        assert refusal(place, tmp_path).startswith(f"{place} holds a NeMo model.")


@pytest.mark.parametrize("config", [None, {"speechbrain_interface": "EncoderClassifier"}])
def test_a_model_of_speechbrain_is_named_with_what_saves_its_encoder(tmp_path, config):
    """With the ``config.json`` that its repositories on the hub have, and without."""
    folder = tmp_path / "speechbrain"
    folder.mkdir()
    for name in ("hyperparams.yaml", "label_encoder.txt", "wav2vec2.ckpt", "model.ckpt"):
        (folder / name).write_text("")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    told = refusal(folder, tmp_path)
    assert told.startswith(f"{folder} holds a SpeechBrain model.")
    assert "wrapper.model.save_pretrained(folder); wrapper.feature_extractor.save_pretrained(folder)" in told


def test_an_empty_folder_and_a_download_that_was_not_finished(checkpoints, tmp_path):
    """Each with the command that goes on."""
    empty = tmp_path / "empty"
    empty.mkdir()
    told = refusal(empty, tmp_path)
    assert "it is not a checkpoint: it is empty. Fetch a checkpoint into it: hf download ORG/NAME" in told
    half = shutil.copytree(checkpoints("large"), tmp_path / "half")
    parts = half / ".cache" / "huggingface" / "download"
    parts.mkdir(parents=True)
    (half / "model.safetensors").rename(parts / "abc.def.incomplete")
    told = refusal(half, tmp_path)
    assert "holds no weights" in told
    assert told.endswith(f"Its download was not finished; go on with: hf download ORG/NAME --local-dir {half}")


@pytest.mark.parametrize("form", ["safetensors", "pickle", "begin"])
def test_weights_that_were_cut_are_fetched_again(checkpoints, tmp_path, form):
    """A file shorter than its header says, an archive without its end, and a few bytes."""
    folder = shutil.copytree(checkpoints("large"), tmp_path / "tiny")
    path = folder / "model.safetensors"
    if form == "pickle":
        from safetensors.torch import load_file

        torch.save(load_file(path), folder / "pytorch_model.bin")
        path.unlink()
        path = folder / "pytorch_model.bin"
        assert zipfile.is_zipfile(path)
    content = path.read_bytes()
    path.write_bytes(content[: 100 if form == "begin" else -len(content) // 3])
    told = refusal(folder, tmp_path)
    assert told.endswith(f"fetch it again: hf download ORG/NAME --local-dir {folder} --include {path.name}")
