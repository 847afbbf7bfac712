"""Checkpoints on the hub: fetched, or found in its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from w2v_models.errors import CheckpointError

CONFIG: Final = "config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
VOCABULARY: Final = "vocab.json"
ADDED_TOKENS: Final = "added_tokens.json"
SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"


def refuse_path(model: str) -> None:
    """Refuse what was meant as a folder, but is none.

    Raises:
        CheckpointError: it is a path and no hub id.
    """
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model} is not a folder; give a checkpoint folder or a hub id such as org/name.")


def download(model: str, revision: str | None, offline: bool) -> tuple[Path, str]:
    """Fetch a checkpoint's files from the hub, or find them in its cache: (snapshot folder, commit).

    Raises:
        CheckpointError: the id is unknown, or the hub cannot be reached and the cache does not hold it.
    """
    refuse_path(model)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

    try:
        weights = [SAFETENSORS, f"{SAFETENSORS}.index.json", "model-*.safetensors"]
        if offline:
            weights += [PICKLE]
        elif not any(name.endswith(".safetensors") for name in HfApi().list_repo_files(model, revision=revision)):
            weights = [PICKLE, f"{PICKLE}.index.json", "pytorch_model-*.bin"]
        folder = Path(
            snapshot_download(
                model,
                revision=revision,
                local_files_only=offline,
                allow_patterns=[CONFIG, PREPROCESSOR, VOCABULARY, ADDED_TOKENS, *weights],
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise
        raise CheckpointError(
            f"{model} is neither a folder nor a model on the hub: {first_line(error)}. Check the name."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = first_line(error) if isinstance(error, HfHubHTTPError) else "the hub cannot be reached"
        raise CheckpointError(
            f"{model} cannot be fetched ({why}) and is not in the hub's cache. Give the folder of a "
            "checkpoint, or --random-weights to try things out without the weights."
        ) from None
    return folder, folder.name


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
