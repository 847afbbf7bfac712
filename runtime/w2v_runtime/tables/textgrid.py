"""Praat's ``.TextGrid``, one or a folder of them, read by praatio (the extra ``textgrid``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

from w2v_models.errors import RefusedError
from w2v_runtime.tables.rows import Row

SUFFIX: Final = ".textgrid"
_NAMED: Final = 8


def read(path: str, tier: str | None) -> Iterator[Row]:
    """The intervals of a tier, with ``label``; ``file`` is the TextGrid's own name without suffix.

    Args:
        path: a TextGrid, or a folder, which is searched for them; hidden ones are left out.
        tier: the name of the tier; None means the only one with intervals.

    Raises:
        RefusedError: praatio is not installed, a file is no TextGrid, or the tier is not clear.
    """
    folder = os.path.isdir(path)
    number = 0
    for file in _found(path) if folder else [path]:
        place = f"{file}: " if folder else ""
        name = os.path.splitext(os.path.relpath(file, path) if folder else os.path.basename(file))[0]
        for start, end, label in _intervals(file, tier, place):
            number += 1
            if label:
                yield Row(number, name, float(start), float(end), None, {"label": label})


def _found(folder: str) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIX) and not name.startswith("."):
                yield os.path.join(place, name)


def _intervals(file: str, tier: str | None, place: str) -> list[Any]:
    try:
        from praatio import textgrid
    except ImportError:
        raise RefusedError("TextGrids need praatio, which is not installed: pip install 'w2v-onnx[textgrid]'") from None
    try:
        grid = textgrid.openTextgrid(
            file, includeEmptyIntervals=True, reportingMode="silence", duplicateNamesMode="rename"
        )
    except OSError:
        raise
    except Exception as error:  # praatio raises what its parser meets
        raise RefusedError(
            f"{place}it is no TextGrid that praatio reads ({type(error).__name__}: {error!s:.120})."
        ) from None
    tiers = {name: grid.getTier(name) for name in grid.tierNames}
    intervals = [name for name, found in tiers.items() if isinstance(found, textgrid.IntervalTier)]
    if tier is None:
        if len(intervals) != 1:
            there = f"{len(intervals)} tiers with intervals: {', '.join(intervals[:_NAMED])}" if intervals else "none"
            raise RefusedError(f"{place}choose a tier with --tier; it has {there}.")
        tier = intervals[0]
    if tier not in intervals:
        what = "has points and no intervals" if tier in tiers else "is not there"
        raise RefusedError(
            f"{place}the tier {tier!r} {what}; those with intervals are: {', '.join(intervals) or 'none'}."
        )
    return list(tiers[tier].entries)
