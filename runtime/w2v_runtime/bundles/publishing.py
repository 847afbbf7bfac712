"""Push a bundle to a repository on the hub, in one commit, after checks of its weights, licence and files."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any, Final

from w2v_models.bundle import MANIFEST, Bundle, sha256
from w2v_models.errors import BundleError, RefusedError, W2VError
from w2v_models.manifest import Manifest
from w2v_models.origin import Origin
from w2v_runtime.bundles import hub
from w2v_runtime.bundles.card import CARD, card
from w2v_runtime.bundles.pulling import Tell

#: Answers of the hub that name no terms, so that somebody has to.
_NO_TERMS: Final = ("other", "unknown")
#: Names of licences that forbid derivatives, which a converted model is: cc-by-nd-4.0, cc-by-nc-nd-4.0.
_NO_DERIVATIVES: Final = re.compile(r"(?:^|[-_ ])nd(?:$|[-_ ])", re.IGNORECASE)
#: What the hub itself puts into a new repository.
_NEW_REPOSITORY: Final = {".gitattributes", CARD}


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
    if tell is not None:
        tell(f"the licence of {manifest.source.model} is {terms}; the copy is published under the same")
    head = _prepare(repository, private, revision)
    if tell is not None:
        total = sum(record.size for record in manifest.files)
        tell(f"pushing {len(files)} files, {total / 1e6:.1f} MB, to {repository}")
    commit = _commit(repository, revision, head, files, manifest, quiet=tell is None)
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
            details = hub.ask(source.model, lambda m: m.HfApi().model_info(source.model)).card_data
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


def _prepare(repository: str, private: bool, revision: str | None) -> Any:
    """Create the repository and the branch if they do not exist; return what the branch holds.

    Raises:
        BundleError: the repository holds something else than a bundle.
    """
    hub.ask(repository, lambda m: m.HfApi().create_repo(repository, private=private, exist_ok=True))
    head = hub.ask(repository, lambda m: m.HfApi().model_info(repository, files_metadata=True))
    if revision is not None:
        hub.ask(repository, lambda m: m.HfApi().create_branch(repository, branch=revision, exist_ok=True))
        head = hub.ask(repository, lambda m: m.HfApi().model_info(repository, revision=revision, files_metadata=True))
    names = {file.rfilename for file in head.siblings}
    if MANIFEST not in names and (others := sorted(names - _NEW_REPOSITORY)):
        raise BundleError(
            f"{repository} holds {others[0]} and no {MANIFEST}, so it is no bundle's; push to a repository of its own."
        )
    return head


def _commit(
    repository: str, revision: str | None, head: Any, files: dict[str, Path | bytes], manifest: Manifest, quiet: bool
) -> str:
    """Upload the files in one commit on top of ``head``; graphs of an earlier bundle are removed."""
    before = {file.rfilename for file in head.siblings}
    gone = sorted(name for name in before - files.keys() if name.startswith("onnx/"))

    def create(module: Any) -> str:
        operations: list[Any] = [module.CommitOperationDelete(name) for name in gone]
        operations += [module.CommitOperationAdd(name, content) for name, content in files.items()]
        message = f"Bundle {manifest.sha256[:12]} of {manifest.source.model}"
        return str(
            module.HfApi()
            .create_commit(repository, operations, commit_message=message, revision=revision, parent_commit=head.sha)
            .oid
        )

    return hub.ask(repository, create, quiet=quiet)


def _check_commit(repository: str, commit: str, files: dict[str, Path | bytes]) -> None:
    """Compare what a commit holds with what was pushed: sizes, and SHA-256 or git's hash.

    Raises:
        W2VError: something differs.
    """
    info = hub.ask(repository, lambda m: m.HfApi().model_info(repository, revision=commit, files_metadata=True))
    there = {file.rfilename: file for file in info.siblings}
    for name, content in files.items():
        if name not in there or not _is_same(there[name], content):
            raise W2VError(f"{name} is not in {repository} at commit {commit} as it was pushed; push again.")


def _is_same(file: Any, content: Path | bytes) -> bool:
    """Whether a file as the hub lists it has this content, by its size and SHA-256 or git's hash."""
    if isinstance(content, Path) and file.lfs is not None:
        return bool(file.size == content.stat().st_size and file.lfs.sha256 == sha256(content))
    data = content if isinstance(content, bytes) else content.read_bytes()
    if file.lfs is not None:
        return bool(file.lfs.sha256 == hashlib.sha256(data).hexdigest())
    return bool(file.blob_id == hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest())
