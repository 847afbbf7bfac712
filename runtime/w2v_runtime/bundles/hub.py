"""Bundles on the Hugging Face hub: pulled from a repository to the default place, and pushed to one.

The only module that knows ``huggingface_hub``, which is imported when it is first needed. What is downloaded stays in
``.NAME.w2v-partial`` beside the bundle's folder NAME until all of it is there, so that a cut transfer goes on where it
stopped; from there it goes through :func:`~w2v_runtime.bundles.placing.placed` like an export.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from w2v_models.bundle import MANIFEST, MAX_MANIFEST_BYTES, SOURCE_FILES, Bundle, sha256
from w2v_models.errors import BundleError, EngineError, RefusedError, W2VError
from w2v_models.manifest import FileRecord, Manifest
from w2v_models.origin import Origin
from w2v_runtime.bundles import library
from w2v_runtime.bundles.card import CARD, card
from w2v_runtime.bundles.placing import placed, writing
from w2v_runtime.files.lock import BusyError

T = TypeVar("T")
#: Called with a line for the user; None is quiet, without huggingface_hub's bars either.
Tell = Callable[[str], None] | None

_DEFAULT_PRECISION: Final = "fp32"
_PARTIAL: Final = ".w2v-partial"
_TRIES: Final = 4
_LONGEST_PAUSE: Final = 60.0
_TOO_MANY_REQUESTS: Final = 429
_MOVED: Final = 412
#: Answers of the hub that name no terms, so that somebody has to.
_NO_TERMS: Final = ("other", "unknown")
#: Names of licences that forbid derivatives, which a converted model is: cc-by-nd-4.0, cc-by-nc-nd-4.0.
_NO_DERIVATIVES: Final = re.compile(r"(?:^|[-_ ])nd(?:$|[-_ ])", re.IGNORECASE)
#: What the hub itself puts into a new repository.
_NEW_REPOSITORY: Final = {".gitattributes", CARD}


def is_offline() -> bool:
    """Whether the environment forbids to ask the hub, as huggingface_hub reads it."""
    words = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(word.upper() in ("1", "ON", "YES", "TRUE") for word in words)


def find(
    model: str | os.PathLike[str] | None = None, precision: str = "fp32", offline: bool = False, tell: Tell = None
) -> Bundle:
    """The bundle that ``model`` names, as :func:`library.find` has it; one that is not here is pulled.

    The hub is asked only for an id of which this machine has no bundle, and for a precision that was not pulled yet.

    Args:
        model: a bundle folder, the id of an exported or published model, or None for the only one.
        precision: the stored precision that is needed.
        offline: ask no hub.
        tell: called with a line about the pull.

    Raises:
        BundleError: there is no such bundle here or on the hub, or it lacks the precision.
        EngineError: it is not here, and the extra ``hub`` is not installed.
        W2VError: the transfer was cut, or the disk is full.
    """
    offline = offline or is_offline()
    try:
        bundle = library.find(model)
    except library.NotHereError as missing:
        if offline:
            raise
        if importlib.util.find_spec("huggingface_hub") is None:
            raise library.NotHereError(
                f"{missing}, or pull it, if it is published: pip install 'w2v-onnx[hub]'"
            ) from None
        return pull(os.fspath(model or os.environ["W2V_MODEL"]), precisions=(precision,), tell=tell)
    lacks = precision in bundle.manifest.precisions and precision not in bundle.held
    if lacks and not offline and (origin := Origin.read(bundle.folder)):
        return pull(origin.repository, origin.commit, (precision,), tell)
    bundle.precision(precision)
    return bundle


def pull(repository: str, revision: str | None = None, precisions: Sequence[str] = (), tell: Tell = None) -> Bundle:
    """Download a published bundle to ``<org>--<name>`` below the folder of bundles, every file checked by its SHA-256.

    What is there of the same bundle is kept, also its other precisions. A pull that another process has begun is waited
    for.

    Args:
        repository: the id of the bundle's repository on the hub.
        revision: a branch, tag or commit; by default the main branch. It is resolved to a commit once, at the start.
        precisions: those to download; by default fp32, or all of a bundle that has no fp32.
        tell: called with a line about what is downloaded.

    Raises:
        BundleError: the repository is unknown, closed, not a bundle or damaged, or lacks a precision.
        EngineError: the extra ``hub`` is not installed.
        OutputError: another bundle, one that was not pulled from there, is at its place.
        W2VError: the transfer was cut, or the disk is full.
    """
    folder = library.default_folder(repository)
    remote = _Remote.open(repository, revision, tell)
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    while True:
        if (found := _here(folder, remote.origin, precisions)) is not None:
            return found
        try:
            with placed(folder, overwrite=True) as staging, writing(folder):
                _refuse_other(folder, repository)
                remote.fill(staging, partial, folder, precisions)
            shutil.rmtree(partial, ignore_errors=True)
            return Bundle.open(folder)
        except BundleError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except BusyError:
            if tell is not None:
                tell(f"waiting for another process that writes {folder}")
            time.sleep(1)


def _here(folder: Path, origin: Origin, precisions: Sequence[str]) -> Bundle | None:
    """The bundle in ``folder``, if it is this commit's and holds the precisions."""
    if Origin.read(folder) != origin:
        return None
    bundle = Bundle.open(folder)
    return bundle if set(precisions or _default(bundle.manifest)) <= bundle.held.keys() else None


def _refuse_other(folder: Path, repository: str) -> None:
    """Refuse to replace a bundle that was not pulled from this repository.

    Raises:
        BundleError: there is one at ``folder``.
    """
    origin = Origin.read(folder)
    if (folder / MANIFEST).exists() and (origin is None or origin.repository != repository):
        came = f"pulled from {origin.repository}" if origin else "exported here"
        raise BundleError(
            f"{folder} holds a bundle that was {came}, so {repository} is not pulled over it; move that away first."
        )


def _default(manifest: Manifest) -> tuple[str, ...]:
    held = tuple(manifest.precisions)
    return (_DEFAULT_PRECISION,) if _DEFAULT_PRECISION in held else held


class _Remote:
    """A repository at one commit: what it holds, by name, and how it is downloaded."""

    def __init__(self, origin: Origin, sizes: dict[str, int], tell: Tell) -> None:
        self.origin, self._sizes, self._tell = origin, sizes, tell

    @classmethod
    def open(cls, repository: str, revision: str | None, tell: Tell) -> _Remote:
        """Resolve a revision to a commit, and list what that holds.

        Raises:
            BundleError: there is no such repository or revision, or it holds no bundle.
        """
        info = _ask(repository, lambda api: api.model_info(repository, revision=revision, files_metadata=True))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        if MANIFEST not in sizes:
            raise BundleError(
                f"{repository} on the hub holds no {MANIFEST}: it is a checkpoint, not a published bundle. "
                f"Export it with: w2v-export --model {repository}"
            )
        return cls(Origin(repository, info.sha), sizes, tell)

    def fill(self, staging: Path, partial: Path, present: Path, precisions: Sequence[str]) -> None:
        """Put the manifest and the files of some precisions into ``staging``, from ``present`` where they are there.

        Raises:
            BundleError: the repository holds no valid bundle, lacks a precision or a file, or a file is not as the
                manifest says.
            W2VError: the transfer was cut.
        """
        if self._sizes[MANIFEST] > MAX_MANIFEST_BYTES:
            raise BundleError(f"{self.origin} has a {MANIFEST} of {self._sizes[MANIFEST]} bytes, which is none.")
        os.replace(self._fetched(MANIFEST, partial), staging / MANIFEST)
        try:
            manifest = Bundle.open(staging).manifest
        except BundleError as error:
            reason = str(error).partition(": ")[2].removesuffix(" Export the model again.")
            raise BundleError(f"{self.origin} is not a bundle that this release reads: {reason}") from None
        if unknown := sorted(set(precisions) - manifest.precisions.keys()):
            held = ", ".join(manifest.precisions)
            raise BundleError(f"{self.origin} holds no {', '.join(unknown)} graph; choose a precision of: {held}.")
        kept = _kept(present, manifest)
        records = manifest.files_of({*(precisions or _default(manifest)), *kept})
        self._check_listed(records)
        known = {record.path for record in manifest.files_of(kept)} if kept else set()
        lacking = [record for record in records if record.path not in known]
        if self._tell is not None:
            total = sum(record.size for record in lacking)
            self._tell(f"pulling {self.origin}: {len(lacking)} files, {total / 1e6:.1f} MB")
        for record in records:
            place = staging / record.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if record.path in known:
                shutil.copyfile(present / record.path, place)
            else:
                os.replace(self._checked(record, partial), place)
        self.origin.write(staging)

    def _check_listed(self, records: Sequence[FileRecord]) -> None:
        """Refuse files that are missing, or of another size than the manifest says, before any is downloaded."""
        for record in records:
            size = self._sizes.get(record.path)
            if size != record.size:
                state = "is missing" if size is None else f"has {size} bytes where its manifest says {record.size}"
                raise BundleError(f"{record.path} of {self.origin} {state}; it has to be pushed again.")

    def _checked(self, record: FileRecord, partial: Path) -> Path:
        path = self._fetched(record.path, partial)
        if path.stat().st_size != record.size or sha256(path) != record.sha256:
            raise BundleError(
                f"{record.path} of {self.origin} is not the file that its manifest names (SHA-256 differs), so nothing "
                "is kept; pull again, and if that does not help, it has to be pushed again."
            )
        return path

    def _fetched(self, name: str, partial: Path) -> Path:
        """Download a file into ``partial``, from where an earlier transfer was cut."""
        from huggingface_hub import hf_hub_download

        repository, commit = self.origin.repository, self.origin.commit

        def download(_: Any) -> str:
            with _quiet(everything=self._tell is None):
                return hf_hub_download(repository, name, revision=commit, local_dir=partial)

        return Path(_ask(repository, download, name))


def _kept(folder: Path, manifest: Manifest) -> list[str]:
    """The precisions of the same bundle that are in ``folder`` already, whole."""
    with contextlib.suppress(BundleError):
        bundle = Bundle.open(folder)
        if bundle.manifest == manifest:
            for record in bundle.files:
                bundle.check(record)
            return list(bundle.held)
    return []


def push(
    bundle: Bundle,
    repository: str,
    private: bool = False,
    revision: str | None = None,
    licence: str | None = None,
    tell: Tell = None,
) -> str:
    """Publish a bundle in one commit: its own files, the source's configs, and a model card.

    Args:
        bundle: a whole bundle with a checkpoint's weights.
        repository: the id of its repository on the hub, created if it does not exist.
        private: whether a repository that is created is private.
        revision: the branch to commit to, created if it does not exist; by default the main branch.
        licence: the licence of the checkpoint, where neither its bundle nor the hub says it.
        tell: called with lines about what is published, and under which licence.

    Returns:
        The address of the commit.

    Raises:
        BundleError: the weights are random, the bundle is damaged or not whole, the repository holds something else, or
            the hub refuses.
        RefusedError: the licence is unknown or forbids it.
        EngineError: the extra ``hub`` is not installed.
        W2VError: the commit does not hold what was pushed.
    """
    manifest = bundle.manifest
    if manifest.source.random:
        raise BundleError(f"{bundle.folder} has random weights, whose embeddings mean nothing; it is not published.")
    if absent := sorted(manifest.precisions.keys() - bundle.held.keys()):
        origin = Origin.read(bundle.folder)
        where = f": w2v-models pull {origin.repository} --precision {','.join(absent)}" if origin else "."
        raise BundleError(f"{bundle.folder} lacks the files of {', '.join(absent)}; pull them first{where}")
    terms = _licence(manifest, licence)
    files: dict[str, Path | bytes] = {record.path: bundle.check(record, remembered=False) for record in manifest.files}
    files |= {MANIFEST: manifest.to_json().encode(), CARD: card(manifest, repository, terms).encode()}
    files |= {name: content for name in SOURCE_FILES if (content := _own_text(bundle.folder / name)) is not None}
    if tell is not None:
        tell(f"the licence of {manifest.source.model} is {terms}; the copy is published under the same")
    head = _prepare(repository, private, revision)
    if tell is not None:
        total = sum(record.size for record in manifest.files)
        tell(f"pushing {len(files)} files, {total / 1e6:.1f} MB, to {repository}")
    with _quiet(everything=tell is None):
        commit = _commit(repository, revision, head, files, manifest)
    _check_commit(repository, commit, files)
    return f"{repository} at commit {commit}"


def _licence(manifest: Manifest, named: str | None) -> str:
    """The licence that a bundle is published under: the checkpoint's.

    Raises:
        RefusedError: it is unknown, or forbids derivatives, or another was named.
    """
    source = manifest.source
    known = source.licence
    if known is None and source.revision is not None:
        with contextlib.suppress(BundleError):
            details = _ask(source.model, lambda api: api.model_info(source.model)).card_data
            known = details.get("license") if details is not None else None
    if not isinstance(known, str) or known.lower() in _NO_TERMS:
        known = None
    if known is not None and named is not None and named != known:
        raise RefusedError(f"the licence of {source.model} is {known}, not {named}; leave --license out.")
    terms = known or named
    if terms is None:
        raise RefusedError(
            f"the licence of {source.model} is unknown, and nothing is published without; if its owner allows it, "
            "name it: --license apache-2.0"
        )
    if _NO_DERIVATIVES.search(terms):
        raise RefusedError(
            f"the licence of {source.model}, {terms}, forbids to pass on derivatives, which a bundle is; keep it to "
            "yourself, or ask its owner."
        )
    return terms


def _own_text(path: Path) -> bytes | None:
    """A source's config beside the manifest; None if there is none, or it is a link to something else."""
    try:
        status = path.lstat()
        own = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size <= MAX_MANIFEST_BYTES
        return path.read_bytes() if own else None
    except FileNotFoundError:
        return None


def _prepare(repository: str, private: bool, revision: str | None) -> Any:
    """Create the repository and the branch if they do not exist; return what the branch holds.

    Raises:
        BundleError: the repository holds something else than a bundle.
    """
    _ask(repository, lambda api: api.create_repo(repository, private=private, exist_ok=True))
    head = _ask(repository, lambda api: api.model_info(repository, files_metadata=True))
    if revision is not None:
        _ask(repository, lambda api: api.create_branch(repository, branch=revision, exist_ok=True))
        head = _ask(repository, lambda api: api.model_info(repository, revision=revision, files_metadata=True))
    names = {file.rfilename for file in head.siblings}
    if MANIFEST not in names and (others := sorted(names - _NEW_REPOSITORY)):
        raise BundleError(
            f"{repository} holds {others[0]} and no {MANIFEST}, so it is no bundle's; push to a repository of its own."
        )
    return head


def _commit(
    repository: str, revision: str | None, head: Any, files: dict[str, Path | bytes], manifest: Manifest
) -> str:
    """Upload the files in one commit on top of ``head``; graphs of the bundle before that this one lacks are removed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    before = {file.rfilename for file in head.siblings}
    gone = sorted(name for name in before - files.keys() if name.startswith("onnx/"))

    def create(api: Any) -> str:
        operations: list[Any] = [CommitOperationDelete(name) for name in gone]
        operations += [CommitOperationAdd(name, content) for name, content in files.items()]
        message = f"Bundle {manifest.sha256[:12]} of {manifest.source.model}"
        return str(
            api.create_commit(
                repository, operations, commit_message=message, revision=revision, parent_commit=head.sha
            ).oid
        )

    return _ask(repository, create)


def _check_commit(repository: str, commit: str, files: dict[str, Path | bytes]) -> None:
    """Compare what a commit holds with what was pushed: sizes, and SHA-256 or git's hash.

    Raises:
        W2VError: something differs.
    """
    info = _ask(repository, lambda api: api.model_info(repository, revision=commit, files_metadata=True))
    there = {file.rfilename: file for file in info.siblings}
    for name, content in files.items():
        file, size = there.get(name), len(content) if isinstance(content, bytes) else content.stat().st_size
        whole = file is not None and file.size == size
        if whole and file.lfs is not None:
            whole = file.lfs.sha256 == (
                hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
            )
        elif whole and file.blob_id is not None:
            data = content if isinstance(content, bytes) else content.read_bytes()
            whole = file.blob_id == hashlib.sha1(b"blob %d\0%b" % (size, data)).hexdigest()
        if not whole:
            raise W2VError(f"{name} is not in {repository} at commit {commit} as it was pushed; push again.")


def _ask(repository: str, call: Callable[[Any], T], file: str | None = None) -> T:
    """Make a call to the hub; whatever it answers instead becomes one sentence that names the repository and the fix.

    A hub that has too many requests is asked again, after the pause that it names.

    Args:
        repository: the repository that is asked about.
        call: the call, given huggingface_hub's ``HfApi``.
        file: the file that is being transferred, if the call is a transfer.

    Raises:
        BundleError: the repository or revision does not exist, is closed to this user, or the hub is not reached.
        EngineError: the extra ``hub`` is not installed.
        W2VError: the transfer was cut, or the hub fails.
    """
    try:
        from huggingface_hub import HfApi, errors
        from huggingface_hub.constants import ENDPOINT
    except ModuleNotFoundError as error:
        raise EngineError(
            f"{error.name} is not installed, and {repository} is not asked of the hub without: "
            "pip install 'w2v-onnx[hub]'"
        ) from None
    for attempt in range(_TRIES):
        try:
            return call(HfApi())
        except (errors.HTTPError, errors.LocalEntryNotFoundError, OSError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
                raise  # it is this machine's disk
            wrapped = isinstance(error, errors.LocalEntryNotFoundError | RuntimeError)
            fault = error.__cause__ if wrapped and error.__cause__ is not None else error
            if _status(fault) != _TOO_MANY_REQUESTS or attempt + 1 == _TRIES:
                raise _told(fault, repository, f"{ENDPOINT}/{repository}", file) from None
            time.sleep(_pause(fault, attempt))
    raise AssertionError  # the last attempt returns or raises


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
def _quiet(everything: bool) -> Iterator[None]:
    """Keep huggingface_hub from warning about what becomes one of our sentences; if ``everything``, from its bars too."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level, shown = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if everything and shown:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if everything and shown:
            enable_progress_bars()
