"""Faults that strike while a run is under way, in real processes: what is hit fails alone, or all stops in order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from commands import assert_same, embed, left_beside, results, write_corpus
from conftest import speech
from w2v_runtime import Embedder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight recordings."""
    return write_corpus(tmp_path_factory.mktemp("faults") / "corpus", 8)


@pytest.fixture(scope="module")
def uninterrupted(bundles, corpus, tmp_path_factory):
    """Their finished output."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out.npz"
    assert embed(corpus, "-m", bundles("base"), "-o", output)[0] == 0
    return output


def failures(output: Path) -> dict[str, tuple[str, str]]:
    """Stage and reason of each failed input, by its file name."""
    lines = output.with_name(f"{output.name}.failures.jsonl").read_text().splitlines()
    found = map(json.loads, lines)
    return {Path(failure["path"]).name: (failure["stage"], failure["reason"]) for failure in found}


def assert_others(output: Path, reference: Path, *missing: str) -> None:
    """Every input but the missing ones is there, and as it is without the fault."""
    (names, values), (expected_names, expected) = results(output), results(reference)
    kept = [index for index, name in enumerate(expected_names) if name not in missing]
    assert names == [expected_names[index] for index in kept]
    np.testing.assert_allclose(values, expected[kept], rtol=0, atol=1e-5)


#: Calls ``strike()`` once, on the decoding thread, when the first block of ``003.wav`` has been read.
WHILE_READING = """if True:
    import os, shutil, sys
    from w2v_runtime.audio import libsndfile as sound
    read, struck = sound.Sound.read, []
    def read_and_strike(self):
        block = read(self)
        if not struck and os.readlink(f"/proc/self/fd/{self._content.descriptor}").endswith("003.wav"):
            struck.append(True)
            strike()
        return block
    sound.Sound.read = read_and_strike
"""


def long_file(folder: Path, corpus: Path) -> Path:
    """The corpus with a third recording of half a minute, which is read in several blocks."""
    shutil.copytree(corpus, folder)
    soundfile.write(folder / "003.wav", speech(30, seed=3), 16000)
    return folder / "003.wav"


def test_a_fault_of_the_decoder_itself_costs_its_input(bundles, corpus, uninterrupted, tmp_path):
    """An error that nobody foresaw in a decoding thread: that input fails with its name; --resume completes."""
    output = tmp_path / "out.npz"
    before = f"{WHILE_READING}\ndef strike(): raise ZeroDivisionError('in the decoder')\n"
    code, errors = embed(corpus, "-m", bundles("base"), "-o", output, "--batch-seconds", 1, before=before)
    assert code == 3, errors
    assert {tuple(failure) for failure in failures(output).values()} == {
        ("read", "unexpected ZeroDivisionError: in the decoder")
    }
    assert embed(corpus, "-m", bundles("base"), "-o", output, "--resume")[0] == 0
    assert_same(output, uninterrupted)
    assert left_beside(output) == [".out.npz.w2v-journal", "out.npz"]


#: An engine that has no memory for so many frames at once, and says so in ONNX Runtime's words.
NO_MEMORY = """
import onnxruntime
run = onnxruntime.InferenceSession.run
def refuse(self, outputs, feeds, options=None):
    if "features" in feeds and feeds["features"].shape[1] > 20_000:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 2764800000")
    return run(self, outputs, feeds, options)
onnxruntime.InferenceSession.run = refuse
"""


def test_an_input_that_the_memory_cannot_hold_fails_alone(bundles, corpus, uninterrupted, tmp_path):
    """Nine minutes whole exceed the memory: that input fails with the engine's reason and advice, which helps."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    soundfile.write(folder / "003.wav", np.tile(speech(30), 18), 16000)
    output = tmp_path / "out.npz"
    arguments = ("-m", bundles("base"), "-o", output, "--whole", 600)
    code, errors = embed(folder, *arguments, before=NO_MEMORY)
    assert code == 3, errors
    assert list(failures(output)) == ["003.wav"]
    stage, reason = failures(output)["003.wav"]
    assert stage == "embed"
    assert "memory" in reason
    assert "a smaller whole (--whole) embeds it in windows" in reason
    assert_others(output, uninterrupted, "003.wav")
    code, errors = embed(folder, *arguments[:-1], 300, "--overwrite", before=NO_MEMORY)
    assert code == 0, errors


def test_a_long_file_of_many_channels_is_embedded_in_little_memory(bundles, corpus, uninterrupted, tmp_path):
    """A minute of 8 channels at 192 kHz, 370 MB once decoded, pass in windows where that is not to be had."""
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    with soundfile.SoundFile(folder / "003.flac", "w", 192_000, 8) as file:
        block = np.repeat(speech(10, 192_000)[:, None], 8, axis=1)
        for _ in range(6):
            file.write(block)
    (folder / "003.wav").unlink()
    output = tmp_path / "out.npz"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (320 << 20, 320 << 20))\n"
    code, errors = embed(folder, "-m", bundles("base"), "-o", output, "--window", 5, "--context", 1, before=limit)
    assert code == 0, errors
    names, values = results(output)
    assert names[3] == "003.flac"
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    "strike",
    ["os.truncate({path!r}, 500_000)", "open({path!r}, 'r+b').write(bytes(900_000))", "open({path!r}, 'a').write('x')"],
)
def test_a_file_that_is_written_to_while_it_is_read_fails_alone(bundles, corpus, uninterrupted, tmp_path, strike):
    """Cut, overwritten or continued, it would be a mixture of two recordings, or a part of one."""
    path, output = long_file(tmp_path / "corpus", corpus), tmp_path / "out.npz"
    before = f"{WHILE_READING}\ndef strike(): {strike.format(path=str(path))}\n"
    code, errors = embed(path.parent, "-m", bundles("base"), "-o", output, before=before)
    assert code == 3, errors
    assert list(failures(output)) == ["003.wav"]
    assert failures(output)["003.wav"][0] == "read"
    assert failures(output)["003.wav"][1].startswith("written to while it was read: it had 960044 bytes and has ")
    assert_others(output, uninterrupted, "003.wav")


def test_a_file_that_vanishes_while_it_is_read_is_read_to_its_end(bundles, corpus, tmp_path):
    """Its bytes are there for as long as it is open."""
    path, output = long_file(tmp_path / "corpus", corpus), tmp_path / "out.npz"
    whole = Embedder(bundles("base")).embed(path).values
    before = f"{WHILE_READING}\ndef strike(): os.unlink({str(path)!r})\n"
    code, errors = embed(path.parent, "-m", bundles("base"), "-o", output, before=before)
    assert code == 0, errors
    names, values = results(output)
    np.testing.assert_allclose(values[names.index("003.wav")], whole, rtol=0, atol=2e-5)


def test_a_file_that_is_replaced_while_it_is_read_is_redone_by_the_next_run(bundles, corpus, tmp_path):
    """The result is that of the file that was opened; --resume sees that another has its name now."""
    path, output = long_file(tmp_path / "corpus", corpus), tmp_path / "out.npz"
    other = tmp_path / "other.wav"
    soundfile.write(other, speech(2, seed=44), 16000)
    embedder = Embedder(bundles("base"))
    first, second = embedder.embed(path).values, embedder.embed(other).values
    before = f"{WHILE_READING}\ndef strike(): os.replace({str(other)!r}, {str(path)!r})\n"
    assert embed(path.parent, "-m", bundles("base"), "-o", output, before=before)[0] == 0
    np.testing.assert_allclose(results(output)[1][3], first, rtol=0, atol=2e-5)
    code, errors = embed(path.parent, "-m", bundles("base"), "-o", output, "--resume")
    assert code == 0
    assert "7 files were finished already, 1 file embedded" in errors
    np.testing.assert_allclose(results(output)[1][3], second, rtol=0, atol=2e-5)


def test_a_folder_that_vanishes_during_the_search_fails_alone(bundles, corpus, uninterrupted, tmp_path):
    """It is listed as an input that failed; what else was found is embedded."""
    folder, output = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out.npz"
    (folder / "later").mkdir()
    soundfile.write(folder / "later" / "a.wav", speech(1), 16000)
    before = f"{WHILE_READING}\ndef strike(): shutil.rmtree({str(folder / 'later')!r})\n"
    before += "from w2v_runtime.embedding import corpus\n"
    before += "from w2v_runtime.threads import processors; processors.available = lambda: 1\n"
    code, errors = embed(folder, "-m", bundles("base"), "-o", output, "--jobs", 1, before=before)
    assert code == 3, errors
    (failed,) = failures(output)
    assert failed in ("later", "a.wav")
    assert failures(output)[failed][0] == "read"
    assert_others(output, uninterrupted)


def replaced_data(bundle: Path, folder: Path, how: str) -> tuple[Path, str]:
    """A copy of a bundle, and code that exchanges its weights once the model is open, by ``how`` of (new, old)."""
    copy = shutil.copytree(bundle, folder)
    data = copy / "onnx" / "model.onnx_data"
    content = np.frombuffer(data.read_bytes(), np.uint8)
    other = folder.with_name("other-weights")
    other.write_bytes(content[::-1].tobytes())
    return copy, f"{WHILE_READING}\ndef strike(): {how.format(new=str(other), old=str(data))}\n"


REPLACED = "os.replace({new!r}, {old!r})"
OVERWRITTEN = "shutil.copyfile({new!r}, {old!r})"


@pytest.mark.parametrize(
    "how",
    [
        REPLACED,
        pytest.param(OVERWRITTEN, marks=pytest.mark.xfail(reason="ONNX Runtime maps the file", strict=True)),
    ],
)
def test_weights_that_are_exchanged_during_a_run_change_no_result(bundles, corpus, uninterrupted, tmp_path, how):
    """The model is what was checked when it was opened, or the run stops and says that it is not."""
    output = tmp_path / "out.npz"
    bundle, before = replaced_data(bundles("base"), tmp_path / "bundle", how)
    code, errors = embed(corpus, "-m", bundle, "-o", output, "--batch-seconds", 1, "--jobs", 1, before=before)
    assert code in (0, 1), errors
    if code == 0:
        assert_same(output, uninterrupted)
    else:
        assert "model.onnx_data" in errors
        assert not output.exists()


def test_weights_that_are_exchanged_before_a_long_file_are_refused(bundles, corpus, uninterrupted, tmp_path):
    """The graph for windows is opened with the first long file, which fails where its weights are others by then."""
    folder, output = shutil.copytree(corpus, tmp_path / "corpus"), tmp_path / "out.npz"
    soundfile.write(folder / "009.wav", speech(60, seed=9), 16000)
    bundle, before = replaced_data(bundles("base"), tmp_path / "bundle", REPLACED)
    code, errors = embed(folder, "-m", bundle, "-o", output, "--batch-seconds", 1, "--jobs", 1, before=before)
    assert code == 3, errors
    assert list(failures(output)) == ["009.wav"]
    assert "SHA-256" in failures(output)["009.wav"][1]
    assert_others(output, uninterrupted)
