"""Checkpoints fetched from a hub: a server on this machine that speaks its protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("torch")

from safetensors.torch import load_file, save_file

from conftest import REPOSITORY
from hub_server import Hub, Repository, serving
from test_checkpoint_weights import split, write, wrong

COMMIT = "c0ffee" + "0" * 34
MODEL = "org/tiny"
DESCRIPTION = {"config.json", "preprocessor_config.json"}
SAFETENSORS = "model.safetensors"
#: A port that no server of a test is ever given.
NOBODY = "http://127.0.0.1:9"


class Folder(dict[str, dict[str, bytes]]):
    """The commits of a repository of which the only one holds what a folder holds at the time."""

    def __init__(self, path: Path) -> None:
        super().__init__({COMMIT: {}})
        self.path = path

    def __getitem__(self, commit: str) -> dict[str, bytes]:
        files = (path for path in self.path.rglob("*") if path.is_file())
        return {str(path.relative_to(self.path)): path.read_bytes() for path in files}


@contextmanager
def hub(folder: Path, gated: bool = False) -> Iterator[Hub]:
    """Serve a folder as the repository ``MODEL``; ``gated``, to nobody."""
    with serving() as running:
        running.repositories[MODEL] = Repository(Folder(folder), {"main": COMMIT})
        running.faults.gated |= {MODEL} if gated else set()
        yield running


#: Fetches, and prints the files that the weights are in.
FETCH = "import sys; from w2v_export.description import describe; offline = len(sys.argv) > 2\n"
FETCH += "print(*[path.name for path in describe(sys.argv[1], None, offline).weight_files(offline)])"


def fetch(
    address: str, cache: Path, *arguments: str, code: str = FETCH, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"} | variables
    return subprocess.run(
        [sys.executable, "-c", code, MODEL, *arguments],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def repository(checkpoints, tmp_path) -> Path:
    """A repository with what must not be taken for the weights, and nothing that are."""
    folder = shutil.copytree(checkpoints("emotion"), tmp_path / "repository")
    weights = load_file(folder / SAFETENSORS)
    (folder / SAFETENSORS).unlink()
    (folder / "onnx").mkdir()
    for name in ("onnx/model.safetensors", "model_best.safetensors", "model.fp16.safetensors", "optimizer.bin"):
        write(folder / name, wrong(weights))
    (folder / "README.md").write_text("# tiny")
    return folder


@pytest.mark.parametrize("form", ["single", "index", "pickle", "pickled index", "named"])
def test_just_the_files_that_transformers_loads_are_fetched(checkpoints, repository, tmp_path, form):
    """Once, and found again without the hub; weights in a folder below or of another name hide none."""
    weights = load_file(checkpoints("emotion") / SAFETENSORS)
    if form == "single":
        write(repository / SAFETENSORS, weights)
        write(repository / "pytorch_model.bin", wrong(weights))
        split(repository, wrong(weights), ".safetensors")
        expected = {SAFETENSORS}
    elif form == "pickle":
        write(repository / "pytorch_model.bin", weights)
        split(repository, wrong(weights), ".bin", 1)
        expected = {"pytorch_model.bin"}
    elif form == "named":
        config = json.loads((repository / "config.json").read_text())
        (repository / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))
        write(repository / SAFETENSORS, wrong(weights))
        write(repository / "mine.safetensors", weights)
        expected = {"mine.safetensors"}
    else:
        suffix = ".safetensors" if form == "index" else ".bin"
        split(repository, weights, suffix, 3)
        stem = "model" if form == "index" else "pytorch_model"
        expected = {f"{stem}-0000{i}-of-00003{suffix}" for i in (1, 2, 3)}
    with hub(repository) as served:
        done = fetch(served.address, tmp_path / "cache")
        assert set(done.stdout.split()) == expected, done.stderr
        index = {name for name in served.names if name.endswith(".index.json")}
        assert index == ({f"{stem}{suffix}.index.json"} if "index" in form else set())
        assert sorted(served.names) == sorted(DESCRIPTION | expected | index)
        assert set(fetch(served.address, tmp_path / "cache", "offline").stdout.split()) == expected
        assert len(served.names) == len(DESCRIPTION | expected | index)
    assert set(fetch(NOBODY, tmp_path / "cache").stdout.split()) == expected


def test_what_the_hub_cannot_give_is_told(repository, tmp_path):
    """No weights, an adapter, no such repository, nobody who answers: each a sentence."""
    with hub(repository) as served:
        done = fetch(served.address, tmp_path / "cache")
        assert "holds no weights (model.safetensors" in done.stderr
        assert "it holds config.json, preprocessor_config.json." in done.stderr
        (repository / "adapter_config.json").write_text("{}")
        save_file({}, repository / "adapter_model.safetensors")
        done = fetch(served.address, tmp_path / "other")
        assert "merge_and_unload()" in done.stderr
        assert not [name for name in served.names if name.endswith((".safetensors", ".bin"))]
        done = fetch(served.address, tmp_path / "cache", code=FETCH.replace("sys.argv[1]", "'org/unknown'"))
        assert "org/unknown is neither a folder nor a model on the hub" in done.stderr
    done = fetch(NOBODY, tmp_path / "empty")
    assert "org/tiny cannot be fetched (the hub cannot be reached) and is not in the hub's cache" in done.stderr
    done = fetch(NOBODY, tmp_path / "cache")
    assert "org/tiny cannot be fetched (the hub cannot be reached)" in done.stderr


def test_offline_by_variable_is_offline(checkpoints, repository, tmp_path):
    """``HF_HUB_OFFLINE``: what is in the cache is found there; what is not is told, with the variable."""
    write(repository / SAFETENSORS, load_file(checkpoints("emotion") / SAFETENSORS))
    with hub(repository) as served:
        done = fetch(served.address, tmp_path / "empty", HF_HUB_OFFLINE="1")
        assert "cannot be fetched (HF_HUB_OFFLINE is set) and is not in the hub's cache" in done.stderr
        assert fetch(served.address, tmp_path / "cache").stdout.split() == [SAFETENSORS]
        before = len(served.names)
        assert fetch(served.address, tmp_path / "cache", HF_HUB_OFFLINE="1").stdout.split() == [SAFETENSORS]
        assert len(served.names) == before


def test_a_gated_repository_names_where_its_conditions_are(repository, tmp_path):
    """And how to log in; the name is right, so nobody is told to check it."""
    with hub(repository, gated=True) as served:
        done = fetch(served.address, tmp_path / "cache")
        assert (
            f"{MODEL} is gated: accept its conditions at {served.address}/{MODEL}, and log in with: hf auth login"
            in done.stderr
        )
        assert "Check the name" not in done.stderr


def test_another_toolkits_repository_is_named(tmp_path):
    """By the files that it has, none of which is fetched."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "stt_en.nemo").write_bytes(b"x")
    with hub(folder) as served:
        assert "org/tiny holds a NeMo model." in fetch(served.address, tmp_path / "cache").stderr
        (folder / "stt_en.nemo").rename(folder / "hyperparams.yaml")
        assert "org/tiny holds a SpeechBrain model." in fetch(served.address, tmp_path / "other").stderr
        assert served.names == []


def test_the_demo_hides_no_failure(repository, tmp_path):
    """Where the hub answers, its word is the last one: no random weights in place of a checkpoint that is wrong."""
    (tmp_path / "bin").symlink_to(Path(sys.executable).parent)
    with hub(repository) as served:
        variables = {"BIN": str(tmp_path / "bin"), "DEMO": str(tmp_path / "demo"), "MODEL": MODEL}
        variables |= {"HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            ["sh", "demo/run"], cwd=REPOSITORY, env=os.environ | variables,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "holds no weights" in done.stderr
    assert "RANDOM WEIGHTS" not in done.stdout
    assert not (tmp_path / "demo" / "models" / "org--tiny").exists()
