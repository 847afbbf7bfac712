"""What a run asks for and what it yields: options in, embeddings and failures out, all frozen."""

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

Level = Literal["utterance", "frame"]
Pooling = Literal["mean", "std", "min", "max"]

LEVELS: Final[tuple[Level, ...]] = get_args(Level)
POOLINGS: Final[tuple[Pooling, ...]] = get_args(Pooling)
#: Every layer from 0.
ALL_LAYERS: Final = "all"


@dataclass(frozen=True)
class Failure:
    """One input that was not embedded: where it failed (``read``, ``embed`` or ``write``) and why, as a sentence."""

    path: str
    stage: str
    reason: str


@dataclass(frozen=True)
class FrameTimes:
    """Where frames stand in the input's own time: frame t from t·step to t·step + width seconds.

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


@dataclass(frozen=True, eq=False)
class Embedding:
    """One embedded input.

    ``values`` is float32: (D,) for an utterance, (T, D) for frames; with several layers (layers, D) and
    (T, layers, D). D is the hidden size, times the number of poolings of an utterance.
    ``logits`` is the head's output (K,), or (T, K) of a head that answers frame by frame, None without one.
    ``duration`` is the input's length in seconds.
    """

    path: str
    values: npt.NDArray[np.float32]
    duration: float
    logits: npt.NDArray[np.float32] | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What to compute of each input.

    ``layers`` are ``last``, ``all`` or numbers from 0; with ``layer_weights`` (of the layers 0 … L) one vector, or one
    a frame, is made of all of them.

    Raises:
        RefusedError: a level, pooling or layer is not one of those known.
    """

    level: Level = "utterance"
    pooling: tuple[Pooling, ...] = ("mean",)
    layers: tuple[str, ...] = (LAST_LAYER,)
    layer_weights: tuple[float, ...] | None = None

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
    ) -> Request:
        """Build from what users write: ``"mean,std"`` or a list; ``9``, ``"last"``, ``"3,9"`` or a list.

        Raises:
            RefusedError: one of them is unknown, or of another type; the message names what there is.

        Examples:
            >>> Request.of("utterance", "mean,std", "3,9")
            Request(level='utterance', pooling=('mean', 'std'), layers=('3', '9'), layer_weights=None)
        """
        poolings = _words(pooling, f"pooling is one or several of {', '.join(POOLINGS)}")
        layers = _words(layer, f"layer is {LAST_LAYER}, {ALL_LAYERS}, a whole number from 0, or several of them")
        weights = None if layer_weights is None else _numbers(layer_weights)
        return cls(cast(Level, level), cast(tuple[Pooling, ...], poolings), layers, weights)

    def resolved(self, last: int) -> Request:
        """With the layers of a model named that has the layers 0 … ``last``.

        Raises:
            RefusedError: a layer is not one of them, or there is another number of layer weights.

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


def _words(value: object, known: str) -> tuple[str, ...]:
    """Words and whole numbers as words; several with commas, or in any iterable."""
    items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, Integral) else value
    if isinstance(items, Iterable) and not isinstance(items, bytes | Mapping):
        words = list(items)
        if words and all(isinstance(word, str | Integral) and not isinstance(word, bool) for word in words):
            return tuple(str(word).strip() for word in words)
    raise RefusedError(f"{known}, not {value!r}.")


def _numbers(weights: object) -> tuple[float, ...]:
    """Layer weights as they are computed with."""
    try:
        array = np.asarray(weights, np.float64)
    except (TypeError, ValueError, RuntimeError):  # the last is that of tensors
        array = np.empty(0)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise RefusedError("layer_weights (--layer-weights) are finite numbers, one for each layer from 0.")
    return tuple(array.tolist())
