"""A scikit-learn transformer from recordings to embeddings (extra ``sklearn``)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin

from w2v_models.errors import AudioError, RefusedError
from w2v_runtime.embedder import Embedder
from w2v_runtime.embedding.inputs import Context
from w2v_runtime.embedding.results import Embedding, Request
from w2v_runtime.stores.csv import vector_columns

_ERRORS: Final = ("raise", "nan")
_NAMED: Final = 3
#: Embedders that stay open for all copies of a transformer in a process.
_OPEN: Final = 2


class SpeechEmbedding(TransformerMixin, BaseEstimator):
    """Recordings or segments in, vectors out: a step of a ``Pipeline``.

    It learns nothing, so ``fit`` only checks. Copies (``clone``, pickles, joblib's processes) hold the arguments alone;
    those of one process share one engine.

    Args:
        model: as for :class:`Embedder`.
        device: as for :class:`Embedder`.
        precision: as for :class:`Embedder`.
        threads: as for :class:`Embedder`; give 1 where joblib runs as many processes as there are processors.
        pooling: as for :meth:`Embedder.embed`.
        layer: as for :meth:`Embedder.embed`.
        context: what is heard around a segment, as for :meth:`Embedder.embed_segments`.
        channel: a channel number from 0; None for the mean of all.
        pad_short: whether audio shorter than a frame is padded.
        head: whether the head's columns come before the vector.
        errors: ``raise``, or ``nan`` for rows of NaN where a recording cannot be embedded.

    Examples:
        >>> from w2v_runtime.integrations.sklearn import SpeechEmbedding
        >>> SpeechEmbedding("facebook/wav2vec2-base-960h").fit_transform(["speech.wav"]).shape
        (1, 768)
    """

    def __init__(
        self,
        model: Any = None,
        *,
        device: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        pooling: str | Sequence[str] = "mean",
        layer: str | int | Sequence[str | int] = "last",
        context: Context = 0.0,
        channel: int | None = None,
        pad_short: bool = False,
        head: bool = False,
        errors: str = "raise",
    ) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self.threads = threads
        self.pooling = pooling
        self.layer = layer
        self.context = context
        self.channel = channel
        self.pad_short = pad_short
        self.head = head
        self.errors = errors

    def fit(self, X: Any, y: Any = None) -> SpeechEmbedding:  # noqa: ARG002, N803
        """Open the model and check the arguments.

        Raises:
            RefusedError: an argument is out of bounds.
            BundleError: the bundle is missing or damaged.
        """
        self._request()
        return self

    def transform(self, X: Any) -> npt.NDArray[np.float32]:  # noqa: N803
        """Embed recordings: (n, D) float32, with the head's columns in front if asked for.

        Args:
            X: n paths, or (waveform, sample_rate) pairs, or bytes; or segments as rows ``file, start, end`` of a table
                or an array (n, 3), in seconds or timedeltas. A column (n, 1) of paths is taken too.

        Raises:
            AudioError: recordings cannot be embedded, and ``errors`` is ``raise``.
        """
        embedder, _ = self._request()
        files, starts, ends = _inputs(X)
        options: dict[str, Any] = {
            "pooling": self.pooling,
            "layer": self.layer,
            "channel": self.channel,
            "pad_short": self.pad_short,
        }
        if starts is None or ends is None:
            results = embedder.embed_files(files, **options)
        else:
            results = embedder.embed_segments(files, starts, ends, context=self.context, **options)
        names = self.get_feature_names_out()
        rows = np.full((len(files), len(names)), np.nan, np.float32)
        failures = []
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Embedding):
                columns = [result.logits] if self.head and result.logits is not None else []
                row[:] = np.concatenate([*columns, result.values.ravel()])
            else:
                failures.append(f"{result.path}: {result.reason}")
        if failures and self.errors == "raise":
            more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
            raise AudioError(
                f"{len(failures)} of {len(files)} cannot be embedded: {'; '.join(failures[:_NAMED])}{more}"
            )
        return rows

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[np.object_]:  # noqa: ARG002
        """The head's labels, if asked for, and ``f0`` … ``f{D-1}``; of several layers ``l9_f0`` …."""
        embedder, request = self._request()
        head = embedder.head(request) if self.head else None
        names = vector_columns(request.layers, embedder.dimension(request))
        return np.array([*(head.labels if head else ()), *names], object)

    def _request(self) -> tuple[Embedder, Request]:
        if self.errors not in _ERRORS:
            raise RefusedError(f"errors is one of {', '.join(_ERRORS)}, not {self.errors!r}.")
        embedder = _opened(self.model, self.device, self.precision, self.threads)
        return embedder, embedder.resolve(Request.of("utterance", self.pooling, self.layer))

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        return tags


def _opened(model: Any, device: str, precision: str, threads: int | None) -> Embedder:
    if isinstance(model, Embedder):
        return model
    return _shared(model, device, precision, threads)


@functools.lru_cache(maxsize=_OPEN)
def _shared(model: Any, device: str, precision: str, threads: int | None) -> Embedder:
    return Embedder(model, device, precision, threads)


def _inputs(given: Any) -> tuple[list[Any], list[float] | None, list[float | None] | None]:
    """The recordings, and the starts and ends in seconds where they are segments."""
    columns = getattr(given, "columns", None)
    if columns is not None and {"file", "start", "end"} <= set(columns):
        return list(given["file"]), _times(given["start"], 0.0), _times(given["end"], None)
    if columns is not None and len(columns) == 1:
        return list(given[columns[0]]), None, None
    if isinstance(given, np.ndarray) and given.ndim == 2 and given.dtype.kind in "OUS":
        if given.shape[1] == 1:
            return list(given[:, 0]), None, None
        if given.shape[1] == 3:
            return list(given[:, 0]), _times(given[:, 1], 0.0), _times(given[:, 2], None)
    if columns is not None or (isinstance(given, np.ndarray) and given.ndim != 1):
        raise RefusedError("recordings are paths or (waveform, sample_rate) pairs, segments rows of file, start, end.")
    return list(given), None, None


def _times(values: Any, missing: Any) -> list[Any]:
    seconds = []
    for value in values:
        if hasattr(value, "total_seconds"):
            value = value.total_seconds()
        elif isinstance(value, np.timedelta64):
            value = value / np.timedelta64(1, "s")
        seconds.append(missing if value is None or value != value else float(value))
    return seconds
