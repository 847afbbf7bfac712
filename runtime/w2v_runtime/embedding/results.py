"""Frozen data classes of a request (level, pooling, layers) and of its results (embeddings, failures, frame times)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Final, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from w2v_models.errors import RefusedError
from w2v_models.manifest import LAST_LAYER, WEIGHTED_LAYERS
from w2v_runtime.embedding.layer_weights import normalised
from w2v_runtime.tables.rows import Value

Level = Literal["utterance", "frame"]
Pooling = Literal["mean", "std", "min", "max"]

LEVELS: Final[tuple[Level, ...]] = get_args(Level)
POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)
#: The layer option that stands for every layer from 0.
ALL_LAYERS: Final = "all"


@dataclass(frozen=True)
class Failure:
    """One input that was not embedded: where it failed (``read``, ``embed`` or ``write``) and why, as a sentence."""

    path: str
    stage: str
    reason: str


@dataclass(frozen=True)
class FrameTimes:
    """Start and end of frames: frame t runs from t·step to t·step + width seconds of the input.

    Times are rounded to a nanosecond, so that they read as 0.7 and not as 0.7000000000000001.

    Examples:
        >>> FrameTimes(step=0.02, width=0.025).ends(3).tolist()
        [0.025, 0.045, 0.065]
    """

    step: float
    width: float

    def starts(self, frames: int) -> npt.NDArray[np.float64]:
        """Start of each of ``frames`` frames in seconds: (frames,)."""
        return np.round(np.arange(frames) * self.step, 9)

    def ends(self, frames: int) -> npt.NDArray[np.float64]:
        """End of each of ``frames`` frames in seconds: (frames,)."""
        return np.round(np.arange(frames) * self.step + self.width, 9)


@dataclass(frozen=True)
class Segment:
    """A part of a recording, from ``start`` to ``end`` seconds; ``end`` None is the end of the recording.

    ``channel`` counts from 0; None is what the options say. ``fields`` are what the segment's row of a table holds
    beside that, in the order of the table's columns. ``first`` is, in a result, the start of its first frame in seconds
    of the recording.
    """

    start: float
    end: float | None = None
    channel: int | None = None
    fields: tuple[Value, ...] = ()
    first: float = 0.0


@dataclass(frozen=True, eq=False)
class Embedding:
    """One embedded input, a recording or a segment of one.

    ``values`` is float32: (D,) for an utterance, (T, D) for frames; with several layers (layers, D) and
    (T, layers, D). D is the hidden size, times the number of poolings of an utterance.
    ``logits`` is the head's output: (K,), or (T, K) of a frame-level head; None without a head.
    ``duration`` is the input's length in seconds. ``segment`` is None for a whole recording.
    """

    path: str
    values: npt.NDArray[np.float32]
    duration: float
    logits: npt.NDArray[np.float32] | None = None
    warnings: tuple[str, ...] = ()
    segment: Segment | None = None

    @property
    def start(self) -> float:
        """Where the input begins in its recording, in seconds: 0 unless it is a segment."""
        return 0.0 if self.segment is None else self.segment.start

    @property
    def end(self) -> float:
        """Where the input ends in its recording, in seconds, to the nanosecond."""
        return self.duration if self.segment is None else round(self.segment.start + self.duration, 9)

    @property
    def name(self) -> str:
        """The path, and of a segment its times: what its warnings are listed by."""
        return self.path if self.segment is None else f"{self.path}[{self.start}:{self.end}]"


@dataclass(frozen=True)
class Request:
    """What to compute for each input.

    ``layers`` are ``last``, ``all`` or numbers from 0. With ``layer_weights``, one for each of the layers 0 … L, the
    result is the weighted sum of all layers instead. With ``spans`` each input is a span of what is heard, so that its
    frames are pooled outside the graph.

    Raises:
        RefusedError: the level or a pooling is unknown, a pooling is repeated, or layers and weights are both given.
    """

    level: Level = "utterance"
    pooling: tuple[Pooling, ...] = ("mean",)
    layers: tuple[str, ...] = (LAST_LAYER,)
    layer_weights: tuple[float, ...] | None = None
    spans: bool = False

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise RefusedError(f"level {self.level!r} is unknown; choose one of: {', '.join(LEVELS)}.")
        unknown = [name for name in self.pooling if name not in POOLINGS]
        if unknown or not self.pooling:
            raise RefusedError(f"pooling {','.join(unknown)!r} is unknown; choose from: {', '.join(POOLINGS)}.")
        if len(set(self.pooling)) != len(self.pooling):
            raise RefusedError(f"pooling {','.join(self.pooling)!r} names one twice.")
        if self.layer_weights is not None and self.layers not in ((LAST_LAYER,), (WEIGHTED_LAYERS,)):
            raise RefusedError(
                "layer and layer_weights (--layer-weights) exclude each other: the weights are those of all layers."
            )

    @classmethod
    def of(
        cls,
        level: str,
        pooling: str | Sequence[str],
        layer: str | int | Sequence[str | int] = LAST_LAYER,
        layer_weights: Sequence[float] | None = None,
        spans: bool = False,
    ) -> Request:
        """Build a request from what users write: ``"mean,std"`` or a list; ``9``, ``"last"``, ``"3,9"`` or a list.

        Raises:
            RefusedError: an argument is unknown, or of another type; the message names the choices.

        Examples:
            >>> Request.of("utterance", "mean,std", "3,9")
            Request(level='utterance', pooling=('mean', 'std'), layers=('3', '9'), layer_weights=None, spans=False)
        """
        poolings = _names(pooling, f"pooling is one or several of {', '.join(POOLINGS)}")
        layers = _names(layer, f"layer is {LAST_LAYER}, {ALL_LAYERS}, a whole number from 0, or several of them")
        weights = None if layer_weights is None else _numbers(layer_weights)
        return cls(cast(Level, level), cast(tuple[Pooling, ...], poolings), layers, weights, spans)

    def resolved(self, last: int) -> Request:
        """The request with ``all`` and layer weights replaced by layer names, for a model with the layers 0 … ``last``.

        Raises:
            RefusedError: the model does not have a layer, a layer is repeated, or there are not ``last`` + 1 weights.

        Examples:
            >>> Request.of("frame", "mean", "all").resolved(2).layers
            ('0', '1', '2')
        """
        if self.layer_weights is not None:
            if len(self.layer_weights) != last + 1:
                raise RefusedError(
                    f"there are {len(self.layer_weights)} layer weights, but the model has the {last + 1} layers "
                    f"0 to {last}."
                )
            return dataclasses.replace(self, layers=(WEIGHTED_LAYERS,))
        if self.layers == (ALL_LAYERS,):
            return dataclasses.replace(self, layers=tuple(str(layer) for layer in range(last + 1)))
        for layer in self.layers:
            if layer != LAST_LAYER and not (layer.isascii() and layer.isdecimal() and int(layer) <= last):
                raise RefusedError(
                    f"layer {layer!r} is not in this model; choose from 0 to {last}, last, or all alone."
                )
        layers = tuple(layer if layer == LAST_LAYER else str(int(layer)) for layer in self.layers)
        if len(set(layers)) != len(layers):
            raise RefusedError(f"layer {','.join(layers)!r} names one twice.")
        return dataclasses.replace(self, layers=layers)


def assembled(arrays: Sequence[npt.NDArray[np.float32]], request: Request) -> npt.NDArray[np.float32]:
    """Join one input's outputs to its values: statistics are concatenated, layers stacked before the last axis."""
    if request.level == "utterance":
        size = len(request.pooling)
        arrays = [np.concatenate(arrays[i : i + size]) for i in range(0, len(arrays), size)]
    return np.stack(arrays, axis=-2) if len(arrays) > 1 else arrays[0].copy()


def _names(value: object, known: str) -> tuple[str, ...]:
    """Split an option into names: a string with commas, a whole number, or an iterable of strings and whole numbers."""
    items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, Integral) else value
    if isinstance(items, Iterable) and not isinstance(items, bytes | Mapping):
        words = list(items)
        if words and all(isinstance(word, str | Integral) and not isinstance(word, bool) for word in words):
            return tuple(str(word).strip() for word in words)
    raise RefusedError(f"{known}, not {value!r}.")


def _numbers(weights: object) -> tuple[float, ...]:
    """Layer weights as floats that add up to 1; refused unless they are finite and one-dimensional."""
    try:
        array = np.asarray(weights, np.float64)
    except (TypeError, ValueError, RuntimeError):  # PyTorch's tensors raise RuntimeError
        array = np.empty(0)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise RefusedError("layer_weights (--layer-weights) are finite numbers, one for each layer from 0.")
    return normalised(array.tolist())
