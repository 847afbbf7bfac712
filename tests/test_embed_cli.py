"""``w2v-embed`` as a user runs it: a real process, real files, the output read back, the exit code."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import LABELS, speech
from w2v_runtime import Embedder, Failure
from w2v_runtime.stores.names import path_of


def run(
    *arguments: object, command: str = "w2v_runtime.commands.embed", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command's ``main`` in a process of its own."""
    code = f"from {command} import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
        check=False,
    )


def failures_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_is_embedded_in_order(bundles, recordings, tmp_path):
    """Files of a folder, recursively, in name order; values are those of each recording alone."""
    done = run(recordings, "--model", bundles("base"), "-o", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    embedder = Embedder(bundles("base"))
    with np.load(tmp_path / "out.npz", allow_pickle=False) as output:
        names = [str(Path(path).relative_to(recordings)) for path in output["paths"]]
        assert names == ["a.wav", "d.wav", "e.wav", "b/a.wav", "b/c.flac"]
        for path, values, seconds in zip(output["paths"], output["embeddings"], output["durations"], strict=True):
            alone = embedder.embed(str(path))
            assert np.abs(values - alone.values).max() <= 2e-5
            assert seconds == pytest.approx(alone.duration)
        metadata = json.loads(str(output["metadata"]))
    assert metadata["model"] == embedder.manifest.source.model
    assert metadata["bundle"] == embedder.manifest.sha256
    assert (metadata["random_weights"], metadata["level"], metadata["device"]) == (False, "utterance", "cpu")
    assert not (tmp_path / "out.npz.failures.jsonl").exists()


def test_frames_with_their_times(bundles, recordings, tmp_path):
    """Frame level gives every frame; times in the csv step by 20 ms and are 25 ms wide."""
    assert (
        run(recordings / "d.wav", "-m", bundles("large"), "--level", "frame", "-o", tmp_path / "o.npz").returncode == 0
    )
    assert (
        run(recordings / "d.wav", "-m", bundles("large"), "--level", "frame", "-o", tmp_path / "o.csv").returncode == 0
    )
    alone = Embedder(bundles("large")).embed(recordings / "d.wav", level="frame").values
    with np.load(tmp_path / "o.npz") as output:
        assert np.abs(output["embeddings"] - alone).max() <= 1e-5
        assert output["frame_offsets"].tolist() == [0, len(alone)]
        stored = output["embeddings"]
    with (tmp_path / "o.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:4] == ["file", "start", "end", "f0"]
    assert len(rows) == len(alone)
    assert [float(rows[i][1]) for i in (0, 1, 10)] == pytest.approx([0, 0.02, 0.2])
    assert [float(rows[i][2]) for i in (0, 1, 10)] == pytest.approx([0.025, 0.045, 0.225])
    assert np.array_equal(np.array([row[3:] for row in rows], np.float32), stored)


def test_poolings_are_concatenated_in_the_order_given(bundles, recordings, tmp_path):
    """``max,mean,std,min`` equals numpy's statistics of the frames."""
    target = tmp_path / "o.npz"
    assert (
        run(recordings / "e.wav", "-m", bundles("base"), "--pooling", "max,mean,std,min", "-o", target).returncode == 0
    )
    frames = Embedder(bundles("base")).embed(recordings / "e.wav", level="frame").values
    expected = np.concatenate([frames.max(0), frames.mean(0), frames.std(0), frames.min(0)])
    with np.load(target) as output:
        assert output["embeddings"].shape == (1, 4 * 48)
        assert np.abs(output["embeddings"][0] - expected).max() <= 2e-5


def test_the_emotion_head_travels_with_the_embedding(bundles, recordings, tmp_path):
    """Logits stand in every format under the names of the checkpoint's labels."""
    assert run(recordings, "-m", bundles("emotion"), "-o", tmp_path / "o.csv").returncode == 0
    assert run(recordings, "-m", bundles("emotion"), "-o", tmp_path / "o.npz").returncode == 0
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with np.load(tmp_path / "o.npz") as output:
        assert tuple(output["logit_names"]) == LABELS
        logits = output["logits"]
    for row, values in zip(rows, logits, strict=True):
        alone = Embedder(bundles("emotion")).embed(row["file"])
        assert np.array_equal(np.array([row[label] for label in LABELS], np.float32), values)
        assert np.abs(alone.logits - values).max() <= 2e-5


def test_json_lines_on_standard_output(bundles, recordings, tmp_path):
    """``-o -`` prints one object an input, in order, and nothing else; failures go to standard error."""
    (recordings / "c.wav").write_bytes(b"")
    done = run(recordings, "-m", bundles("base"), "-o", "-")
    assert done.returncode == 3
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = [str(Path(line["file"]).relative_to(recordings)) for line in lines]
    assert names == ["a.wav", "d.wav", "e.wav", "b/a.wav", "b/c.flac"]
    assert all(len(line["embedding"]) == 48 for line in lines)
    assert "c.wav: " in done.stderr


def test_a_folder_of_arrays(bundles, recordings, tmp_path):
    """An output that ends in / holds one .npy an input in the inputs' tree, and metadata.json."""
    assert run(recordings, "-m", bundles("base"), "-o", f"{tmp_path}/out/").returncode == 0
    arrays = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.npy"))
    assert [name.split("recordings/")[-1] for name in arrays] == [
        "a.wav.npy", "b/a.wav.npy", "b/c.flac.npy", "d.wav.npy", "e.wav.npy"
    ]  # fmt: skip
    assert np.load(tmp_path / "out" / arrays[0]).shape == (48,)
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["level"] == "utterance"


def test_exactly_the_bad_inputs_fail(bundles, recordings, tmp_path):
    """Unreadable, empty, too short and non-finite inputs fail with stage and reason; the others are embedded."""
    good = speech(1.0)
    bad = {
        "empty.wav": "no samples",
        "text.wav": "unsupported",
        "short.wav": "too short",
        "nan.wav": "finite",
        "missing.wav": "",
    }
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("<html>not found</html>")
    soundfile.write(tmp_path / "short.wav", good[:399], 16000)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(len(good)) == 77, np.nan, good), 16000, subtype="FLOAT")
    inputs = [recordings / "a.wav", *(tmp_path / name for name in bad), recordings / "d.wav"]
    done = run(*inputs, "-m", bundles("base"), "-o", tmp_path / "o.npz")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    with np.load(tmp_path / "o.npz") as output:
        assert list(output["paths"]) == [str(recordings / "a.wav"), str(recordings / "d.wav")]
        assert np.isfinite(output["embeddings"]).all()
    failed = failures_of(tmp_path / "o.npz.failures.jsonl")
    assert {Path(entry["path"]).name for entry in failed} == set(bad)
    for entry in failed:
        assert set(entry) == {"path", "stage", "reason"}
        assert entry["stage"] == "read"
        assert bad[Path(entry["path"]).name] in entry["reason"]


def test_one_frame_is_enough_and_short_audio_can_be_padded(bundles, tmp_path):
    """400 samples embed; 399 only with --pad-short, with a warning that --strict turns into a failure."""
    soundfile.write(tmp_path / "one.wav", speech(1)[:400], 16000)
    soundfile.write(tmp_path / "short.wav", speech(1)[:399], 16000)
    assert run(tmp_path / "one.wav", "-m", bundles("base"), "-o", tmp_path / "a.npz").returncode == 0
    assert run(tmp_path / "short.wav", "-m", bundles("base"), "-o", tmp_path / "b.npz").returncode == 3
    done = run(tmp_path / "short.wav", "-m", bundles("base"), "-o", "-", "--pad-short")
    assert done.returncode == 0
    assert "padded" in json.loads(done.stdout)["warnings"][0]
    assert run(tmp_path / "short.wav", "-m", bundles("base"), "-o", "-", "--pad-short", "--strict").returncode == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--level", "word"], "utterance, frame"),
        (["--pooling", "median"], "mean, std, min, max"),
        (["--level", "frame", "--pooling", "mean"], "--pooling makes one vector of all frames"),
        (["--layer", "99"], "last"),
        (["--device", "abacus"], "auto, cpu, cuda"),
        (["--precision", "fp8"], "fp32"),
        (["--channel", "left"], "channel"),
        (["--shard", "4/3"], "I/N"),
        (["--batch-seconds", "0"], "positive"),
        (["--jobs", "0"], "at least 1"),
        (["-o", "out.xls"], ".npz"),
        (["--model", "nobody/nothing"], "w2v-export --model nobody/nothing"),
        (["--model", "/"], "manifest.json"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_requests_are_refused_with_the_fix(bundles, recordings, tmp_path, arguments, says):
    """Exit 2, one sentence, no traceback, nothing written."""
    rest = [] if "--model" in arguments else ["--model", bundles("base")]
    rest += [] if "-o" in arguments else ["-o", tmp_path / "out.npz"]
    done = run(recordings, *rest, *arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [recordings]


def test_an_existing_output_is_refused(bundles, recordings, tmp_path):
    """With neither --resume nor --overwrite it is left as it was; with --overwrite it is replaced."""
    target = tmp_path / "o.npz"
    target.write_bytes(b"thesis")
    done = run(recordings, "-m", bundles("base"), "-o", target)
    assert (done.returncode, target.read_bytes()) == (2, b"thesis")
    assert "--overwrite" in done.stderr
    assert "--resume" in done.stderr
    assert run(recordings, "-m", bundles("base"), "-o", target, "--overwrite").returncode == 0
    with np.load(target) as output:
        assert len(output["paths"]) == 5


def test_the_model_is_found_by_id_environment_or_being_the_only_one(bundles, recordings, tmp_path):
    """$W2V_MODEL, the only bundle in $W2V_HOME, or a refusal that lists them."""
    home = tmp_path / "home"
    home.mkdir()
    arguments = (recordings / "a.wav", "-o", "-")
    done = run(*arguments, W2V_HOME=str(home))
    assert done.returncode == 2
    assert "w2v-export" in done.stderr
    assert run(*arguments, W2V_HOME=str(home), W2V_MODEL=str(bundles("base"))).returncode == 0
    (home / "org--one").symlink_to(bundles("base"))
    assert run(*arguments, W2V_HOME=str(home)).returncode == 0
    assert run(*arguments, "--model", "org/one", W2V_HOME=str(home)).returncode == 0
    (home / "org--two").symlink_to(bundles("large"))
    done = run(*arguments, W2V_HOME=str(home))
    assert done.returncode == 2
    assert f"({home}/org--one, {home}/org--two); choose one with --model" in done.stderr


def test_lists_of_inputs(bundles, recordings, tmp_path):
    """Names come from a file or standard input, newline or NUL separated, any bytes, and round-trip."""
    odd = os.fsencode(tmp_path) + b"/od\xff d\n-name.wav"
    soundfile.write(tmp_path / "x.wav", speech(0.5), 16000)
    os.rename(tmp_path / "x.wav", odd)
    (tmp_path / "list").write_bytes(odd + b"\0" + os.fsencode(recordings / "a.wav") + b"\0")
    done = run("--files-from", tmp_path / "list", "--null", "-m", bundles("base"), "-o", "-")
    assert done.returncode == 0, done.stderr
    assert [os.fsencode(path_of(json.loads(line)["file"])) for line in done.stdout.splitlines()] == [
        odd,
        os.fsencode(recordings / "a.wav"),
    ]


def test_python_embeds_as_the_command_does(bundles, recordings):
    """``embed_files`` yields embeddings and failures in the order of the paths."""
    embedder = Embedder(bundles("emotion"))
    paths = [recordings / "e.wav", recordings / "nothing.wav", recordings / "a.wav"]
    first, failure, last = embedder.embed_files(paths, level="frame")
    assert isinstance(failure, Failure)
    assert (failure.path, failure.stage) == (str(paths[1]), "read")
    for result, path in ((first, paths[0]), (last, paths[2])):
        assert result.path == str(path)
        assert np.abs(result.values - embedder.embed(path, level="frame").values).max() <= 2e-5


@pytest.mark.parametrize("output", ["out.npz", "out/", "-"])
def test_inputs_without_audio_are_refused(bundles, tmp_path, output):
    """Folders and lists that hold no recording: exit 2, the places named, no output, before the model is opened."""
    places = ("photos", "notes", "more", "yet-more")
    for place in places:
        (tmp_path / place).mkdir()
    (tmp_path / "notes" / "note.txt").write_text("no sound")
    (tmp_path / "list").write_text("\n\n")
    before = sorted(tmp_path.iterdir())
    target = output if output == "-" else f"{tmp_path}/{output}"
    arguments = ("-m", bundles("base"), "-o", target)
    for inputs, named in (
        ([tmp_path / "notes"], f"in {tmp_path / 'notes'};"),
        ([tmp_path / place for place in places], f"in {', '.join(str(tmp_path / place) for place in places[:3])}, …;"),
        (["--files-from", tmp_path / "list"], f"in the list {tmp_path / 'list'};"),
        ([tmp_path / "photos", "--files-from", "-"], f"in {tmp_path / 'photos'}, the list on standard input;"),
        ([tmp_path / "photos", "--shard", "2/3"], f"in {tmp_path / 'photos'};"),
    ):
        done = run(*inputs, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"no audio was found {named}" in done.stderr
        assert sorted(tmp_path.iterdir()) == before


def test_inputs_without_audio_leave_an_earlier_output(bundles, recordings, tmp_path):
    """Neither --resume nor --overwrite with an empty folder touches what was embedded before."""
    output, empty = tmp_path / "o.npz", tmp_path / "empty"
    empty.mkdir()
    assert run(recordings, "-m", bundles("base"), "-o", output).returncode == 0
    before = output.read_bytes(), output.stat().st_mtime_ns
    for choice in ("--resume", "--overwrite"):
        assert run(empty, "-m", bundles("base"), "-o", output, choice).returncode == 2
        assert (output.read_bytes(), output.stat().st_mtime_ns) == before


def test_a_shard_may_be_empty(bundles, recordings, tmp_path):
    """More shards than inputs: exit 0, an output without inputs, and all of them join to the whole."""
    arguments = (recordings / "a.wav", "-m", bundles("base"), "--shard")
    full = run(*arguments, "1/2", "-o", tmp_path / "1.npz")
    empty = run(*arguments, "2/2", "-o", tmp_path / "2.npz")
    assert (full.returncode, empty.returncode) == (0, 0)
    assert "1 file embedded, " in full.stderr
    assert f"nothing to do: shard 2/2 holds none of the inputs → {tmp_path / '2.npz'}\n" in empty.stderr
    with np.load(tmp_path / "2.npz") as output:
        assert output["embeddings"].shape == (0, 48)
    parts = (tmp_path / "1.npz", tmp_path / "2.npz")
    assert run(*parts, "-o", tmp_path / "all.npz", command="w2v_runtime.commands.merge").returncode == 0
    with np.load(tmp_path / "all.npz") as output:
        assert list(output["paths"]) == [str(recordings / "a.wav")]


def test_the_summary_counts_as_people_do(bundles, recordings, tmp_path):
    """One file is no files, a run with nothing to do says only that, and one that failed measures nothing."""
    output = tmp_path / "o.npz"
    assert ": 5 files embedded, " in run(recordings, "-m", bundles("base"), "-o", output).stderr
    again = run(recordings, "-m", bundles("base"), "-o", output, "--resume")
    assert again.stderr == f"w2v-embed: nothing to do: 5 files were finished already → {output}\n"
    os.utime(recordings / "a.wav", ns=(0, 0))
    changed = run(recordings, "-m", bundles("base"), "-o", output, "--resume")
    assert "4 files were finished already, 1 file embedded, " in changed.stderr
    fewer = run(recordings / "a.wav", "-m", bundles("base"), "-o", output, "--resume", "--prune")
    assert fewer.stderr == f"w2v-embed: 1 file was finished already, 4 results dropped → {output}\n"
    one = run(recordings / "a.wav", "-m", bundles("base"), "-o", output, "--resume")
    assert one.stderr == f"w2v-embed: nothing to do: 1 file was finished already → {output}\n"
    (tmp_path / "empty.wav").touch()
    failed = run(tmp_path / "empty.wav", "-m", bundles("base"), "-o", tmp_path / "f.npz")
    summary = f"0 files embedded, 1 failed (see {tmp_path / 'f.npz.failures.jsonl'}) → {tmp_path / 'f.npz'}"
    assert failed.stderr.splitlines()[-1] == f"w2v-embed: {summary}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"first.wav\nsecond.wav\n", "this looks like text; leave it out, or give it with --files-from"),
        (b"<!doctype html>", "this looks like an HTML page; it may stand for a recording"),
        (b"PK\x03\x04" + bytes(60), "this looks like a ZIP archive; unpack it"),
        (b"#!AMR\n" + bytes(60), "unsupported format: this looks like AMR"),
    ],
)
def test_what_is_no_recording_is_not_to_be_converted(bundles, tmp_path, content, says):
    """The hint to convert is given for foreign audio alone; text, pages and archives get one that helps."""
    (tmp_path / "input").write_bytes(content)
    done = run(tmp_path / "input", "-m", bundles("base"), "-o", tmp_path / "o.npz")
    assert done.returncode == 3
    assert says in done.stderr
    assert ("ffmpeg" in done.stderr.lower()) == content.startswith(b"#!AMR")


def test_verify_needs_no_pytorch_and_sees_a_changed_weight(bundles, tmp_path):
    """``w2v-models verify`` passes on a whole bundle, and refuses one in which a byte of the weights was changed."""
    import shutil

    done = run("verify", bundles("emotion"), command="w2v_runtime.commands.models")
    assert done.returncode == 0, done.stderr
    assert "equals its reference" in done.stdout
    shutil.copytree(bundles("emotion"), tmp_path / "b")
    data = tmp_path / "b" / "onnx" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    done = run("verify", tmp_path / "b", command="w2v_runtime.commands.models")
    assert done.returncode == 2
    assert "SHA-256" in done.stderr
    assert run(tmp_path / "b", "-m", tmp_path / "b", "-o", tmp_path / "o.npz").returncode == 2


def test_help_is_quick_and_light(tmp_path):
    """``--help`` imports neither an engine nor numpy nor anything of PyTorch."""
    code = (
        "import sys; sys.argv=['w2v-embed','--help']\n"
        "from w2v_runtime.commands.embed import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy={'numpy','onnxruntime','soundfile','soxr','torch','transformers','onnx'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--files-from" in done.stdout


def test_the_commands_defaults_are_those_of_python():
    """Whole, window and context are shown by --help as the Python API has them."""
    from inspect import signature

    from w2v_runtime.commands.embed import embed
    from w2v_runtime.embedding.windows import Windowing

    defaults = {name: parameter.default for name, parameter in signature(embed).parameters.items()}
    assert Windowing(*(defaults[name] for name in ("window", "context", "whole"))) == Windowing()
