"""One embedder, many callers: whoever ends a run, by whatever way, ends that run alone."""

from __future__ import annotations

import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from conftest import speech
from w2v_models import Bundle
from w2v_models.errors import W2VError
from w2v_runtime import Embedder, Embedding
from w2v_runtime.embedding.corpus import POOL_INPUTS
from w2v_runtime.embedding.windows import Windowing
from w2v_runtime.engines.choice import open_engine
from w2v_runtime.engines.group import SeveralEngines
from w2v_runtime.threads.stop import Stop

ENGINES = ["cpu", "several", "openvino"]
#: Batches of one recording or two, so that there is always one in the engine and one to come.
SMALL = {"batch_seconds": 1.0, "jobs": 2}


@pytest.fixture(params=ENGINES)
def embedder(request, bundles) -> Embedder:
    """On each engine, and on two that are one."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    device = "cpu" if request.param == "several" else request.param
    embedder = Embedder(bundles("base"), device=device, threads=1, windowing=Windowing(2, 0.5, whole=3))
    if request.param == "several":
        engines = [open_engine(Bundle.open(bundles("base")), "cpu", threads=1) for _ in range(2)]
        embedder._engine = SeveralEngines(engines)
    return embedder


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    """Twelve recordings of a second or so."""
    folder = tmp_path_factory.mktemp("callers")
    paths = [str(folder / f"{i:02}.wav") for i in range(12)]
    for i, path in enumerate(paths):
        soundfile.write(path, speech(0.5 + 0.1 * i, seed=i), 16000)
    return paths


@pytest.fixture(scope="module")
def hours(tmp_path_factory) -> str:
    """Three hours of silence, which go through windows for a long time; on the disk they take no place."""
    path, size = tmp_path_factory.mktemp("hours") / "hours.wav", 3 * 3600 * 16000 * 2
    sizes = [b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", size]
    path.write_bytes(struct.pack("<4sI4s4sIHHIIHH4sI", *sizes))
    os.truncate(path, 44 + size)
    return str(path)


def values(embedder: Embedder, paths: list[str]) -> list[np.ndarray]:
    """Each recording's own, embedded alone."""
    return [embedder.embed(path).values for path in paths]


def assert_all(results: list, expected: list[np.ndarray]) -> None:
    """Every recording was embedded, and near to what it is alone."""
    assert [type(result) for result in results] == [Embedding] * len(expected)
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(result.values, right, rtol=0, atol=1e-5)


def break_off(results: Iterator) -> None:
    next(results)
    results.close()


def drop(results: Iterator) -> None:
    next(results)
    del results


def fail(results: Iterator) -> None:
    try:
        for _ in results:
            raise KeyError
    except KeyError:
        pass


@pytest.mark.parametrize("leave", [break_off, drop, fail])
def test_an_inner_loop_that_is_left_early_leaves_the_outer_one_alone(embedder, paths, leave: Callable):
    """For each of twelve recordings a second loop is begun and left: all twelve come out right."""
    expected, results = values(embedder, paths), []
    for result in embedder.embed_files(paths, **SMALL):
        leave(embedder.embed_files(paths, **SMALL))
        results.append(result)
    assert_all(results, expected)


def test_a_loop_that_is_left_early_leaves_other_threads_alone(embedder, paths):
    """While loops are left again and again, calls and loops on other threads get every answer, and no failure."""
    expected, done = values(embedder, paths), threading.Event()

    def call() -> list[np.ndarray]:
        answers = []
        while not done.is_set():
            answers.append(embedder.embed(paths[0]).values)
        return answers

    with ThreadPoolExecutor(2) as threads:
        calls = threads.submit(call)
        loops = threads.submit(lambda: [list(embedder.embed_files(paths, **SMALL)) for _ in range(3)])
        while not loops.done():
            drop(embedder.embed_files(paths, **SMALL))
        done.set()
        for results in loops.result():
            assert_all(results, expected)
        answers = calls.result()
    assert len(answers) >= 3
    for answer in answers:
        np.testing.assert_allclose(answer, expected[0], rtol=0, atol=1e-6)


def test_a_long_recording_ends_with_its_own_run(embedder, paths, hours):
    """Left while hours go through windows, a run ends within seconds; what a second one computes is right."""
    begun, expected = threading.Event(), values(embedder, paths)
    embedder.embed_long, embed_long = (lambda *a: (begun.set(), embed_long(*a))[1]), embedder.embed_long
    first, second = embedder.embed_files([*paths * 2, hours, *paths], **SMALL), embedder.embed_files(paths, **SMALL)
    results, begin = [next(second)], 0.0
    for result in first:
        assert isinstance(result, Embedding)
        if begun.wait(0.1):  # it is the next in the engine
            begin = time.monotonic()
            break
    first.close()
    assert 0 < time.monotonic() - begin < 5
    assert_all([*results, *second], expected)


def test_a_run_left_in_its_first_pass_over_a_long_recording_ends(embedder, hours):
    """The pass that only reads, through hours, looks whether it is still wanted."""
    stops = list[Stop]()
    embedder.read, read = (lambda *a: (stops.append(a[-1]), read(*a))[1]), embedder.read
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(next, embedder.embed_files([hours]))
        while not stops:
            time.sleep(0.001)
        stops[0].stop()
        with pytest.raises(W2VError, match="stopped"):
            first.result(timeout=5)


def test_inputs_without_end_are_read_a_little_ahead_and_come_in_order(embedder, paths):
    """Of an endless iterable some hundreds are taken for the first results, which are in its order."""
    taken = []

    def endless() -> Iterator[str]:
        for i in itertools.count():
            taken.append(i)
            yield paths[i % 5]

    expected = values(embedder, paths[:5])
    results = list(itertools.islice(embedder.embed_files(endless(), **SMALL), 20))
    assert_all(results, expected * 4)
    assert [result.path for result in results] == paths[:5] * 4
    before = len(taken)
    assert before <= POOL_INPUTS
    time.sleep(0.3)
    assert len(taken) == before


def test_what_the_inputs_raise_comes_behind_their_results(embedder, paths):
    """Three recordings, then an exception: three results, then that exception; the next run is as good as any."""

    def failing() -> Iterator[str]:
        yield from paths[:3]
        raise LookupError("no more")

    expected = values(embedder, paths[:3])
    run = embedder.embed_files(failing())
    assert_all([next(run), next(run), next(run)], expected)
    with pytest.raises(LookupError, match="no more"):
        next(run)
    assert_all(list(embedder.embed_files(paths[:3])), expected)


INTERRUPTED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from w2v_runtime import Embedder
short, hours = sys.argv[2:]
embed_long = Embedder.embed_long
Embedder.embed_long = lambda *arguments: (print("begun", flush=True), embed_long(*arguments))[1]
embedder = Embedder(sys.argv[1], threads=1)
def work():
    outer = embedder.embed_files([short] * 50 + [hours] * 3 + [short] * 50, batch_seconds=1.0)
    for result in outer:
        for other in embedder.embed_files([short] * 3, batch_seconds=1.0):
            WAIT
work()
"""


@pytest.mark.parametrize("wait", ["pass", "time.sleep(0.3)"])
def test_ctrl_c_ends_every_loop_of_a_process(bundles, paths, hours, wait):
    """Within seconds, wherever it falls, though hours of audio are in the engine for a loop that nobody closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.replace("WAIT", wait), bundles("base"), paths[0], hours],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


def test_a_failing_engine_is_no_stop(embedder, paths):
    """What fails for everybody is each input's own failure; a stop is none."""
    engine = embedder.engine

    def broken(*_: object, **__: object) -> None:
        raise W2VError("The engine failed.")

    engine.run = broken
    results = list(embedder.embed_files(paths[:2]))
    assert [(result.stage, result.reason) for result in results] == [("embed", "The engine failed.")] * 2
    del engine.run
    assert_all(list(embedder.embed_files(paths[:2])), values(embedder, paths[:2]))
