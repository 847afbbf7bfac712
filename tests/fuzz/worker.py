"""One process that fuzzes one target with atheris, until its time is over or an input breaks a promise.

python tests/fuzz/worker.py TARGET FOLDER [options of libFuzzer]

``FOLDER`` holds ``seeds``, what libFuzzer found worth keeping in ``corpus``, and inputs that broke a promise in
``finds``, each named by its SHA-1. Code in Python is traced, so that inputs that reach new lines are kept; libsndfile
is not, so for it inputs are changed blindly.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["w2v_models", "w2v_runtime"]):
    import mutators
    import targets

#: Bytes of address space: an allocation by what a header promises fails, and is seen.
_ADDRESS_SPACE = 6 << 30
#: libFuzzer keeps no two seeds that look the same to Python, so this part begins with any of them.
_FRESH = 0.3
#: libFuzzer's own changes, which do not know the formats, have this part.
_BLIND = 0.3


def main(name: str, folder: Path, options: list[str]) -> None:
    """Fuzz the target ``name``; libFuzzer ends the process."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target, mutator = targets.TARGETS[name], mutators.MUTATORS[name]
    seeds = [path.read_bytes() for path in sorted((folder / "seeds").iterdir())]
    warnings.simplefilter("error")  # a warning would stand between the lines of a command
    work = Path(tempfile.mkdtemp())

    def test(content: bytes) -> None:
        target(content, work)

    def mutate(content: bytes, limit: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < _FRESH:
            content = random.choice(seeds)
        if random.random() < _BLIND:
            return bytes(atheris.Mutate(content, limit))
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            content = mutator(random, content)
        return content[:limit]

    arguments = [sys.argv[0], str(folder / "corpus"), str(folder / "seeds"), f"-artifact_prefix={folder}/finds/"]
    atheris.Setup(arguments + options, test, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
