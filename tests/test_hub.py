"""Checkpoints fetched from a hub: a server on this machine that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("torch")

from safetensors.torch import load_file, save_file

from conftest import REPOSITORY
from test_checkpoint_weights import split, write, wrong

COMMIT = "c0ffee" + "0" * 34
MODEL = "org/tiny"
DESCRIPTION = {"config.json", "preprocessor_config.json"}
SAFETENSORS = "model.safetensors"


@contextmanager
def hub(folder: Path, gated: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the repository ``MODEL``: the address, and the files that were sent; ``gated``, none."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
            name = self.path.partition("?")[0]
            if gated:
                self.send_response(403)
                self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif name.startswith(f"/api/models/{MODEL}/revision/"):
                self.answer({"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
            elif name.startswith(f"/api/models/{MODEL}/tree/"):
                self.answer([{"type": "file", "path": file, "size": 1, "oid": COMMIT} for file in files])
            elif (file := name.removeprefix(f"/{MODEL}/resolve/{COMMIT}/")) in files:
                content = files[file].read_bytes()
                self.send_response(200)
                self.send_header("ETag", hashlib.sha256(content).hexdigest())
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    sent.append(file)
                    self.wfile.write(content)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in name else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - the base class's name

        def answer(self, data: object) -> None:
            content = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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
    with hub(repository) as (address, sent):
        done = fetch(address, tmp_path / "cache")
        assert set(done.stdout.split()) == expected, done.stderr
        index = {name for name in sent if name.endswith(".index.json")}
        assert index == ({f"{stem}{suffix}.index.json"} if "index" in form else set())
        assert sorted(sent) == sorted(DESCRIPTION | expected | index)
        assert set(fetch(address, tmp_path / "cache", "offline").stdout.split()) == expected
        assert len(sent) == len(DESCRIPTION | expected | index)
    assert set(fetch(address, tmp_path / "cache").stdout.split()) == expected  # nobody answers there now


def test_what_the_hub_cannot_give_is_told(repository, tmp_path):
    """No weights, an adapter, no such repository, nobody who answers: each a sentence."""
    with hub(repository) as (address, sent):
        done = fetch(address, tmp_path / "cache")
        assert "holds no weights (model.safetensors" in done.stderr
        assert "it holds config.json, preprocessor_config.json." in done.stderr
        (repository / "adapter_config.json").write_text("{}")
        save_file({}, repository / "adapter_model.safetensors")
        done = fetch(address, tmp_path / "other")
        assert "merge_and_unload()" in done.stderr
        assert not [name for name in sent if name.endswith((".safetensors", ".bin"))]
        done = fetch(address, tmp_path / "cache", code=FETCH.replace("sys.argv[1]", "'org/unknown'"))
        assert "org/unknown is neither a folder nor a model on the hub" in done.stderr
    done = fetch(address, tmp_path / "empty")
    assert "org/tiny cannot be fetched (the hub cannot be reached) and is not in the hub's cache" in done.stderr
    done = fetch(address, tmp_path / "cache")
    assert "org/tiny cannot be fetched (the hub cannot be reached)" in done.stderr


def test_offline_by_variable_is_offline(checkpoints, repository, tmp_path):
    """``HF_HUB_OFFLINE``: what is in the cache is found there; what is not is told, with the variable."""
    write(repository / SAFETENSORS, load_file(checkpoints("emotion") / SAFETENSORS))
    with hub(repository) as (address, sent):
        done = fetch(address, tmp_path / "empty", HF_HUB_OFFLINE="1")
        assert "cannot be fetched (HF_HUB_OFFLINE is set) and is not in the hub's cache" in done.stderr
        assert fetch(address, tmp_path / "cache").stdout.split() == [SAFETENSORS]
        before = len(sent)
        assert fetch(address, tmp_path / "cache", HF_HUB_OFFLINE="1").stdout.split() == [SAFETENSORS]
        assert len(sent) == before


def test_a_gated_repository_names_where_its_conditions_are(repository, tmp_path):
    """And how to log in; the name is right, so nobody is told to check it."""
    with hub(repository, gated=True) as (address, _):
        done = fetch(address, tmp_path / "cache")
        assert (
            f"{MODEL} is gated: accept its conditions at {address}/{MODEL}, and log in with: hf auth login"
            in done.stderr
        )
        assert "Check the name" not in done.stderr


def test_another_toolkits_repository_is_named(tmp_path):
    """By the files that it has, none of which is fetched."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "stt_en.nemo").write_bytes(b"x")
    with hub(folder) as (address, sent):
        assert "org/tiny holds a NeMo model." in fetch(address, tmp_path / "cache").stderr
        (folder / "stt_en.nemo").rename(folder / "hyperparams.yaml")
        assert "org/tiny holds a SpeechBrain model." in fetch(address, tmp_path / "other").stderr
        assert sent == []


def test_the_demo_hides_no_failure(repository, tmp_path):
    """Where the hub answers, its word is the last one: no random weights in place of a checkpoint that is wrong."""
    (tmp_path / "bin").symlink_to(Path(sys.executable).parent)
    with hub(repository) as (address, _):
        variables = {"BIN": str(tmp_path / "bin"), "DEMO": str(tmp_path / "demo"), "MODEL": MODEL}
        variables |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            ["sh", "demo/run"], cwd=REPOSITORY, env=os.environ | variables,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "holds no weights" in done.stderr
    assert "RANDOM WEIGHTS" not in done.stdout
    assert not (tmp_path / "demo" / "models" / "org--tiny").exists()
