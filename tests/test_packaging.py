"""What users install: the wheel, its commands, and a runtime that needs nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile

import pytest

from conftest import REPOSITORY

ROOMS = {"w2v_models": "models", "w2v_runtime": "runtime", "w2v_export": "export"}
HEAVY = {"torch", "transformers", "optimum", "onnx", "huggingface_hub", "safetensors"}


def test_the_wheel_holds_exactly_the_three_packages(tmp_path):
    """Its top level is the three packages and the metadata; every module of the tree is in it; nothing else is."""
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(ROOMS)
    packed = {name for name in names if name.endswith(".py")}
    assert packed == {
        path.relative_to(REPOSITORY / room).as_posix()
        for package, room in ROOMS.items()
        for path in (REPOSITORY / room / package).rglob("*.py")
    }
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    commands = zipfile.ZipFile(wheel).read(entry_points).decode()
    names = ("export", "embed", "models", "merge", "doctor")
    assert all(f"w2v-{name} = " in commands for name in names)


def imports_of(package: str) -> dict[str, set[str]]:
    """Top-level names that each module of a package imports anywhere in it."""
    found: dict[str, set[str]] = {}
    for path in (REPOSITORY / ROOMS[package] / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = {node.module.partition(".")[0]}
            else:
                continue
            found.setdefault(str(path), set()).update(names)
    return found


def test_imports_run_only_towards_the_lighter_side():
    """Models import the standard library alone; the runtime never the export or its packages."""
    for path, names in imports_of("w2v_models").items():
        assert names <= set(sys.stdlib_module_names) | {"w2v_models"}, path
    for path, names in imports_of("w2v_runtime").items():
        assert not names & (HEAVY | {"w2v_export"}), path
