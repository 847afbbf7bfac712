"""What users install: the wheel, its commands, and a runtime that needs nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from conftest import REPOSITORY

ROOMS = {"w2v_models": "models", "w2v_runtime": "runtime", "w2v_export": "export"}
HEAVY = {"torch", "transformers", "optimum", "onnx", "huggingface_hub", "safetensors"}


def build(folder: Path, target: str, tmp_path: Path) -> Path:
    """Build a wheel or sdist of the tree in a folder."""
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(tmp_path)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_the_wheel_holds_exactly_the_three_packages(tmp_path):
    """Its top level is the three packages and the metadata; every module of the tree is in it; nothing else is."""
    files = contents(build(REPOSITORY, "wheel", tmp_path))
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(ROOMS)
    packed = {name for name in files if name.endswith(".py")}
    assert packed == {
        path.relative_to(REPOSITORY / room).as_posix()
        for package, room in ROOMS.items()
        for path in (REPOSITORY / room / package).rglob("*.py")
    }
    (entry_points,) = (name for name in files if name.endswith("entry_points.txt"))
    commands = files[entry_points].decode()
    names = ("export", "embed", "models", "merge", "doctor")
    assert all(f"w2v-{name} = " in commands for name in names)


def test_the_readme_of_a_package_index_has_no_links_into_the_repository(tmp_path):
    """It has the README's words, names of files where the README links to them, and no pictures; and from an sdist the
    same wheel is built.
    """
    files = contents(build(REPOSITORY, "wheel", tmp_path / "wheel"))
    (metadata,) = (content.decode() for name, content in files.items() if name.endswith("/METADATA"))
    assert "Description-Content-Type: text/markdown" in metadata
    assert [target for target in re.findall(r"\]\(([^)]*)\)", metadata) if not target.startswith("https:")] == []
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"`docs/{page.name}`" in metadata
    with tarfile.open(build(REPOSITORY, "sdist", tmp_path / "sdist")) as sdist:
        sdist.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    assert (tree / "docs" / "session.svg").is_file()
    assert contents(build(tree, "wheel", tmp_path / "again")) == files


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
        allowed = {"huggingface_hub"} if path.endswith("bundles/hub.py") else set()
        assert not names & (HEAVY | {"w2v_export"}) - allowed, path
