"""Read the recordings of ``--check``, on which a bundle is proven too, before the checkpoint is loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from w2v_export.signals import Waveform
from w2v_export.validation import readable
from w2v_models.errors import AudioError, RefusedError
from w2v_models.manifest import Architecture
from w2v_runtime.audio.reading import open_audio

Recording = tuple[Path, Waveform]
#: The longest recording in seconds that is compared; PyTorch runs on it, and the public graph in one piece.
LONGEST_SECONDS: Final = 40


def read_recordings(paths: Sequence[Path], architecture: Architecture) -> list[Recording]:
    """Decode recordings; one that is named several times is decoded once.

    Raises:
        RefusedError: a recording cannot be read, is shorter than a frame, or longer than :data:`LONGEST_SECONDS`.
    """
    return [(path, _read(path, architecture)) for path in {os.path.abspath(path): path for path in paths}.values()]


def _read(path: Path, architecture: Architecture) -> Waveform:
    rate, conv = architecture.sample_rate, architecture.conv
    longest = LONGEST_SECONDS * rate
    blocks: list[Waveform] = []
    try:
        with open_audio(path, rate) as stream:
            for block in stream:
                blocks.append(block)
                if sum(map(len, blocks)) > longest:
                    raise AudioError(
                        f"it is longer than the {LONGEST_SECONDS} s that can be checked; check a part of it."
                    )
    except AudioError as error:
        raise RefusedError(f"{path} cannot be checked: {error}") from None
    waveform = np.concatenate(blocks)
    if conv.num_frames(len(waveform)) == 0:
        raise RefusedError(
            f"{path} cannot be checked: it has {len(waveform)} samples at {rate} Hz, and a frame takes "
            f"{conv.receptive_field}."
        )
    return waveform


def named(recordings: Sequence[Recording], taken: Collection[str]) -> dict[str, Waveform]:
    """Recordings by file name, or by path if several have the same file name or it is one of ``taken``."""
    times = Counter([*taken, *(readable(path.name) for path, _ in recordings)])
    return {
        name if times[name := readable(path.name)] == 1 else readable(_with_folder(path)): waveform
        for path, waveform in recordings
    }


def _with_folder(path: Path) -> str:
    return str(path) if os.sep in str(path) else os.path.join(os.curdir, path)
