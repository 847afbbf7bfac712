"""Requests that take turns: a few graphs stay open, each is opened once and while others run, weights are held once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import speech
from w2v_models import BundleError
from w2v_runtime import Embedder
from w2v_runtime.embedding.results import Request

VOICE = speech(1.5), 16000


@pytest.fixture(params=["cpu", "openvino"])
def embedder(request, bundles) -> Embedder:
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return Embedder(bundles("base"), device=request.param, threads=1)


def opened(embedder: Embedder) -> list[tuple[str, ...]]:
    """Outputs of each graph that is opened from now on."""
    outputs = []
    open_graph = embedder.engine._sessions._open_graph

    def noted(graph: Any) -> Any:
        outputs.append(graph.outputs)
        return open_graph(graph)

    embedder.engine._sessions._open_graph = noted
    return outputs


def test_requests_that_take_turns_open_nothing_again(embedder):
    """Two layers in turn, the default between them: two graphs are opened in all, and every answer is the same bits."""
    notes, answers = opened(embedder), {}
    for _ in range(4):
        for layer in (1, "last", 2):
            answers.setdefault(layer, []).append(embedder.embed(VOICE, layer=layer).values)
    assert notes == [("layer_1_mean",), ("layer_2_mean",)]
    for found in answers.values():
        assert all(np.array_equal(value, found[0]) for value in found)
    assert not np.allclose(answers[1][0], answers[2][0], atol=0.1)


def test_a_request_gets_the_same_bits_whatever_was_asked_before(embedder):
    """Also after its graph was given up, and after requests that hold it: it has a graph of its own, opened alike."""
    first = {layer: embedder.embed(VOICE, layer=layer).values for layer in (0, 1, 2, 3, "last")}
    embedder.embed(VOICE, layer="all")
    for pooling in ("std", "min", "max", ("mean", "std")):
        embedder.embed(VOICE, layer=1, pooling=pooling)
    notes = opened(embedder)
    for layer, value in first.items():
        assert np.array_equal(embedder.embed(VOICE, layer=layer).values, value)
    assert len(notes) == 4, "these had been given up"


def test_what_it_was_opened_for_stays_open_and_few_others(bundles, embedder):
    """The number is stated: four beside the first on the processor, two where each holds its weights itself."""
    recent = {"cpu": 4, "openvino": 2}[embedder.engine.device]
    for layer in range(4):
        for pooling in ("mean", "max"):
            embedder.embed(VOICE, layer=layer, pooling=pooling)
    notes, places = opened(embedder), embedder.engine._sessions._places
    assert len(places) == 1 + recent
    embedder.embed(VOICE)
    embedder.embed(VOICE, layer=3, pooling="max")
    embedder.embed(VOICE, layer=3, pooling="mean")
    assert notes == []
    middle = Embedder(bundles("base"), device=embedder.engine.device, threads=1, request=Request.of("frame", "mean", 2))
    notes = opened(middle)
    for layer in range(4):
        middle.embed(VOICE, layer=layer)
        middle.embed(VOICE, layer=layer, pooling="max")
        middle.embed(VOICE, level="frame", layer=2)
    assert len(notes) == 8


def test_a_graph_is_opened_once_and_no_run_waits_for_it(embedder):
    """While one is being opened, which takes long here, runs of those that are open go on; all who wait get it."""
    expected = embedder.embed(VOICE).values
    sessions = embedder.engine._sessions
    open_graph, opening, go, count = sessions._open_graph, threading.Event(), threading.Event(), []

    def slowly(graph: Any) -> Any:
        count.append(graph.outputs)
        opening.set()
        assert go.wait(60)
        return open_graph(graph)

    sessions._open_graph = slowly
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(embedder.embed, VOICE, layer=1) for _ in range(4)]
        assert opening.wait(60)
        for _ in range(3):
            assert np.array_equal(embedder.embed(VOICE).values, expected)
        assert not any(answer.done() for answer in waiting)
        go.set()
        values = [answer.result(timeout=60).values for answer in waiting]
    assert count == [("layer_1_mean",)]
    assert all(np.array_equal(value, values[0]) for value in values)


def test_a_graph_that_could_not_be_opened_is_tried_again(bundles, tmp_path):
    """Every caller is told why; once the file is right again, so is the answer."""
    folder = shutil.copytree(bundles("base"), tmp_path / "bundle")
    embedder, layers = Embedder(folder, device="cpu"), folder / "onnx" / "layers.onnx"
    expected, content = Embedder(bundles("base"), device="cpu").embed(VOICE, layer=1).values, layers.read_bytes()
    layers.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(BundleError, match=r"layers\.onnx is not the file its manifest names"):
            embedder.embed(VOICE, layer=1)
    with pytest.raises(BundleError, match=r"layers\.onnx is not the file its manifest names"):
        next(embedder.embed_files([VOICE], layer=1))
    layers.write_bytes(content)
    np.testing.assert_array_equal(embedder.embed(VOICE, layer=1).values, expected)


def test_many_threads_with_many_requests_get_their_own_answers(embedder):
    """Six threads, more requests than stay open, in an order of their own: each answer is the right one's bits."""
    requests = [{"layer": layer, "pooling": pooling} for layer in (0, 1, 2) for pooling in ("mean", "std")]
    expected = [embedder.embed(VOICE, **request).values for request in requests]

    def work(seed: int) -> None:
        for index in np.random.default_rng(seed).integers(0, len(requests), 8):
            assert np.array_equal(embedder.embed(VOICE, **requests[index]).values, expected[index])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))


MEMORY = """
import sys
import numpy as np
from w2v_runtime import Embedder

def anonymous():
    "MiB that this process holds beside the files that it maps."
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous:"))

embedder = Embedder(sys.argv[1], device="cpu", threads=1)
voice = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1, 16000
embedder.embed(voice)
before = anonymous()
for layer in (1, 2, 3):
    embedder.embed(voice, layer=layer)
print(anonymous() - before)
long = np.tile(voice[0], 35), 16000
for layer in (1, 2, 3):
    embedder.embed(long, layer=layer)
print(anonymous() - before)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A bundle whose three blocks weigh 25 MB, nearly all of it."""
    transformers = pytest.importorskip("transformers")
    from conftest import GROUP, TINY
    from w2v_export import export_bundle

    folder = tmp_path_factory.mktemp("wide")
    sizes = TINY | {"hidden_size": 256, "intermediate_size": 4000}
    transformers.Wav2Vec2Config(**sizes, **GROUP, vocab_size=32).save_pretrained(folder / "checkpoint")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "checkpoint")
    return export_bundle(folder / "checkpoint", folder / "bundle", random_weights=True).folder


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is told from maps by Linux alone")
def test_weights_are_held_once(wide):
    """Three more graphs, of 50 MB in all, take little of it; runs of 35 s, of 300 MB, give back what they took."""
    done = subprocess.run([sys.executable, "-c", MEMORY, wide], capture_output=True, text=True, check=True)
    short, long = map(float, done.stdout.split())
    assert short < 35
    assert long < 120
