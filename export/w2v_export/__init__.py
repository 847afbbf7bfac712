"""From a checkpoint to a bundle, proven equal to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w2v_export.exporter import export_bundle

__all__ = ["export_bundle"]


def __getattr__(name: str) -> Any:
    """Import PyTorch and its company when first used, so that ``w2v-export --help`` answers at once."""
    if name == "export_bundle":
        from w2v_export.exporter import export_bundle

        return export_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
