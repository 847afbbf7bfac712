"""The contract between export and runtime: what a bundle holds, as frozen data.

Export writes it, runtime reads it, and both take every name, length and stride from here. The fields of
:class:`Manifest` are those of ``manifest.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from w2v_models import schema
from w2v_models.tolerances import TOLERANCES, ParityRow

#: To be raised whenever the fields or the graph's contract change; a runtime reads exactly its own version.
FORMAT_VERSION: Final = 5

#: Fields that manifests have had since the first version.
_IN_ALL_VERSIONS: Final = frozenset(("source", "architecture", "precisions", "reference"))

WAVEFORM: Final = "waveform"
LENGTHS: Final = "lengths"
LAST_HIDDEN_STATE: Final = "last_hidden_state"
FRAME_LENGTHS: Final = "frame_lengths"
EMBEDDING: Final = "embedding"
LOGITS: Final = "logits"
#: A second output of speaker heads: the speaker vector.
SPEAKER_EMBEDDINGS: Final = "embeddings"
#: The reference's ``last_hidden_state``, after whatever follows the last block.
LAST_LAYER: Final = "last"
#: The sum of the layers 0 … L, each times its element of the input ``layer_weights`` (L + 1,).
WEIGHTED_LAYERS: Final = "weighted"
LAYER_WEIGHTS: Final = "layer_weights"
#: Third input of the graph ``features``: the whole recording's statistics as float32. For the front end ``waveform``,
#: in this order, the mean m of its samples as the sum of two numbers, so that a large offset costs no digits; their
#: variance; then mean minus m (k,) and covariance (k, k) of the frames that the first convolution (kernel k) sees,
#: all computed from the waveform before any normalisation. For ``log-mel``, mean and variance of each mel band.
MOMENTS: Final = "moments"
#: The graph ``features`` turns pieces of a long recording into the projected features that the graph ``encoder`` takes.
FEATURES: Final = "features"
#: The graph ``encoder`` outputs a head's frames too; the graph ``head`` takes their statistics over all windows.
HEAD_FRAMES: Final = "head_frames"
POOLED: Final = "pooled"
#: The graph ``mel`` outputs the log-mel frames of a piece of audio; their statistics are the moments of that front end.
MEL: Final = "mel"

WAVEFORM_FRONT_END: Final = "waveform"
LOG_MEL_FRONT_END: Final = "log-mel"

RANDOM_WEIGHTS: Final = "random"
CHECKPOINT_WEIGHTS: Final = "checkpoint"


def frames_output(layer: str) -> str:
    """Name of the graph's output with a layer's frames; ``layer`` is ``last``, ``weighted`` or a number from 0."""
    return LAST_HIDDEN_STATE if layer == LAST_LAYER else f"layer_{layer}"


def pooled_output(layer: str, pooling: str) -> str:
    """Name of the graph's output with a statistic, such as ``mean``, over a layer's frames."""
    return EMBEDDING if (layer, pooling) == (LAST_LAYER, "mean") else f"{frames_output(layer)}_{pooling}"


_SAFE_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class ConvStack:
    """The strided convolutions that turn samples into frames.

    A convolution's output has the length ``(length - kernel) // stride + 1``. Nested floors of integers compose, so the
    whole stack has that of one convolution with the kernel :attr:`receptive_field` and the stride :attr:`stride`, both
    in samples.

    Examples:
        >>> wav2vec2 = ConvStack(kernels=(10, 3, 3, 3, 3, 2, 2), strides=(5, 2, 2, 2, 2, 2, 2), channels=(512,) * 7)
        >>> wav2vec2.stride, wav2vec2.receptive_field
        (320, 400)
        >>> wav2vec2.num_frames(16000)
        49
    """

    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.kernels) == len(self.strides) == len(self.channels) > 0:
            raise ValueError("kernels, strides and channels must have the same length, at least 1")
        if min(self.kernels + self.strides + self.channels) < 1:
            raise ValueError("kernels, strides and channels must be positive")

    @property
    def stride(self) -> int:
        """Samples from one frame to the next (320 for wav2vec 2.0)."""
        return math.prod(self.strides)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees (400 for wav2vec 2.0)."""
        field = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            field = (field - 1) * stride + kernel
        return field

    @property
    def padded_receptive_field(self) -> int:
        """Samples for one frame when every level is a whole number of blocks of its stride (475 for wav2vec 2.0).

        Each further frame takes :attr:`stride` samples more. The graph pads to this, so that each convolution is a
        matrix product over blocks and no remainder has to be cut off.
        """
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = stride * (samples + math.ceil(kernel / stride) - 1)
        return samples

    def num_frames(self, samples: int) -> int:
        """Frames of an utterance of ``samples`` samples; 0 if it is shorter than one frame."""
        return max(0, (samples - self.receptive_field) // self.stride + 1)


@dataclass(frozen=True)
class Source:
    """Where the weights came from: a hub id or folder name, its commit, and whether they are trained or seeded.

    ``language`` is the one whose adapter the weights hold; None of a model without.
    """

    model: str
    revision: str | None
    weights: str
    seed: int | None
    licence: str | None
    language: str | None = None

    def __post_init__(self) -> None:
        if self.weights not in (RANDOM_WEIGHTS, CHECKPOINT_WEIGHTS):
            raise ValueError(f"weights must be {CHECKPOINT_WEIGHTS!r} or {RANDOM_WEIGHTS!r}, not {self.weights!r:.80}")
        if (self.weights == RANDOM_WEIGHTS) != (self.seed is not None):
            raise ValueError("a seed goes with random weights, and only with them")

    @property
    def random(self) -> bool:
        """True where the weights are seeded random numbers: right shapes and speed, meaningless embeddings."""
        return self.weights == RANDOM_WEIGHTS


@dataclass(frozen=True)
class Adapter:
    """Convolutions after the encoder, whose output is the ``last_hidden_state`` in place of the encoder's.

    Its frame t is centred on frame ``stride``·t of the encoder, and holds ``size`` numbers.
    """

    stride: int
    size: int

    def __post_init__(self) -> None:
        if min(self.stride, self.size) < 1:
            raise ValueError("an adapter's stride and size must be positive")


@dataclass(frozen=True)
class Architecture:
    """The shape of the encoder, enough to count its frames and its arithmetic, and of its adapter, if it has one."""

    model_type: str
    front_end: str
    sample_rate: int
    conv: ConvStack
    hidden_size: int
    layers: int
    attention_heads: int
    intermediate_size: int
    normalise: bool
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        if self.front_end not in (WAVEFORM_FRONT_END, LOG_MEL_FRONT_END):
            raise ValueError(f"front_end must be {WAVEFORM_FRONT_END!r} or {LOG_MEL_FRONT_END!r}")
        sizes = (self.sample_rate, self.hidden_size, self.layers, self.attention_heads, self.intermediate_size)
        if min(sizes) < 1:
            raise ValueError("sample_rate and all sizes must be positive")

    def size(self, layer: str) -> int:
        """The numbers that a frame of a layer holds: the hidden size, or the adapter's."""
        return self.adapter.size if self.adapter and layer == LAST_LAYER else self.hidden_size

    def step(self, layer: str) -> int:
        """The encoder's frames from one frame of a layer to the next: 1, or the adapter's stride."""
        return self.adapter.stride if self.adapter and layer == LAST_LAYER else 1


@dataclass(frozen=True)
class Head:
    """A checkpoint's own outputs beside the embedding.

    ``labels`` name the columns of the last of ``outputs``, in order, which is what a run stores. At ``level``
    ``frame`` there is one row per frame. At ``utterance``, the head takes the statistics ``pooling`` of frames of its
    own, ``margin`` fewer than the encoder's on each side.
    """

    kind: str
    labels: tuple[str, ...]
    outputs: tuple[str, ...]
    level: str
    pooling: tuple[str, ...]
    margin: int

    def __post_init__(self) -> None:
        if not self.labels or not self.outputs:
            raise ValueError("a head needs labels and outputs")
        if not set(self.outputs) <= {LOGITS, SPEAKER_EMBEDDINGS}:
            raise ValueError(f"a head's outputs must be of {LOGITS!r} and {SPEAKER_EMBEDDINGS!r}")
        if self.level not in ("utterance", "frame") or (self.level == "utterance") != bool(self.pooling):
            raise ValueError("a head is of level 'utterance' with pooling, or of level 'frame' without")
        if not set(self.pooling) <= {"mean", "std1"} or self.margin < 0:
            raise ValueError("a head's pooling must be of 'mean' and 'std1', its margin not negative")

    @property
    def shortest(self) -> int:
        """The fewest frames of the encoder from which the head can be computed."""
        return 2 * self.margin + (2 if "std1" in self.pooling else 1)


def public_outputs(head: Head | None) -> tuple[str, ...]:
    """Names of the public graph's outputs, in order."""
    return (LAST_HIDDEN_STATE, FRAME_LENGTHS, EMBEDDING) + (head.outputs if head else ())


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle: path inside it (always with ``/``), SHA-256 in hex, size in bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not _SAFE_PATH.fullmatch(self.path):
            raise ValueError(f"{self.path!r:.80} is not a plain path inside the bundle")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"{self.path}: sha256 must be 64 hexadecimal digits")
        if self.size < 0:
            raise ValueError(f"{self.path}: size must not be negative")


@dataclass(frozen=True)
class PrecisionRecord:
    """One precision of the bundle: its graphs, their common external data, and how it compared with PyTorch.

    ``graph`` is the public one. ``layers`` has an output for each layer and statistic, and is cut to the requested
    outputs before it is opened. Long recordings go another way: ``features`` turns a piece of one into features, given
    the moments of the whole; ``encoder`` turns the features of the whole, or of a window, into the same outputs;
    ``head`` computes an utterance-level head from the statistics over all windows; ``mel`` computes the log-mel frames
    for the moments of that front end. Of the matrix products of a reduced precision such as int8, ``kept`` names those
    that stayed in fp32 and ``smoothed`` those whose input channels were evened out.
    """

    graph: FileRecord
    layers: FileRecord
    features: FileRecord
    encoder: FileRecord
    head: FileRecord | None
    mel: FileRecord | None
    data: tuple[FileRecord, ...]
    kept: tuple[str, ...]
    smoothed: tuple[str, ...]
    parity: tuple[ParityRow, ...]

    def __post_init__(self) -> None:
        if len({posixpath.dirname(record.path) for record in self.files}) > 1:
            raise ValueError("all files of a precision must be in one folder")

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of this precision; all are in one folder, since a graph names its data relative to its own."""
        graphs = (self.graph, self.layers, self.features, self.encoder, self.head, self.mel)
        return (*(record for record in graphs if record is not None), *self.data)


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: everything about a bundle except the graphs themselves.

    ``sources`` are the checkpoint's own descriptions, such as its ``config.json``, for whoever looks at the bundle on
    the hub; nothing here reads them.
    """

    format_version: int
    source: Source
    architecture: Architecture
    head: Head | None
    opset: int
    precisions: dict[str, PrecisionRecord]
    reference: FileRecord
    sources: tuple[FileRecord, ...]
    created: str
    packages: dict[str, str]

    def __post_init__(self) -> None:
        if not self.precisions:
            raise ValueError("a bundle needs at least one precision")
        for name, entry in self.precisions.items():
            if name not in TOLERANCES:
                raise ValueError(f"precision {name!r:.80} is unknown; there are {', '.join(TOLERANCES)}")
            if unknown := {row.output for row in entry.parity} - TOLERANCES[name].keys():
                raise ValueError(f"{name} has parity rows of unknown outputs: {schema.listed(unknown)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs: samples (batch, samples) float32 and their lengths (batch,) int64."""
        return (WAVEFORM, LENGTHS)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in order; those of the head only where there is one."""
        return public_outputs(self.head)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file that the manifest lists, each once."""
        return self.files_of(self.precisions)

    def files_of(self, precisions: Iterable[str]) -> tuple[FileRecord, ...]:
        """The files of some of the precisions, the references, and the checkpoint's descriptions, each once."""
        records = [record for name in precisions for record in self.precisions[name].files]
        return tuple({record.path: record for record in (*records, self.reference, *self.sources)}.values())

    @property
    def sha256(self) -> str:
        """The bundle's hash: that of the manifest's text, which holds the hash of every other file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read and validate the text of a ``manifest.json``.

        Raises:
            ValueError: it is not JSON, of another format version, or breaks a rule of this module.
        """
        data = schema.parse(text, "manifest")
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {schema.shown(version)}; this release reads version {FORMAT_VERSION}")
        return schema.read(cls, data, "manifest")


def older_files(text: str | bytes) -> tuple[FileRecord, ...]:
    """The files that a manifest of an older format version lists; empty if ``text`` is not such a manifest.

    The record of a file has had the same fields in all versions.
    """
    try:
        data = schema.parse(text, "manifest")
        version = data.get("format_version") if isinstance(data, dict) else None
        if type(version) is not int or not 1 <= version < FORMAT_VERSION or not data.keys() >= _IN_ALL_VERSIONS:
            return ()
        return tuple(_records([data["precisions"], data["reference"], data.get("sources")]))
    except (ValueError, RecursionError):
        return ()


def _records(data: Any) -> Iterator[FileRecord]:
    """Every file's record at any depth of decoded JSON."""
    if isinstance(data, dict) and data.keys() == {field.name for field in dataclasses.fields(FileRecord)}:
        yield schema.read(FileRecord, data, "manifest")
    elif isinstance(data, dict | list):
        for inner in data.values() if isinstance(data, dict) else data:
            yield from _records(inner)
