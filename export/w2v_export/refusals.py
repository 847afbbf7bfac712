"""Refuse an impossible export before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from w2v_export.description import describe, describe_architecture
from w2v_export.hub import CONFIG, refuse_path
from w2v_models import catalogue
from w2v_models.errors import CheckpointError, OutputError, RefusedError
from w2v_runtime.bundles import library, placing

#: Precisions that this release exports.
PRECISIONS: Final = ("fp32", "int8", "fp16")


def refuse_early(
    model: str,
    output: Path | None,
    precision: Sequence[str],
    revision: str | None,
    random_weights: bool,
    overwrite: bool,
    offline: bool,
    language: str | None = None,
) -> None:
    """Refuse a model that is known to be unavailable, an unknown precision, and an output that may not be replaced.

    Raises:
        RefusedError: a precision is unknown, or a language goes with random weights.
        CheckpointError: the model is a folder whose files are missing or invalid; or it is no folder and looks like a
            path; or it is not in the catalogue, with random weights; or it is not in the hub's cache, offline.
        OutputError: the output exists and may not or cannot be replaced.
    """
    if unknown := [name for name in precision if name not in PRECISIONS]:
        raise RefusedError(f"precision {', '.join(unknown)!r} cannot be exported; known: {', '.join(PRECISIONS)}.")
    if random_weights and language is not None:
        raise RefusedError("random weights speak no language; leave out --language or --random-weights.")
    if not model:
        raise CheckpointError("no model is named; give a hub id such as org/name, or a checkpoint folder.")
    refuse_place(model, output if output is not None else library.default_folder(model), overwrite)
    if os.path.isdir(model):
        if random_weights:
            describe_architecture(model)
        else:
            described = describe(model, language=language)
            described.weight_files()
            described.adapter_file()
        return
    refuse_path(model)
    if random_weights:
        _check_known(model)
    elif offline:
        _check_cached(model, revision)


def refuse_place(model: str, folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that contains the checkpoint or is inside it, or where no bundle can be written.

    Raises:
        OutputError: the output is such a folder, or :func:`w2v_runtime.bundles.placing.check` refuses the folder.
    """
    if os.path.isdir(model) and _is_within(Path(model), folder):
        raise OutputError(f"{folder} holds the checkpoint itself, {model}; choose another --output.")
    if os.path.isdir(model) and _is_within(folder, Path(model)):
        raise OutputError(f"{folder} is inside the checkpoint {model}; choose an --output outside it.")
    placing.check(folder, overwrite)


def _is_within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or below it, compared by the real files and not by names."""
    real = Path(os.path.realpath(path))
    return os.path.isdir(folder) and any(
        os.path.exists(part) and part.samefile(folder) for part in (real, *real.parents)
    )


def _check_known(model: str) -> None:
    if catalogue.find(model) is None:
        raise CheckpointError(
            f"{model} is neither a folder nor in the catalogue, so its architecture is unknown without its files. "
            "The catalogue is shown by: w2v-models list"
        )


def _check_cached(model: str, revision: str | None) -> None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        return  # the import of the exporter reports missing packages
    try:
        cached = try_to_load_from_cache(model, CONFIG, revision=revision)
    except HFValidationError as error:
        raise CheckpointError(f"{model} is neither a folder nor a hub id: {error}") from None
    if not isinstance(cached, str):
        which = f"revision {revision} of {model}" if revision else model
        raise CheckpointError(
            f"{which} is not in the hub's cache; leave --offline out to fetch it, or give the folder of a checkpoint."
        )
