"""How the code is laid out: floors of rooms, what each says of itself, and the names that callers import."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import w2v_models
import w2v_runtime

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent for path in (ROOT / "runtime" / "w2v_runtime").glob("*/__init__.py"))

#: Every name that README, docs and the public interface tell callers to import.
PUBLIC = {
    "w2v_runtime": ("Embedder", "Embedding", "Failure"),
    "w2v_runtime.embedder": ("Embedder",),
    "w2v_models": (
        "AudioError",
        "Bundle",
        "BundleError",
        "CheckpointError",
        "EngineError",
        "OutputError",
        "RefusedError",
        "W2VError",
    ),
    "w2v_export": ("export_bundle",),
}


def test_no_import_runs_up_the_floors(monkeypatch):
    """The contracts of pyproject.toml: what stands on what, and what the runtime does without."""
    importlinter = pytest.importorskip("importlinter.cli")
    monkeypatch.chdir(ROOT)
    assert importlinter.lint_imports(no_cache=True) == importlinter.EXIT_STATUS_SUCCESS


def test_an_import_that_runs_up_is_found(tmp_path, monkeypatch):
    """The same contracts on a house whose lowest room knows the commands."""
    importlinter = pytest.importorskip("importlinter.cli")
    pyproject = (ROOT / "pyproject.toml").read_text().replace("w2v_", "x2v_")
    (tmp_path / "pyproject.toml").write_text(pyproject)
    for package in ("models", "runtime", "export"):
        for source in (ROOT / package).rglob("*.py"):
            place = tmp_path / source.relative_to(ROOT / package).as_posix().replace("w2v_", "x2v_")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(source.read_text().replace("w2v_", "x2v_"))
    stop = tmp_path / "x2v_runtime" / "threads" / "stop.py"
    stop.write_text(stop.read_text() + "\ndef end():\n    from x2v_runtime.commands import terminal\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlinter.lint_imports(no_cache=True) != importlinter.EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_says_what_it_is(room):
    """In a sentence, and what it may import."""
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert said
    assert said.splitlines()[0].endswith(".")
    assert "mport" in said


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module):
    """Every name can be imported from its module, and what a package lists is there."""
    if module == "w2v_export":
        pytest.importorskip("torch")
    found = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert inspect.isclass(getattr(found, name)) or callable(getattr(found, name))
    for name in getattr(found, "__all__", ()):
        assert hasattr(found, name)


def test_the_packages_list_what_they_offer():
    """The lists of public names are those that callers know."""
    assert set(PUBLIC["w2v_models"]) <= set(w2v_models.__all__)
    assert set(PUBLIC["w2v_runtime"]) <= set(w2v_runtime.__all__)


def test_no_file_has_more_than_500_lines():
    """Beyond that a file has more than one job."""
    long = [
        path.name
        for package in ("models", "runtime", "export")
        for path in (ROOT / package).rglob("*.py")
        if len(path.read_text().splitlines()) > 500
    ]
    assert long == []
