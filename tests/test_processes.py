"""An embedder in other processes: forked, spawned, pickled to a pool; and copied within one."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from conftest import speech
from w2v_models import Bundle, BundleError
from w2v_models.errors import EngineError, W2VError
from w2v_runtime import Embedder
from w2v_runtime.engines import base as engine
from w2v_runtime.engines import onnxruntime as onnxruntime_engine
from w2v_runtime.engines.choice import open_engine
from w2v_runtime.engines.group import SeveralEngines
from w2v_runtime.threads import forks

#: Seconds that a process may take before it counts as hung.
PATIENCE = 60


@pytest.fixture(params=["cpu", "openvino"])
def embedder(request, bundles) -> Embedder:
    """On each engine, with two threads, which no fork takes along."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return Embedder(bundles("base"), device=request.param, threads=2)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("processes")
    paths = [str(folder / f"{i}.wav") for i in range(4)]
    for i, path in enumerate(paths):
        soundfile.write(path, speech(0.6 + 0.4 * i, seed=i), 16000)
    return paths


def answers(embedder: Embedder, paths: list[str]) -> list[np.ndarray]:
    """All kinds of calls: alone and batched, another layer, frames, and what the embedder was opened for."""
    batched = [result.values for result in embedder.embed_files(paths)]
    return [embedder.embed(paths[0]).values, embedder.embed(paths[1], layer=1).values, *batched]


def assert_equal(mine: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def in_fork(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, or raises, in a process that is forked from this one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            try:
                outcome = work()
            except Exception as error:
                outcome = error
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(outcome, stream)
        os._exit(0)
    os.close(writer)
    hung = threading.Timer(PATIENCE, os.kill, (child, 9))
    hung.start()
    try:
        with os.fdopen(reader, "rb") as stream:
            content = stream.read()
    finally:
        hung.cancel()
        _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {status}"
    outcome = pickle.loads(content)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def test_a_forked_child_goes_on_with_it(embedder, paths):
    """The same values there and, at the same time and later, here; a child of the child too."""
    expected = answers(embedder, paths)
    assert_equal(in_fork(lambda: answers(embedder, paths)), expected)
    assert_equal(in_fork(lambda: in_fork(lambda: answers(embedder, paths))), expected)
    assert_equal(answers(embedder, paths), expected)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux alone")
def test_a_forked_child_computes_on_threads_of_its_own(embedder, paths):
    """It opens its own graphs when it needs them; without them, all work would be that of one thread, if it ended."""
    embedder.embed(paths[0])

    def threads() -> tuple[int, int]:
        before = len(os.listdir("/proc/self/task"))
        embedder.embed(paths[0])
        return before, len(os.listdir("/proc/self/task"))

    before, after = in_fork(threads)
    assert before == 1
    assert after > 1


def test_a_child_forked_while_others_open_and_run_does_not_hang(embedder, paths):
    """Three threads open graphs, run them and drop them again while children are forked: all answer right."""
    expected, done = answers(embedder, paths), threading.Event()

    def work(pooling: str) -> None:
        while not done.is_set():
            for layer in range(4):
                embedder.embed(paths[layer], layer=layer, pooling=pooling)

    workers = [threading.Thread(target=work, args=(pooling,)) for pooling in ("mean", "std", "max")]
    for worker in workers:
        worker.start()
    try:
        for _ in range(4):
            assert_equal(in_fork(lambda: answers(embedder, paths)), expected)
    finally:
        done.set()
        for worker in workers:
            worker.join()


def test_a_child_forked_while_every_lock_is_held_does_not_hang(embedder, paths, bundles):
    """Of an engine, of a graph that is being opened, of several engines, of soundfile: the child finds none locked."""
    one = embedder.engine
    whole = SeveralEngines([one, open_engine(Bundle.open(bundles("base")), one.device, threads=2)])
    expected = answers(embedder, paths)
    locks = [one._sessions._changing, *(place.opening for place in one._sessions._places.values())]
    locks += [one._busy._lock, whole._choosing, whole._busy._lock]
    locks += [soundfile.SoundFile._sf_error_lock] if hasattr(soundfile.SoundFile, "_sf_error_lock") else []
    with contextlib.ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        embedder._engine = whole
        found = in_fork(lambda: answers(embedder, paths))
    assert_equal(found, expected)


def test_a_fork_waits_for_native_code():
    """A child would find its locks locked; the fork takes place when the code that held it off has ended."""
    forked = threading.Event()

    def fork() -> None:
        assert in_fork(lambda: 5) == 5
        forked.set()

    forking = threading.Thread(target=fork)
    with forks.held_off():
        forking.start()
        assert not forked.wait(0.3)
    assert forked.wait(PATIENCE)
    forking.join()
    with forks.held_off():
        pass


def test_a_child_begins_with_an_idle_stopwatch(embedder, paths):
    """Runs in progress at the fork are none of the child's: what it measures is its own."""
    embedder.embed(paths[0])
    with embedder.engine._busy:
        before, after = in_fork(
            lambda: (embedder.engine.busy_seconds, embedder.embed(paths[0]) and embedder.engine.busy_seconds)
        )
    assert 0 < after - before < PATIENCE


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_a_child_that_ends_as_programs_do_ends_well(bundles, paths, device):
    """What the parent opened is not destroyed in the child, whose exit code is its own: used, dropped or neither."""
    if device == "openvino":
        pytest.importorskip("openvino")
    script = f"""
import os, sys
from w2v_runtime import Embedder
embedder = Embedder({os.fspath(bundles("base"))!r}, device={device!r}, threads=2)
embedder.embed({paths[0]!r})
loop = embedder.embed_files([{paths[0]!r}] * 8, batch_seconds=0.5)
next(loop)
for use in (lambda: embedder.embed({paths[0]!r}), lambda: globals().pop("embedder"), lambda: None):
    child = os.fork()
    if child == 0:
        use()
        sys.exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
print(len(list(loop)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


def test_a_loop_is_not_continued_in_a_child(embedder, paths):
    """Its threads are the parent's: the child is told, at once, and the parent's loop goes on."""
    loop = embedder.embed_files(paths, batch_seconds=0.5)
    first = next(loop)
    with pytest.raises(W2VError, match="begin another one here"):
        in_fork(lambda: list(loop))
    assert [first.path, *(result.path for result in loop)] == paths


def test_cuda_is_refused_in_a_child(bundles, monkeypatch):
    """With the way out, before CUDA is asked; there needs no GPU to be, for it is not asked."""
    monkeypatch.setattr(onnxruntime_engine, "_cuda_process", lambda: 1)
    opened = open_engine(Bundle.open(bundles("base")), "cpu")
    opened.device = engine.CUDA
    with pytest.raises(EngineError, match="get_context\\('spawn'\\)"):
        opened.prepare(["layer_0_mean"])


def values_of(embedder: Embedder, path: str) -> np.ndarray:
    return embedder.embed(path).values


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_pools_of_processes_take_it(embedder, paths, method):
    """multiprocessing's and concurrent.futures', with its methods as their work."""
    expected = [embedder.embed(path).values for path in paths]
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.map(embedder.embed, paths, timeout=PATIENCE)
        assert_equal([result.values for result in found], expected)
    with context.Pool(1) as pool:
        found = pool.map_async(embedder.embed, paths).get(timeout=PATIENCE)
        assert_equal([result.values for result in found], expected)


def test_joblib_takes_it(embedder, paths):
    joblib = pytest.importorskip("joblib")
    work = [joblib.delayed(values_of)(embedder, path) for path in paths]
    assert_equal(joblib.Parallel(2)(work), [values_of(embedder, path) for path in paths])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda embedder: pickle.loads(pickle.dumps(embedder))])
def test_a_copy_is_what_it_was_copied_from(embedder, paths, copied):
    """In values, and in how it was opened; it opens nothing before it is used, and its copies share what it opens."""
    other = copied(embedder)
    assert repr(other) == repr(embedder)
    assert (other.bundle, other.precision, other.windowing) == (embedder.bundle, embedder.precision, embedder.windowing)
    assert other._engine is None
    assert_equal(answers(other, paths), answers(embedder, paths))
    assert copied(other).engine is other.engine
    assert copied(embedder).engine is other.engine
    assert other.engine is not embedder.engine


def test_copies_share_an_engine_only_where_they_were_opened_alike(bundles, paths):
    """Another precision, thread count, request or way to open is another engine; copies are small."""
    one = Embedder(bundles("base"), device="cpu", threads=1)
    other = Embedder(bundles("base"), device="cpu", threads=1, prepack=False)
    assert len(pickle.dumps(one)) < 20_000
    first, second = copy.copy(one).engine, copy.copy(other).engine
    assert first is not second
    assert copy.copy(other).engine is second


def test_threads_open_a_copy_once(bundles, paths, monkeypatch):
    """Eight threads use a new copy at once: one engine."""
    opened = []
    monkeypatch.setattr("w2v_runtime.embedding.opening.open_engine", lambda *a: opened.append(a) or open_engine(*a))
    other = copy.deepcopy(Embedder(bundles("base"), device="cpu", threads=3))
    workers = [threading.Thread(target=other.embed, args=(paths[0],)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(opened) == 1


@pytest.fixture
def movable(bundles, tmp_path, monkeypatch) -> Path:
    """A bundle of one's own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(bundles("base"), tmp_path / "mine").relative_to(tmp_path)


def test_a_bundle_that_changed_meanwhile_is_refused(movable, bundles, paths):
    """By its hash, when the copy is used, in a pool as here; one that is gone too."""
    embedder = Embedder(movable, device="cpu")
    manifest = json.loads((movable / "manifest.json").read_text())
    manifest["source"]["model"] = "somebody/else"
    (movable / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="another bundle than the one"):
        copy.deepcopy(embedder).embed(paths[0])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(BundleError, match="another bundle than the one"):
            pool.apply_async(embedder.embed, (paths[0],)).get(timeout=PATIENCE)
        shutil.rmtree(movable)
        with pytest.raises(BundleError, match="is not a folder"):
            pool.apply_async(embedder.embed, (paths[0],)).get(timeout=PATIENCE)


def test_it_finds_its_bundle_from_any_folder(movable, paths, tmp_path, monkeypatch):
    """Opened by a relative path, it opens further graphs, and copies open it, after the process went elsewhere."""
    embedder = Embedder(movable, device="cpu")
    expected = embedder.embed(paths[0]).values
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert embedder.embed(paths[0], layer=1).values.shape == (48,)
    np.testing.assert_array_equal(copy.deepcopy(embedder).embed(paths[0]).values, expected)
