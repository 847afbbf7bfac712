"""Bundles put at a place, in this process or in one of its own, and what is found there afterwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from w2v_models import Bundle
from w2v_runtime.bundles.placing import placed

#: Puts a copy of the bundle of the first argument at the place of the second, slowly enough to be caught if asked to.
PLACE = """
import shutil, sys, time
from pathlib import Path
from w2v_runtime.bundles.placing import placed
with placed(Path(sys.argv[2]), overwrite=True) as staging:
    shutil.copytree(sys.argv[1], staging, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True)
    for step in sys.argv[3:]:
        time.sleep(float(step))
    shutil.copy(Path(sys.argv[1]) / "manifest.json", staging / "manifest.json")
"""


def place(
    bundle: Path, output: Path, overwrite: bool = True, meanwhile: Callable[[Path], object] = lambda staging: None
) -> None:
    """Put a copy of a bundle at ``output``; ``meanwhile`` gets the folder that it is written to."""
    with placed(output, overwrite) as staging:
        shutil.copytree(bundle, staging, dirs_exist_ok=True)
        meanwhile(staging)


def start(bundle: Path, output: Path, *steps: float, before: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", before + PLACE, str(bundle), str(output), *map(str, steps)],
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_whole(folder: Path, original: Path) -> None:
    """The folder is this very bundle, with every file of it and no other."""
    bundle = Bundle.open(folder)
    assert bundle.manifest == Bundle.open(original).manifest
    for record in bundle.manifest.files:
        bundle.check(record, remembered=False)
    assert tree(folder) == tree(original)


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write(path: Path, text: str = "precious") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
