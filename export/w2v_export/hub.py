"""Fetch checkpoints from the Hugging Face hub, or find them in its local cache."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from w2v_export import foreign, weight_files
from w2v_models.errors import CheckpointError
from w2v_runtime.engines import installed

CONFIG: Final = "config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
PROCESSOR: Final = "processor_config.json"
VOCABULARY: Final = "vocab.json"
ADDED_TOKENS: Final = "added_tokens.json"
TOKENIZER: Final = "tokenizer_config.json"
#: The files that describe a checkpoint, without its weights.
DESCRIPTION: Final = (
    *(CONFIG, PREPROCESSOR, PROCESSOR, VOCABULARY, ADDED_TOKENS, TOKENIZER),
    weight_files.ADAPTER_CONFIG,
)


def refuse_path(model: str) -> None:
    """Refuse a model name that looks like a path, but is no folder.

    Raises:
        CheckpointError: ``model`` is a path and no hub id.
    """
    if os.path.isfile(model):
        raise CheckpointError(foreign.single_file(Path(model)))
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or os.path.lexists(model):
        raise CheckpointError(f"{model} is not a folder; give a checkpoint folder or a hub id such as org/name.")


def fetch_description(model: str, revision: str | None, offline: bool) -> Path:
    """Fetch the files that describe a checkpoint; return the snapshot in the hub's cache, a folder named by its commit.

    Raises:
        CheckpointError: the id is unknown, or the hub cannot be reached and the cache does not hold it.
    """
    refuse_path(model)
    return _snapshot(model, revision, DESCRIPTION, offline)


def fetch_weights(model: str, snapshot: Path, named: str | None, language: str | None = None) -> None:
    """Fetch the weights into a snapshot: only the files that transformers would load from the whole repository.

    If the hub cannot be reached, the files in the cache are used.

    Args:
        model: the hub id.
        snapshot: the folder that ``fetch_description`` returned.
        named: the file of weights that the config names, or None.
        language: the language whose adapter is fetched too, or None.

    Raises:
        CheckpointError: the hub cannot be reached and the cache holds no weights; or an index is damaged.
    """
    commit = snapshot.name
    try:
        listed = list_files(model, commit)
    except CheckpointError:
        if weight_files.entry(lambda name: os.path.isfile(snapshot / name), named) is None:
            raise
        return
    first = weight_files.entry(listed.__contains__, named)
    if first is None:
        return  # ``weight_files.find`` reports what there is instead
    adapters = [name for name in weight_files.adapter_names(language or "") if name in listed]
    _snapshot(model, commit, [first, *adapters[:1]])
    if first.endswith(weight_files.INDEX_SUFFIX):
        _snapshot(model, commit, set(weight_files.read_index(snapshot / first).values()))


def list_files(model: str, commit: str) -> set[str]:
    """The names of all files of a repository.

    Raises:
        CheckpointError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with _hub_errors(model):
        return set(HfApi().list_repo_files(model, revision=commit))


def _snapshot(model: str, revision: str | None, names: Iterable[str], offline: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(model):
        patterns = [glob.escape(name) for name in names]
        return Path(snapshot_download(model, revision=revision, local_files_only=offline, allow_patterns=patterns))


@contextlib.contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    """Turn errors of the hub, and a hub that cannot be reached, into a :class:`CheckpointError`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated: accept its conditions at {constants.ENDPOINT}/{model}, and log in with: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{model} is neither a folder nor a model on the hub; check the name, or, if it is private, log in with: "
            "hf auth login"
        ) from None
    except (RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{model} is neither a folder nor a model on the hub: {first_line(error)}. Check the name."
        ) from None
    except Exception as error:  # a client's own, such as httpx's, differ from release to release of the hub's package
        answered = isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError)
        silent = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise CheckpointError(
            f"{model} cannot be fetched ({first_line(error) if answered else silent}) and is not in the hub's cache. "
            "Give the folder of a checkpoint, or --random-weights to try things out without the weights."
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message without a full stop, or its class name if the message is empty."""
    return installed.first_line(error).rstrip(".")
