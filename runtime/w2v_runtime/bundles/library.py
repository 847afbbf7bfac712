"""Find bundles on this machine: the folder of exported bundles, and a model's bundle by folder or hub id."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from w2v_models.bundle import MANIFEST, Bundle
from w2v_models.errors import BundleError
from w2v_runtime.bundles.placing import recover, recover_all


class NotHereError(BundleError):
    """An id of which no bundle is on this machine; the hub may have one."""


def home() -> Path:
    """The folder of exported bundles: ``$W2V_HOME``, else the user's cache folder. It may be missing.

    Raises:
        BundleError: the user has no home folder, or ``$W2V_HOME`` begins with ``~`` of an unknown user.
    """
    chosen = os.environ.get("W2V_HOME")
    try:
        folder = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("w2v-onnx"))
    except RuntimeError:
        folder = None
    if folder is None or not (chosen or folder.is_absolute()):  # older platformdirs answer with ~
        raise BundleError(
            f"W2V_HOME is {chosen}, and there is no such user's home folder."
            if chosen
            else "There is no home folder (HOME is not set), so name one for bundles: export W2V_HOME=/a/folder"
        )
    return folder


def default_folder(model_id: str) -> Path:
    """The default bundle folder of a hub id or checkpoint folder: ``<org>--<name>`` below :func:`home`.

    Raises:
        BundleError: there is no home folder.
    """
    name = Path(model_id).resolve().name if os.path.isdir(model_id) else model_id.strip("/").replace("/", "--")
    return home() / (name.lstrip(".") or "model")  # hidden folders are not searched for bundles


def folders() -> list[Path]:
    """The folders below :func:`home` that hold a manifest, sorted by name.

    Hidden folders are left out, since they are unfinished bundles.

    Raises:
        BundleError: :func:`home` exists and cannot be read.
    """
    place = home()
    try:
        recover_all(place)
        names = sorted(name for name in os.listdir(place) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BundleError(f"{place}, the folder of bundles, cannot be read: {error.strerror}.") from None
    return [place / name for name in names if os.path.isfile(place / name / MANIFEST)]


def exported() -> list[Bundle]:
    """The valid bundles below :func:`home`, sorted by name.

    Raises:
        BundleError: :func:`home` exists and cannot be read.
    """
    bundles = []
    for folder in folders():
        try:
            bundles.append(Bundle.open(folder))
        except BundleError:
            continue
    return bundles


def find(model: str | os.PathLike[str] | None = None) -> Bundle:
    """Open the bundle that ``model`` names: a bundle folder, or the id of a model exported to the default place.

    Without ``model``: ``$W2V_MODEL``, else the only exported bundle.

    Raises:
        NotHereError: no bundle of this id is here.
        BundleError: there is no such bundle, there are several, or it is not valid; the message holds the fix.
    """
    name = os.fspath(model) if model is not None else os.environ.get("W2V_MODEL")
    if not name:
        return _only_exported()
    for folder in _places(name):
        recover(folder)
        if os.path.isfile(folder / MANIFEST):
            return Bundle.open(folder)
    if os.path.isdir(name):
        return Bundle.open(Path(name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BundleError(f"{name} is not a folder; give a bundle folder or the id of an exported model.")
    raise NotHereError(f"{name} has not been exported yet. Export it with: w2v-export --model {name}")


def _places(name: str) -> Iterator[Path]:
    """The folders that ``name`` may mean: as a path, then as a hub id."""
    yield Path(name)
    with contextlib.suppress(BundleError):  # without a home folder, an id has no folder
        yield default_folder(name)


def _only_exported() -> Bundle:
    bundles = exported()
    if len(bundles) == 1:
        return bundles[0]
    if not bundles:
        raise BundleError(
            f"No model has been exported to {home()} yet. "
            "Export one with: w2v-export --model facebook/wav2vec2-base-960h"
        )
    names = ", ".join(map(_name, bundles))
    raise BundleError(f"Several models are exported ({names}); choose one with --model or W2V_MODEL.")


def _name(bundle: Bundle) -> str:
    """What finds a bundle with :func:`find`: its model, or its folder if that is not called after the model."""
    model = bundle.manifest.source.model
    return model if default_folder(model) == bundle.folder else str(bundle.folder)
