"""Fuzz every target for a while, each in a process of its own that is started again when an input kills it.

python tests/fuzz/campaign.py FOLDER [SECONDS] [TARGET ...]

Prints what was tried and found; exit 1 if anything was. ``FOLDER`` keeps what is worth trying first next time, and
every input that broke a promise, under its SHA-1 in ``TARGET/finds``, with what the process said of it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import soundfile
from audio_seeds import audio_seeds
from bundle_seeds import bundle_seeds
from container_seeds import container_seeds
from journal_seeds import journal_seeds
from list_seeds import list_seeds

_SEEDS: Final = {
    "audio": audio_seeds,
    "containers": container_seeds,
    "lists": list_seeds,
    "bundle": bundle_seeds,
    "journal": journal_seeds,
}
_WORKER: Final = Path(__file__).parent / "worker.py"
#: Seconds for one input, MiB of memory in all, and bytes of an input. These seconds tell a hang: on a busy machine they
#: are many more than the processor's, which the targets bound themselves.
_LIMITS: Final = ("-timeout=120", "-report_slow_units=120", "-rss_limit_mb=1024", "-max_len=16384")
#: A worker that died this often has told enough.
_MAX_FINDS: Final = 20
#: Time that a worker may take beyond its own: to read its seeds, and to end the last input.
_GRACE_SECONDS: Final = 120


@dataclass
class Tally:
    """Inputs tried, seconds that took, and the inputs that broke a promise."""

    inputs: int = 0
    seconds: float = 0.0
    finds: int = 0


def fuzz(target: str, folder: Path, seconds: float) -> Tally:
    """Fuzz one target for ``seconds``."""
    for name in ("seeds", "corpus", "finds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in _SEEDS[target]().items():
        (folder / "seeds" / name).write_bytes(content)
    tally = Tally()
    while (left := seconds - tally.seconds) >= 1 and tally.finds < _MAX_FINDS:
        start = time.monotonic()
        output, failed = _work(target, folder, left)
        tally.seconds += time.monotonic() - start
        tally.inputs += max(map(int, re.findall(r"^(?:#|Done )(\d+)", output, re.MULTILINE)), default=0)
        if failed:
            tally.finds += 1
            _report(output, folder)
    return tally


def _work(target: str, folder: Path, seconds: float) -> tuple[str, bool]:
    """One worker's life: what it said, and whether an input ended it."""
    command = [sys.executable, _WORKER, target, folder, f"-max_total_time={int(seconds)}", *_LIMITS]
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="w2v-fuzz-", dir=memory) as work:  # a worker that dies clears nothing away
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"TMPDIR": work},
        )
        try:
            output, _ = process.communicate(timeout=seconds + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return output, True
        return output, process.returncode != 0


def _report(output: str, folder: Path) -> None:
    """Print what a worker said before it died, and keep it beside the input."""
    said = [line for line in output.splitlines() if not re.match(r"#\d+\t|INFO:|NEW_FUNC", line)]
    print("\n".join(said[-25:]), flush=True)
    if written := re.search(r"Test unit written to (\S+)", output):
        Path(f"{written[1]}.txt").write_text("\n".join(said))
    else:
        (folder / "finds" / "without-input.txt").write_text("\n".join(said))


def main(folder: Path, seconds: float, targets: list[str]) -> int:
    """Fuzz the targets in turn and return the exit code."""
    if importlib.util.find_spec("atheris") is None:
        sys.exit("fuzzing needs atheris, which has wheels for Linux on x86-64: pip install atheris")
    found = 0
    print(f"libsndfile {soundfile.__libsndfile_version__}, soundfile {soundfile.__version__}")
    for target in targets:
        tally = fuzz(target, folder / target, seconds)
        found += tally.finds
        rate = tally.inputs / max(tally.seconds, 1e-9)
        print(f"{target}: {tally.inputs} inputs in {tally.seconds:.0f} s, {rate:.0f} per second, {tally.finds} finds")
    return 1 if found else 0


if __name__ == "__main__":
    budget = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    sys.exit(main(Path(sys.argv[1]), budget, sys.argv[3:] or list(_SEEDS)))
