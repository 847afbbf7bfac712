"""The counts and times of a run, for its progress and its summary line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from w2v_runtime.embedding.results import Failure

#: What a run is doing: looking at what earlier runs finished, embedding, or writing its output.
Stage = Literal["checking", "embedding", "writing"]


@dataclass
class Summary:
    """Counts of inputs, seconds of audio and of time, and samples with and without padding.

    ``embedded`` counts inputs of this run, ``recalled`` those that earlier runs finished, ``warned`` the embedded ones
    with warnings, ``windowed`` those too long to be embedded whole, ``pruned`` dropped results, ``damaged`` damaged
    journal lines; ``running_seconds`` is what is done of a long recording; ``checked`` and ``written`` count inputs in
    the stages of their name. ``one`` is what an input is called, ``file`` or ``segment``.
    """

    one: str = "file"
    stage: Stage = "embedding"
    embedded: int = 0
    recalled: int = 0
    failed: int = 0
    warned: int = 0
    windowed: int = 0
    pruned: int = 0
    damaged: int = 0
    checked: int = 0
    written: int = 0
    audio_seconds: float = 0.0
    running_seconds: float = 0.0
    samples: int = 0
    padded_samples: int = 0
    wall_seconds: float = 0.0
    engine_seconds: float = 0.0
    first_failures: list[Failure] = field(default_factory=list)

    @property
    def results(self) -> int:
        """Inputs with a result, of this run and earlier ones."""
        return self.embedded + self.recalled

    @property
    def done(self) -> int:
        """Inputs that the present stage has finished."""
        return {"checking": self.checked, "embedding": self.results + self.failed, "writing": self.written}[self.stage]

    @property
    def padding(self) -> float:
        """The padding's share of all samples that went through the engine."""
        return 1 - self.samples / self.padded_samples if self.padded_samples else 0.0
