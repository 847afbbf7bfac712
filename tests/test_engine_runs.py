"""Engines with several runs in progress: bound buffers, several devices, stopping, and memory that is short.

What CUDA does here, the processor's provider does too, so that no GPU is needed.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import soundfile

from conftest import speech
from w2v_models import Bundle
from w2v_models.errors import EngineError, OutOfMemoryError, W2VError
from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE, LENGTHS, WAVEFORM
from w2v_runtime import Embedder
from w2v_runtime.embedding.batching import Pool, pad
from w2v_runtime.embedding.results import Embedding
from w2v_runtime.engines.assignment import RECORD, misplaced, on_processor
from w2v_runtime.engines.base import Stopwatch
from w2v_runtime.engines.choice import choose_device, open_engine
from w2v_runtime.engines.group import SeveralEngines
from w2v_runtime.engines.host_memory import Buffer, Buffers, page_locked, pageable
from w2v_runtime.threads.stop import Stop

RATE = 16000
OUTPUTS = [EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE]


@pytest.fixture
def bundle(bundles) -> Path:
    return bundles("base")


def feeds_of(*seconds: float) -> dict[str, np.ndarray]:
    waveform, lengths = pad([speech(length) for length in seconds])
    return {WAVEFORM: waveform, LENGTHS: lengths}


BATCHES = [feeds_of(0.5), feeds_of(1.0, 0.9, 0.3), feeds_of(0.1), feeds_of(1.3, 1.2)]


def bound(engine: Any) -> Any:
    """An engine on the processor that runs as one on CUDA does."""
    engine._buffers, engine.concurrency = Buffers(pageable), 2
    return engine


def test_bound_buffers_change_nothing(bundle):
    plain, other = (open_engine(Bundle.open(bundle), "cpu") for _ in range(2))
    bound(other)
    for feeds in (*BATCHES, *reversed(BATCHES)):
        for mine, theirs in zip(other.run(feeds, OUTPUTS), plain.run(feeds, OUTPUTS), strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.flags.owndata or mine.base is not None
    assert len(other._buffers._idle) == 1  # one run at a time needs one


def test_results_outlive_the_buffers(bundle):
    engine = bound(open_engine(Bundle.open(bundle), "cpu"))
    kept = engine.run(BATCHES[1], OUTPUTS)
    copies = [array.copy() for array in kept]
    for feeds in BATCHES:
        engine.run(feeds, OUTPUTS)
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_runs_at_once_do_not_mix(bundle):
    engine = bound(open_engine(Bundle.open(bundle), "cpu", threads=1))
    expected = [engine.run(feeds, OUTPUTS)[0] for feeds in BATCHES]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            answers = threads.map(lambda feeds: engine.run(feeds, OUTPUTS)[0], BATCHES)
            for answer, right in zip(answers, expected, strict=True):
                np.testing.assert_array_equal(answer, right)
    assert 1 <= len(engine._buffers._idle) <= 4


def test_a_buffer_grows_only():
    sizes = []

    def allocate(size: int) -> np.ndarray:
        sizes.append(size)
        return pageable(size)

    buffer = Buffer(allocate)
    for shape in ((3, 100), (2, 50), (4, 200)):
        arrays = {"a": np.random.rand(*shape).astype(np.float32), "b": np.arange(shape[0])}
        for name, copy in buffer.filled(arrays).items():
            np.testing.assert_array_equal(copy, arrays[name])
            assert copy.dtype == arrays[name].dtype
            assert copy.ctypes.data % 16 == buffer._bytes.ctypes.data % 16
    assert len(sizes) == 2
    assert sizes[0] < sizes[1]


def test_page_locked_memory_is_asked_of_the_driver_and_usual_where_it_refuses():
    import ctypes

    held = []

    class Runtime:
        def __init__(self, code: int) -> None:
            self.code = code

        def cudaSetDevice(self, device: int) -> int:  # noqa: N802
            assert device == 3
            return 0

        def cudaHostAlloc(self, pointer: Any, size: Any, flags: int) -> int:  # noqa: N802
            assert flags == 0
            if self.code == 0:
                held.append(ctypes.create_string_buffer(size.value))
                pointer._obj.value = ctypes.addressof(held[-1])
            return self.code

    locked = page_locked(Runtime(0), 3)(1000)
    locked[:] = 7
    assert held[0].raw == b"\x07" * 1000
    assert page_locked(Runtime(2), 3)(1000).shape == (1000,)


def test_several_engines_share_the_work(bundle):
    opened = Bundle.open(bundle)
    engines = [open_engine(opened, "cpu", threads=1) for _ in range(3)]
    whole = SeveralEngines(engines)
    whole.prepare(OUTPUTS)
    assert (whole.device, whole.concurrency) == ("cpu", 3)
    expected = [engines[0].run(feeds, OUTPUTS)[0] for feeds in BATCHES]
    barrier, used = threading.Barrier(3), []
    for engine in engines:
        run = engine.run

        def waiting(*arguments: Any, run: Any = run, engine: Any = engine) -> Any:
            used.append(engine)
            barrier.wait(20)  # none ends before all three have begun
            return run(*arguments)

        engine.run = waiting
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda feeds: whole.run(feeds, OUTPUTS)[0], BATCHES[:3]))
    assert {id(engine) for engine in used} == {id(engine) for engine in engines}
    for answer, right in zip(answers, expected, strict=False):
        np.testing.assert_array_equal(answer, right)
    assert whole.busy_seconds > 0


def test_stopping_ends_one_caller_s_runs_and_no_others(bundle):
    """Two callers with two long runs each on two engines: one caller's end, at once and with its later ones."""
    whole = SeveralEngines([bound(open_engine(Bundle.open(bundle), "cpu", threads=1)) for _ in range(2)])
    long, mine, other = feeds_of(*[30.0] * 4), Stop(), Stop()
    expected = whole.run(long, OUTPUTS)
    with ThreadPoolExecutor(4) as threads:

        def begun(stop: Stop) -> list[Future[Any]]:
            return [threads.submit(whole.run, long, OUTPUTS, "graph", stop) for _ in range(2)]

        stopped, kept = begun(mine), begun(other)
        while len(mine._ends) + len(other._ends) < 4:
            time.sleep(0.001)
        mine.stop()
        for run in stopped:
            with pytest.raises(W2VError, match="stopped"):
                run.result(timeout=30)
        assert not all(run.done() for run in kept)
        with pytest.raises(W2VError, match="stopped"):
            whole.run(BATCHES[0], OUTPUTS, stop=mine)
        for run in kept:
            for answer, right in zip(run.result(timeout=60), expected, strict=True):
                np.testing.assert_array_equal(answer, right)
    assert not mine._ends | other._ends


def test_time_with_several_runs_in_progress_counts_once():
    watch, both = Stopwatch(), threading.Barrier(2)

    def inside() -> None:
        with watch:
            both.wait(10)
            time.sleep(0.2)
            both.wait(10)

    begin = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: inside(), range(2)))
    assert 0.2 <= watch.seconds <= time.perf_counter() - begin


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ("Failed to allocate memory for requested buffer of size 123", True),
        ("CUDA failure 2: out of memory ; GPU=0 ; hostname=x", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("std::bad_alloc", True),
        ("Non-zero status code returned while running Add node", False),
    ],
)
def test_short_memory_is_told_from_other_faults(bundle, said, short):
    engine = bound(open_engine(Bundle.open(bundle), "cpu"))

    class Failing:
        def io_binding(self) -> Any:
            raise RuntimeError(said)

    opened = engine._sessions.get(OUTPUTS, "graph")
    engine._sessions.get = lambda outputs, graph: dataclasses.replace(opened, session=Failing())
    with pytest.raises(W2VError, match=said.split()[0]) as caught:
        engine.run(BATCHES[0], OUTPUTS)
    assert isinstance(caught.value, OutOfMemoryError) == short


@pytest.fixture
def recordings(tmp_path) -> list[str]:
    paths = [tmp_path / f"{i:03}.wav" for i in range(150)]
    for i, path in enumerate(paths):
        soundfile.write(path, speech(1.0 + 0.005 * (i % 3)), RATE)
    return [str(path) for path in paths]


@pytest.mark.parametrize("runs", [1, 2])
def test_a_batch_that_does_not_fit_is_halved_and_later_ones_are_smaller(bundle, recordings, runs):
    expected = [result.values for result in Embedder(bundle, device="cpu").embed_files(recordings)]
    embedder = Embedder(bundle, device="cpu")
    engine, run, sizes = embedder.engine, embedder.engine.run, []
    engine.concurrency = runs

    def limited(feeds: Any, outputs: Any, **options: Any) -> Any:
        size = feeds[WAVEFORM].size
        sizes.append(size)
        if size > 5 * RATE:
            raise OutOfMemoryError("The engine failed: out of memory")
        return run(feeds, outputs, **options)

    engine.run = limited
    results = list(embedder.embed_files(recordings, batch_seconds=16.5))
    for result, right in zip(results, expected, strict=True):
        assert isinstance(result, Embedding)
        np.testing.assert_allclose(result.values, right, atol=1e-5)
    failed = [size for size in sizes if size > 5 * RATE]
    assert max(sizes) > 15 * RATE
    # 16 s and its halves of 8 s, and those that were running or ready by then.
    assert len(failed) <= 3 * (runs + 2)
    assert max(sizes[-20:]) <= 5 * RATE


def test_another_fault_leaves_the_batches_as_large_as_they_were(bundle, recordings):
    embedder = Embedder(bundle, device="cpu")
    engine, run, sizes = embedder.engine, embedder.engine.run, []

    def failing_once(feeds: Any, outputs: Any, **options: Any) -> Any:
        sizes.append(feeds[WAVEFORM].size)
        if len(sizes) == 1:
            raise W2VError("The engine failed.")
        return run(feeds, outputs, **options)

    engine.run = failing_once
    assert all(isinstance(result, Embedding) for result in embedder.embed_files(recordings, batch_seconds=8.5))
    assert len([size for size in sizes if size > 7 * RATE]) >= 4


def test_the_longest_input_comes_first_where_asked_for():
    pool = Pool(budget=10, longest_first=True)
    for samples in (3, 9, 5, 3):
        pool.add(samples, samples)
    assert [pool.take() for _ in range(3)] == [[9], [3, 3], [5]]


@pytest.mark.parametrize(
    ("device", "word"),
    [
        ("cuda:0,cuda:0", "names a GPU twice"),
        ("cuda:0,cpu", "is unknown"),
        ("cuda:0,1", "is unknown"),
        ("cpu,cpu", "is unknown"),
        ("cuda:", "is unknown"),
        ("cuda:0,", "is unknown"),
    ],
)
def test_lists_of_devices_are_of_gpus_that_differ(device, word):
    with pytest.raises(EngineError, match=word):
        choose_device(device, "fp32")


def test_several_gpus_are_refused_where_there_is_no_cuda(bundle):
    assert choose_device("cuda:0,cuda:12", "fp16") == "cuda:0,cuda:12"
    with pytest.raises(EngineError, match="CUDA"):
        Embedder(Path(bundle), device="cuda:0,cuda:1")


def test_a_session_tells_what_it_leaves_to_the_processor(bundle):
    """Where everything runs there: the arithmetic of shapes is no fault, products are."""
    folder = Path(bundle) / "onnx"
    options = onnxruntime.SessionOptions()
    for key, value in {"session.model_external_initializers_file_folder_path": str(folder), **RECORD}.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession((folder / "model.onnx").read_bytes(), options, ["CPUExecutionProvider"])
    every, wrong = on_processor(session), misplaced(session)
    assert every["Gather"] > 0
    assert "Gather" not in wrong
    assert wrong["LayerNormalization"] > 0
    assert wrong <= every
