"""The variants that are known by name: hub id, licence and architecture.

A real checkpoint's own files always decide; this serves ``w2v-models list`` and ``--random-weights``, which needs the
architecture without the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

#: What all wav2vec 2.0 variants share, in the words of transformers' ``Wav2Vec2Config``.
_COMMON: Final[dict[str, Any]] = {
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
}
_BASE: Final = _COMMON | {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
    "conv_bias": False,
}
_LARGE: Final = _COMMON | {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
}


@dataclass(frozen=True)
class Variant:
    """A catalogue entry; ``config`` and ``labels`` hold what ``--random-weights`` builds the model from."""

    id: str
    licence: str
    description: str
    config: dict[str, Any]
    attention_mask: bool
    labels: tuple[str, ...] = ()


CATALOGUE: Final[tuple[Variant, ...]] = (
    Variant("facebook/wav2vec2-base-960h", "apache-2.0", "base, 960 h of LibriSpeech", _BASE, False),
    Variant("facebook/wav2vec2-large-robust", "apache-2.0", "large, robust pre-training", _LARGE, True),
    Variant("facebook/wav2vec2-large-robust-ft-swbd-300h", "apache-2.0", "large, tuned on Switchboard", _LARGE, True),
    Variant("facebook/wav2vec2-large-robust-ft-libri-960h", "apache-2.0", "large, tuned on LibriSpeech", _LARGE, True),
    Variant("facebook/wav2vec2-large-xlsr-53", "apache-2.0", "large, 53 languages", _LARGE, True),
    Variant(
        "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim",
        "cc-by-nc-sa-4.0",
        "12 layers, tuned for emotion dimensions",
        _LARGE | {"num_hidden_layers": 12},
        True,
        labels=("arousal", "dominance", "valence"),
    ),
)


def find(model_id: str) -> Variant | None:
    """The catalogue entry of a hub id, or None."""
    return next((variant for variant in CATALOGUE if variant.id == model_id), None)
