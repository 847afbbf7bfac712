"""From an audio file to a stored embedding."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2v_runtime.embedder import Embedder
    from w2v_runtime.embedding.results import Embedding, Failure

# ONNX Runtime would report its use, and warn on standard error where no home folder keeps its identifier.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Embedder", "Embedding", "Failure"]


def __getattr__(name: str) -> Any:
    """Import the names above when first used: ``w2v-embed --help`` needs none of what is behind them."""
    if name == "Embedder":
        from w2v_runtime.embedder import Embedder

        return Embedder
    if name in ("Embedding", "Failure"):
        from w2v_runtime.embedding import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
