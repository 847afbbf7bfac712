"""Checks before a run: refuses an output that may not be replaced or resumed, and files that would be overwritten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from w2v_models.errors import OutputError
from w2v_runtime.files.outputs import (
    JOURNAL_SUFFIX,
    VALUES_SUFFIX,
    Use,
    Written,
    exists,
    hidden,
    resolved,
)
from w2v_runtime.runs.failures import check_failures, is_stream
from w2v_runtime.runs.journal import DamagedJournalError, Header, adopt_earlier, earlier_journal, is_foreign
from w2v_runtime.runs.options import STDOUT, RunOptions
from w2v_runtime.runs.readback import FinishedOutput
from w2v_runtime.stores import companions, parts


def check_earlier(options: RunOptions, header: Header) -> None:
    """Refuse an output that exists, unless ``--overwrite`` is given, or ``--resume`` with equal options.

    Raises:
        OutputError: the output exists or is unfinished; the message names the choices, or the options that differ.
    """
    output, there = options.output.path, exists(options.output.path)
    if options.output.resume:
        adopt_earlier(output)
        earlier = earlier_header(options)
        if earlier is None and there:
            raise OutputError(f"{output} has no journal to resume from, and {_foreign(output)}")
        if earlier is not None:
            _refuse_other(output, earlier, header)
    elif not options.output.overwrite and there:
        if not hidden(output, JOURNAL_SUFFIX).exists() and earlier_header(options) is None:
            raise OutputError(f"{output} exists, and {_foreign(output)}")
        raise OutputError(f"{output} exists; continue it with --resume or replace it with --overwrite.")
    elif not options.output.overwrite and (part := _earlier_part(options)) is not None:
        raise OutputError(f"{part} exists, a part of the output; move it away, or replace it with --overwrite.")
    elif not options.output.overwrite and is_unfinished(output):
        raise OutputError(
            f"{output} has an unfinished run beside it ({hidden(output, JOURNAL_SUFFIX).name}); "
            "continue it with --resume or start again with --overwrite."
        )
    journal = hidden(output, JOURNAL_SUFFIX)
    if not options.output.resume and os.path.lexists(journal) and is_foreign(journal):
        raise OutputError(f"{journal} has the name of the run's journal and is none; move it away.")
    _check_list(options)


def _earlier_part(options: RunOptions) -> Path | None:
    """A file that exists and holds results of the output, but for the output itself; None if there is none."""
    return next(filter(Path.exists, parts(options.output.path, options.output.format).values()), None)


def _foreign(output: Path) -> str:
    return (
        "was not written by w2v-embed, so --resume cannot continue it; name another --output, or lose what "
        f"{output.name} holds with --overwrite."
    )


def _check_list(options: RunOptions) -> None:
    """Refuse to begin with a list of failures of another run, which ``--failures`` names: it would be lost."""
    output, failures = options.output, options.output.failures
    if failures is None or output.resume or output.overwrite or is_stream(failures) or not failures.exists():
        return
    if failures.stat().st_size:
        raise OutputError(
            f"{failures} lists the failures of an earlier run; name another file, or continue or replace that run "
            "with --resume or --overwrite."
        )


def is_unfinished(output: Path) -> bool:
    """Whether a run, of this release or the previous one, left results beside an output that are not in it yet."""
    if hidden(output, VALUES_SUFFIX).exists():
        return True
    try:
        earlier = Header.read(earlier_journal(output))
    except OutputError:
        return False  # nothing that could be continued, and nothing that will be replaced
    return earlier is not None and not earlier.finished


def earlier_header(options: RunOptions) -> Header | None:
    """The header of the run to resume, from its journal or, if that is damaged or gone, from its output's metadata.

    Returns None if there is neither.

    Raises:
        OutputError: neither the journal nor the output describes the run.
    """
    output, there = options.output, exists(options.output.path)
    try:
        header = Header.read(hidden(output.path, JOURNAL_SUFFIX))
    except DamagedJournalError:
        if not there:
            raise
        return FinishedOutput.open(output.path, output.format).header
    if header is None and there:
        with contextlib.suppress(OutputError):  # an output of something else
            return FinishedOutput.open(output.path, output.format).header
    return header


def _refuse_other(output: Path, earlier: Header, now: Header) -> None:
    before, after = earlier.fingerprint | {"shard": earlier.shard}, now.fingerprint | {"shard": now.shard}
    differences = [
        f"{name} was {before.get(name)!r} and is now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if differences:
        raise OutputError(
            f"{output} was begun by another run: {'; '.join(differences)}. "
            "Repeat that run's options, or start again with --overwrite."
        )


def _is_own(failures: Path, output: Path) -> bool:
    """Whether a list of failures would have one of the run's own names, or lie in the folder that is the output."""
    listed, own = resolved(failures), hidden(output, ".w2v-")
    return resolved(output) in listed.parents or (listed.parent == own.parent and listed.name.startswith(own.name))


def written_files(options: RunOptions, reads: Iterable[Use]) -> Written:
    """The files that a run writes, checked against each other and against ``reads``, the files that it reads.

    Raises:
        OutputError: a file is written twice or also read, or the list of failures would replace a user's file.
    """
    output, failures, uses = options.output, options.output.failures_path, list[Use]()
    if output.format != STDOUT:
        uses += [
            Use(output.path, "the output"),
            Use(hidden(output.path, JOURNAL_SUFFIX), "the run's journal"),
            Use(hidden(output.path, VALUES_SUFFIX), "the run's record of results"),
            *(Use(path, f"the output's {what}") for what, path in companions(output.path, output.format).items()),
        ]
    if failures is not None and not is_stream(failures):
        uses.append(Use(failures, "the list of failures"))
    written = Written(tuple(uses))
    if output.format != STDOUT and failures is not None and _is_own(failures, output.path):
        raise OutputError(f"the list of failures {failures} is, or lies in, what the run writes; name another file.")
    written.refuse_reads(reads)
    if failures is not None:
        check_failures(failures)
    return written
