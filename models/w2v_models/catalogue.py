"""The variants that are known by name: hub id, licence and architecture.

A real checkpoint's own files always decide; this serves ``w2v-models list`` and ``--random-weights``, which needs the
architecture without the network.

Where a fact was read stands beside it, by these names; "not confirmed" marks what no public file was found to say:

- torchaudio: pytorch/audio, ``test/torchaudio_unittest/assets/wav2vec2/huggingface/``, copies of ``config.json``
- pipelines: pytorch/audio, ``src/torchaudio/pipelines/_wav2vec2/impl.py``, sizes and ``_normalize_waveform``
- convert: huggingface/transformers, ``src/transformers/models/FAMILY/convert_*.py``, which made the checkpoints' files
- fairseq: facebookresearch/fairseq, ``examples/``, the configs of the training
- card: the README of the checkpoint on the hub
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

#: The strided convolutions of all variants except Wav2Vec2-BERT, as fields of transformers' configs.
_CONV: Final[dict[str, Any]] = {
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
}
_POSITION: Final = {"num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16}
_LAYERED_POSITION: Final = {
    "num_conv_pos_embeddings": 5,
    "conv_pos_kernel_size": 19,
    "num_conv_pos_embedding_groups": 16,
}
_BASE_SIZE: Final = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_LARGE_SIZE: Final = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_1B_SIZE: Final = _LARGE_SIZE | {"num_hidden_layers": 48, "hidden_size": 1280, "intermediate_size": 5120}
_2B_SIZE: Final = _LARGE_SIZE | {"num_hidden_layers": 48, "hidden_size": 1920, "intermediate_size": 7680}
_GROUP_NORM: Final = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
_LAYER_NORM: Final = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}

_BASE: Final = _CONV | _POSITION | _BASE_SIZE | _GROUP_NORM
_LARGE: Final = _CONV | _POSITION | _LARGE_SIZE | _LAYER_NORM
_WAVLM: Final = {"num_buckets": 320, "max_bucket_distance": 800}
_CONFORMER: Final = _LARGE | {"hidden_act": "swish", "conv_depthwise_kernel_size": 31}
_BERT: Final = _LARGE_SIZE | {
    "hidden_act": "swish",
    "feature_projection_input_dim": 160,
    "position_embeddings_type": "relative_key",
    "left_max_position_embeddings": 64,
    "right_max_position_embeddings": 8,
    "conv_depthwise_kernel_size": 31,
    "layer_norm_eps": 1e-5,
}

#: Options of the feature extractors. What convert of hubert and wav2vec2-conformer writes beside models that are tuned
#: for CTC: all normalise, those with layer norms throughout take a mask, those with a group norm none. For others it is
#: taken over, and marked where nothing else says so.
_UNMASKED: Final = {"do_normalize": True, "return_attention_mask": False}
_MASKED: Final = {"do_normalize": True, "return_attention_mask": True}
_RAW: Final = {"do_normalize": False, "return_attention_mask": True}

#: The cards name no licence, but point to the LICENSE of microsoft/UniSpeech (copy of a card: fishaudio/Bert-VITS2,
#: ``slm/wavlm-base-plus/README.md``), whose text is not confirmed. Pipelines say MIT of WavLM, after microsoft/unilm.
_MICROSOFT: Final = "cc-by-sa-3.0"


@dataclass(frozen=True)
class Variant:
    """A catalogue entry; ``--random-weights`` builds the model from its ``config``, ``extractor`` and ``labels``.

    ``labels`` are those of a regression head.
    """

    id: str
    licence: str
    description: str
    model_type: str
    config: dict[str, Any]
    extractor: dict[str, Any]
    labels: tuple[str, ...] = ()


def _wav2vec2(model_id: str, description: str, config: dict[str, Any], licence: str = "apache-2.0") -> Variant:
    extractor = _UNMASKED if config["feat_extract_norm"] == "group" else _MASKED
    return Variant(model_id, licence, description, "wav2vec2", config, extractor)


#: Licences without a source at their entries are taken to be those of the cards, not confirmed.
CATALOGUE: Final[tuple[Variant, ...]] = (
    # Configs: torchaudio. Licence: card of wav2vec2-base. Mask of base-960h: a test of transformers,
    # tests/models/wav2vec2/test_feature_extraction_wav2vec2.py (masked if the norm is "layer").
    # That of wav2vec2-base, and do_normalize of both: not confirmed.
    _wav2vec2("facebook/wav2vec2-base-960h", "base, 960 h of LibriSpeech", _BASE),
    _wav2vec2("facebook/wav2vec2-base", "base, 960 h of LibriSpeech, not tuned", _BASE),
    # Not confirmed, taken to be as wav2vec2-large-lv60 (torchaudio), but for the extractor of ft-swbd-300h:
    # https://github.com/huggingface/transformers/issues/13504
    _wav2vec2("facebook/wav2vec2-large-robust", "large, robust pre-training", _LARGE),
    _wav2vec2("facebook/wav2vec2-large-robust-ft-swbd-300h", "large, tuned on Switchboard", _LARGE),
    _wav2vec2("facebook/wav2vec2-large-robust-ft-libri-960h", "large, tuned on LibriSpeech", _LARGE),
    # Config: torchaudio. Extractor: printed in https://github.com/dhchoi99/NANSY/issues/16
    _wav2vec2("facebook/wav2vec2-large-xlsr-53", "large, 53 languages", _LARGE),
    # Licence: audeering/w2v2-how-to, README.md. Layers: its name. The rest as of large-robust, not confirmed.
    Variant(
        "audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim",
        "cc-by-nc-sa-4.0",
        "12 layers, tuned for emotion dimensions",
        "wav2vec2",
        _LARGE | {"num_hidden_layers": 12},
        _MASKED,
        labels=("arousal", "dominance", "valence"),
    ),
    # Configs: torchaudio, all three with 16 heads. do_normalize: pipelines. Mask: not confirmed.
    _wav2vec2("facebook/wav2vec2-xls-r-300m", "large, 128 languages", _LARGE),
    _wav2vec2("facebook/wav2vec2-xls-r-1b", "1 billion parameters, 128 languages", _LARGE | _1B_SIZE),
    _wav2vec2("facebook/wav2vec2-xls-r-2b", "2 billion parameters, 128 languages", _LARGE | _2B_SIZE),
    # Licence: pipelines (MMS_FA), with the sizes and do_normalize of the 300m too. Those of the 1b are XLS-R's, not
    # confirmed; nor is the width of mms-1b-all's adapters: 16 fits the 2.5 million weights a language, the head among
    # them, of huggingface/blog, mms_adapters.md.
    _wav2vec2("facebook/mms-300m", "large, 1400 languages", _LARGE, "cc-by-nc-4.0"),
    _wav2vec2("facebook/mms-1b", "1 billion parameters, 1400 languages", _LARGE | _1B_SIZE, "cc-by-nc-4.0"),
    _wav2vec2(
        "facebook/mms-1b-all",
        "mms-1b tuned with a language's adapters",
        _LARGE | _1B_SIZE | {"adapter_attn_dim": 16},
        "cc-by-nc-4.0",
    ),
    # Sizes and norms: pipelines; those and do_normalize of the large: fairseq, hubert_large_librivox.yaml. The base was
    # trained without normalising (pipelines); that its extractor normalises is not confirmed. The large was trained
    # without conv_bias, but a copy of the config of hubert-large-ls960-ft has it; that of ll60k is not confirmed.
    Variant("facebook/hubert-base-ls960", "apache-2.0", "HuBERT base", "hubert", _BASE, _UNMASKED),
    Variant("facebook/hubert-large-ll60k", "apache-2.0", "HuBERT large", "hubert", _LARGE, _MASKED),
    # Config and extractor: convert_distilhubert_original_s3prl_checkpoint_to_pytorch.py.
    Variant(
        "ntu-spml/distilhubert",
        "apache-2.0",
        "HuBERT base distilled to 2 layers",
        "hubert",
        _BASE | {"num_hidden_layers": 2, "feat_proj_layer_norm": False},
        {"do_normalize": False, "return_attention_mask": False},
    ),
    # Config and extractor of base-plus: copies in fishaudio/Bert-VITS2, slm/wavlm-base-plus/. Configs of base and
    # large: torchaudio. Their mask: not confirmed. do_normalize of all three: pipelines, and an author's word in
    # https://github.com/microsoft/unilm/issues/708
    Variant("microsoft/wavlm-base-plus", _MICROSOFT, "WavLM base, 94 000 h", "wavlm", _BASE | _WAVLM, _RAW),
    Variant("microsoft/wavlm-base", _MICROSOFT, "WavLM base, 960 h of LibriSpeech", "wavlm", _BASE | _WAVLM, _RAW),
    Variant(
        "microsoft/wavlm-large", _MICROSOFT, "WavLM large", "wavlm", _LARGE | _WAVLM | {"conv_bias": False}, _MASKED
    ),
    # Not confirmed: no copy of the configs or extractors was found. The tests of transformers, in tests/models/, give
    # both large ones the extractor of wav2vec2-large-xlsr-53, and unispeech-sat-base-plus that of wav2vec2-base.
    Variant("microsoft/unispeech-large-1500h-cv", _MICROSOFT, "UniSpeech large", "unispeech", _LARGE, _MASKED),
    Variant("microsoft/unispeech-sat-base", _MICROSOFT, "UniSpeech-SAT base", "unispeech-sat", _BASE, _UNMASKED),
    Variant("microsoft/unispeech-sat-large", _MICROSOFT, "UniSpeech-SAT large", "unispeech-sat", _LARGE, _MASKED),
    # Base: the defaults of convert, which saves the extractor of wav2vec2-large-lv60, and fairseq,
    # data2vec/config/audio/pretraining/base_librispeech.yaml (normalize, pos_conv_depth 5, conv_pos 95 = 5 x 19).
    # Large: not confirmed. Licence: card of the large.
    Variant(
        "facebook/data2vec-audio-base",
        "apache-2.0",
        "data2vec base",
        "data2vec-audio",
        _CONV | _LAYERED_POSITION | _BASE_SIZE | {"conv_bias": False},
        _MASKED,
    ),
    Variant(
        "facebook/data2vec-audio-large",
        "apache-2.0",
        "data2vec large",
        "data2vec-audio",
        _CONV | _LAYERED_POSITION | _LARGE_SIZE | {"conv_bias": False},
        _MASKED,
    ),
    # swish and extractor: convert. Sizes, conv_bias and norms of rel-pos: the weights' shapes of a tuned one in
    # shanjiang7/GraphNet, samples/transformers-auto-model/juliensimon_wav2vec2-conformer-rel-pos-large-finetuned-
    # speech-commands/; of rope: copies of its config in projects on minzwon/musicfm. Licence: the card of rel-pos.
    Variant(
        "facebook/wav2vec2-conformer-rel-pos-large",
        "apache-2.0",
        "conformer, relative positions",
        "wav2vec2-conformer",
        _CONFORMER | {"position_embeddings_type": "relative"},
        _MASKED,
    ),
    Variant(
        "facebook/wav2vec2-conformer-rope-large-960h-ft",
        "apache-2.0",
        "conformer, rotary positions",
        "wav2vec2-conformer",
        _CONFORMER | {"position_embeddings_type": "rotary"},
        _MASKED,
    ),
    # convert_wav2vec2_seamless_checkpoint.py: the defaults of Wav2Vec2BertConfig, without an adapter, and padding of 1.
    Variant(
        "facebook/w2v-bert-2.0",
        "mit",
        "Wav2Vec2-BERT, 143 languages, from log-mel",
        "wav2vec2-bert",
        _BERT,
        {"padding_value": 1.0},
    ),
)


def find(model_id: str) -> Variant | None:
    """The catalogue entry of a hub id, or None."""
    return next((variant for variant in CATALOGUE if variant.id == model_id), None)
