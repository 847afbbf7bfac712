"""Where bundles live on this machine, and how a model is found by folder or id."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from w2v_models.bundle import MANIFEST, Bundle
from w2v_models.errors import BundleError


def home() -> Path:
    """The folder of exported bundles: ``$W2V_HOME``, else the user's cache folder."""
    chosen = os.environ.get("W2V_HOME")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("w2v-onnx"))


def default_folder(model_id: str) -> Path:
    """Where the bundle of a hub id or checkpoint folder goes: ``<org>--<name>`` below :func:`home`."""
    name = Path(model_id).resolve().name if os.path.isdir(model_id) else model_id.strip("/").replace("/", "--")
    return home() / name


def exported() -> list[Bundle]:
    """The valid bundles below :func:`home`, by name."""
    bundles = []
    for path in sorted(home().glob(f"*/{MANIFEST}")):
        try:
            bundles.append(Bundle.open(path.parent))
        except BundleError:
            continue
    return bundles


def find(model: str | os.PathLike[str] | None = None) -> Bundle:
    """Open the bundle that ``model`` names: a bundle folder, or the id of a model exported to the default place.

    Without ``model``: ``$W2V_MODEL``, else the only exported bundle.

    Raises:
        BundleError: there is none, there are several, or it is not a valid bundle; the message holds the fix.
    """
    name = os.fspath(model) if model is not None else os.environ.get("W2V_MODEL")
    if not name:
        return _only_exported()
    if os.path.isfile(Path(name) / MANIFEST):
        return Bundle.open(Path(name))
    if os.path.isfile(default_folder(name) / MANIFEST):
        return Bundle.open(default_folder(name))
    if os.path.isdir(name):
        return Bundle.open(Path(name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BundleError(f"{name} is not a folder; give a bundle folder or the id of an exported model.")
    raise BundleError(f"{name} has not been exported yet. Export it with: w2v-export --model {name}")


def _only_exported() -> Bundle:
    bundles = exported()
    if len(bundles) == 1:
        return bundles[0]
    if not bundles:
        raise BundleError(
            f"No model has been exported to {home()} yet. "
            "Export one with: w2v-export --model facebook/wav2vec2-base-960h"
        )
    names = ", ".join(bundle.manifest.source.model for bundle in bundles)
    raise BundleError(f"Several models are exported ({names}); choose one with --model or W2V_MODEL.")
