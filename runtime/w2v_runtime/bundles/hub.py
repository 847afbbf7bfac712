"""What is asked of the Hugging Face hub: the only module that imports ``huggingface_hub``, when it is first needed.

Whatever the hub answers instead of what was asked for becomes one sentence that names the repository and the fix.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from w2v_models.errors import BundleError, EngineError, W2VError

T = TypeVar("T")

_TRIES: Final = 4
_LONGEST_PAUSE: Final = 60.0
_TOO_MANY_REQUESTS: Final = 429
_MOVED: Final = 412


def is_installed() -> bool:
    """Whether the extra ``hub`` is installed."""
    return importlib.util.find_spec("huggingface_hub") is not None


def is_offline() -> bool:
    """Whether the environment forbids to ask the hub, as huggingface_hub reads it."""
    words = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(word.upper() in ("1", "ON", "YES", "TRUE") for word in words)


def ask(repository: str, call: Callable[[Any], T], file: str | None = None, quiet: bool = True) -> T:
    """Make a call to the hub. One that has too many requests is asked again, after the pause that it names.

    Args:
        repository: the repository that is asked about.
        call: the call, given the module ``huggingface_hub``.
        file: the file that is being transferred, if the call is a transfer.
        quiet: whether huggingface_hub's bars are kept from the screen.

    Raises:
        BundleError: the repository or revision does not exist, is closed to this user, or the hub is not reached.
        EngineError: the extra ``hub`` is not installed.
        W2VError: the transfer was cut, or the hub fails.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.constants import ENDPOINT
    except ModuleNotFoundError as error:
        raise EngineError(
            f"{error.name} is not installed, and {repository} is not asked of the hub without: "
            "pip install 'w2v-onnx[hub]'"
        ) from None
    for attempt in range(_TRIES):
        try:
            with _hushed(quiet):
                return call(huggingface_hub)
        except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                raise  # it is this machine's disk
            wrapped = isinstance(error, errors.LocalEntryNotFoundError | RuntimeError)
            fault = error.__cause__ if wrapped and error.__cause__ is not None else error
            if _status(fault) != _TOO_MANY_REQUESTS or attempt + 1 == _TRIES:
                raise _told(fault, repository, f"{ENDPOINT}/{repository}", file) from None
            time.sleep(_pause(fault, attempt))
    raise AssertionError  # the last attempt returns or raises


def fetch(repository: str, commit: str, file: str, path: Path, size: int, quiet: bool = True) -> None:
    """Download a file of ``size`` bytes to ``path``, from where an earlier transfer was cut.

    The package's own downloads begin anew in another process, from its release 1 on.

    Raises:
        BundleError, EngineError, W2VError: as for :func:`ask`.
    """

    def call(module: Any) -> None:
        from huggingface_hub.file_download import http_get

        address = module.hf_hub_url(repository, file, revision=commit)
        headers = module.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        with path.open("ab") as part:
            if (there := part.tell()) > size:
                there = part.truncate(0)
            if there < size:
                http_get(address, part, resume_size=there, headers=headers, expected_size=size, displayed_filename=file)

    ask(repository, call, file, quiet)


def _told(fault: BaseException, repository: str, page: str, file: str | None) -> W2VError:
    """What went wrong with the hub, as a sentence."""
    from huggingface_hub import errors

    status = _status(fault)
    if isinstance(fault, errors.OfflineModeIsEnabled):
        return BundleError(f"{repository} is not asked of the hub, since HF_HUB_OFFLINE is set.")
    if isinstance(fault, errors.GatedRepoError):
        return BundleError(f"{repository} is gated: accept its conditions at {page} and log in with: hf auth login")
    if isinstance(fault, errors.RepositoryNotFoundError):
        return BundleError(f"{repository} is not on the hub, or private; check the name, or log in with: hf auth login")
    if isinstance(fault, errors.RevisionNotFoundError):
        return BundleError(f"{repository} has no such revision; its branches and tags are at {page}.")
    if isinstance(fault, errors.HFValidationError):
        return BundleError(f"{repository} is not the id of a repository; write it as org/name.")
    if status in (401, 403):
        return BundleError(
            f"The hub refuses {repository} ({status}): accept its conditions at {page} if it has any, and log in as "
            "somebody who may, with: hf auth login"
        )
    if status == _MOVED:
        return BundleError(f"{repository} was changed by somebody else at the same time; push again.")
    if status == _TOO_MANY_REQUESTS:
        return W2VError(f"The hub has too many requests to answer for {repository} (429); wait some minutes.")
    if status:
        return W2VError(f"The hub fails on {repository} ({status}); try again later.")
    if file is not None:
        return W2VError(f"The transfer of {file} from {repository} was cut; the same command goes on where it stopped.")
    return BundleError(
        f"{repository} is not to be had, since the hub cannot be reached at {page.removesuffix(f'/{repository}')}; try "
        "again, or copy the bundle's folder to this machine."
    )


def _status(fault: Any) -> int:
    """The status of the hub's answer; 0 without one."""
    response = getattr(fault, "response", None)
    return 0 if response is None else int(response.status_code)


def _pause(fault: Any, attempt: int) -> float:
    """Seconds until a hub that has too many requests is asked again: what it says, else 1, 2, 4."""
    named = fault.response.headers.get("Retry-After", "")
    return min(float(named) if named.isdecimal() else 2.0**attempt, _LONGEST_PAUSE)


@contextlib.contextmanager
def _hushed(bars: bool) -> Iterator[None]:
    """Keep huggingface_hub from warning of what becomes one of our sentences, and from showing bars if ``bars``."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, bars = logging.get_verbosity(), bars and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()
