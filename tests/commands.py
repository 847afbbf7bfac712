"""``w2v-embed`` in processes of its own: started, watched, stopped, and what it left read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from conftest import speech

#: A shell that runs tests in the background may have Ctrl-C ignored in them; a user's terminal has not.
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
MAIN += "from w2v_runtime.commands.embed import main; main()"


def start(
    *arguments: object, before: str = "", stdin: int = subprocess.DEVNULL, **environment: str | None
) -> subprocess.Popen[str]:
    """Start the command in a session of its own, after the code ``before``; a variable that is None is not set."""
    variables = os.environ | environment
    return subprocess.Popen(
        [sys.executable, "-c", before + MAIN, *map(str, arguments)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={name: value for name, value in variables.items() if value is not None},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a command that has nothing to say on standard output: its exit code and its standard error."""
    output, errors = process.communicate(timeout=120)
    assert output == ""
    assert "Traceback" not in errors
    return process.returncode, errors


def embed(*arguments: object, before: str = "", **environment: str | None) -> tuple[int, str]:
    """Run the command to its end: its exit code and its standard error."""
    return finish(start(*arguments, before=before, **environment))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is so, as long as the process lives."""
    while not condition() and process.poll() is None:
        time.sleep(0.005)


def run_merge(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``w2v-merge`` to its end."""
    code = "from w2v_runtime.commands.merge import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def write_corpus(folder: Path, count: int, median: float = 0.8) -> Path:
    """A folder of recordings of unequal lengths, ``000.wav`` and on."""
    folder.mkdir()
    seconds = np.clip(np.random.default_rng(1).lognormal(np.log(median), 0.6, count), 0.1, 5 * median)
    for index, length in enumerate(seconds):
        soundfile.write(folder / f"{index:03}.wav", speech(float(length), seed=index), 16000)
    return folder


def journal_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.w2v-journal")


def values_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.w2v-values")


def journal_line(line: bytes) -> bytes:
    """A line of a journal with the checksum that belongs to what it says."""
    data = json.loads(line)
    data.pop("crc32", None)
    text = json.dumps(data, separators=(",", ":")).encode()
    return text[:-1] + b',"crc32":%d}' % zlib.crc32(text)


def recorded(output: Path) -> list[str]:
    """File names of the inputs that the journal says are finished; none where there is no journal."""
    if not journal_of(output).exists():
        return []
    lines = journal_of(output).read_bytes().split(b"\n")[1:-1]
    return [Path(json.loads(line)["path"]).name for line in lines]


def results(output: Path) -> tuple[list[str], np.ndarray]:
    """File names and values of an ``.npz``."""
    with np.load(output) as stored:
        return [Path(path).name for path in stored["paths"]], stored["embeddings"]


def assert_same(output: Path, reference: Path) -> None:
    """Equal inputs in equal order, and values equal but for what another composition of batches does to rounding."""
    (names, values), (expected_names, expected) = results(output), results(reference)
    assert names == expected_names
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)


def left_beside(output: Path) -> list[str]:
    """What a run left in the output's folder under names made from the output's."""
    return sorted(path.name for path in output.parent.iterdir() if output.name in path.name)
