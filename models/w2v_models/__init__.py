"""What a model is: the catalogue of variants, the manifest, the bundle on disk, the errors."""

from w2v_models.bundle import Bundle
from w2v_models.catalogue import CATALOGUE, Variant
from w2v_models.errors import (
    AudioError,
    BundleError,
    CheckpointError,
    EngineError,
    OutputError,
    ParityError,
    RefusedError,
    W2VError,
)
from w2v_models.manifest import Architecture, ConvStack, FileRecord, Head, Manifest, PrecisionRecord, Source
from w2v_models.tolerances import TOLERANCES, ParityRow, Tolerance

__all__ = [
    "CATALOGUE",
    "TOLERANCES",
    "Architecture",
    "AudioError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "ConvStack",
    "EngineError",
    "FileRecord",
    "Head",
    "Manifest",
    "OutputError",
    "ParityError",
    "ParityRow",
    "PrecisionRecord",
    "RefusedError",
    "Source",
    "Tolerance",
    "Variant",
    "W2VError",
]
