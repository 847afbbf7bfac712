"""The fields of ``config.json`` and ``preprocessor_config.json`` that affect a model's outputs, by family.

Only these fields are passed to transformers. All others (of training, generation, transformers' bookkeeping, or other
models) are ignored, so that they can do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from w2v_export.validation import (
    MAX_LABELS,
    Field,
    Kind,
    choice,
    constant,
    flag,
    labels,
    number,
    optional,
    plain_path,
    several,
    text,
    whole,
)
from w2v_models.manifest import LOG_MEL_FRONT_END, WAVEFORM_FRONT_END, Adapter, ConvStack

Fields = dict[str, Field]

#: The field that names the file of the weights, if it is not one of the usual ones.
WEIGHTS: Final = "transformers_weights"

#: Window and hop of the log-mel front end in samples, which are fixed in ``SeamlessM4TFeatureExtractor``.
MEL_WINDOW: Final = 400
MEL_HOP: Final = 160
#: The longest receptive field of a frame in seconds: the length of the shortest parity case that is set in seconds.
LONGEST_FRAME: Final = 0.1
#: The most frames per second; known models have 50. The cost of attention grows with the square.
MOST_FRAMES: Final = 500

#: Activation functions that can be exported: all of the oldest supported release of transformers.
_ACTIVATION: Final = choice(
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "laplace"),
    *("leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish"),
    "tanh",
)
#: The largest known encoder has 128 layers of width 2048, inner width 8192.
_WIDTH: Final = whole(1, 1 << 14)
_INNER_WIDTH: Final = whole(1, 1 << 16)
_DEPTH: Final = whole(1, 1000)
_HEADS: Final = whole(1, 1024)
_OFF: Final = Field(flag(), False)


def _several(kind: Kind, *default: int) -> Field:
    return Field(several(kind, 32), list(default))


_ENCODER: Final[Fields] = {
    "hidden_size": Field(_WIDTH, 768),
    "num_hidden_layers": Field(_DEPTH, 12),
    "num_attention_heads": Field(_HEADS, 12),
    "intermediate_size": Field(_INNER_WIDTH, 3072),
    "hidden_act": Field(_ACTIVATION, "gelu"),
    "layer_norm_eps": Field(number(1e-20, 1), 1e-5),
}
_CONVOLUTIONS: Final[Fields] = {
    "conv_dim": _several(_WIDTH, 512, 512, 512, 512, 512, 512, 512),
    "conv_kernel": _several(whole(1, 1000), 10, 3, 3, 3, 3, 2, 2),
    "conv_stride": _several(whole(1, 1000), 5, 2, 2, 2, 2, 2, 2),
    "conv_bias": _OFF,
    "feat_extract_activation": Field(_ACTIVATION, "gelu"),
    "num_conv_pos_embeddings": Field(whole(1, 4096), 128),
    "num_conv_pos_embedding_groups": Field(whole(1, 1024), 16),
}
_NORM: Final[Fields] = {"feat_extract_norm": Field(choice("group", "layer"), "group")}
_STABLE: Final[Fields] = {"do_stable_layer_norm": _OFF}
_LANGUAGES: Final[Fields] = {"adapter_attn_dim": Field(optional(_WIDTH), None)}
_BUCKETS: Final[Fields] = {
    "num_buckets": Field(whole(4, 1 << 14), 320),
    "max_bucket_distance": Field(whole(2, 1 << 16), 800),
}
_LARGE: Final[Fields] = _ENCODER | {
    "hidden_size": Field(_WIDTH, 1024),
    "num_hidden_layers": Field(_DEPTH, 24),
    "num_attention_heads": Field(_HEADS, 16),
    "intermediate_size": Field(_INNER_WIDTH, 4096),
    "hidden_act": Field(_ACTIVATION, "swish"),
}


def _positions(default: str, *others: str) -> Fields:
    return {
        "position_embeddings_type": Field(optional(choice(default, *others)), default),
        "rotary_embedding_base": Field(number(1, 1e9), 10000),
        "conv_depthwise_kernel_size": Field(whole(1, 1001), 31),
    }


_VOCABULARY: Final = whole(1, 1 << 20)
#: The head's kind, its sizes and the names of its columns; and the file of the weights.
_HEAD: Final[Fields] = {
    "architectures": Field(optional(several(text(), 32, least=0)), None),
    "id2label": Field(optional(labels()), None),
    "num_labels": Field(whole(1, MAX_LABELS), 2),
    "vocab_size": Field(optional(_VOCABULARY), 32),
    "use_weighted_layer_sum": _OFF,
    "classifier_proj_size": Field(_WIDTH, 256),
    "pooling_mode": Field(text(), "mean"),
    WEIGHTS: Field(optional(plain_path(".safetensors", ".safetensors.index.json")), None),
}
_NO_VOCABULARY: Final[Fields] = {"vocab_size": Field(optional(_VOCABULARY), None)}
_SPEAKER_HEAD: Final[Fields] = {
    "tdnn_dim": _several(_WIDTH, 512, 512, 512, 512, 1500),
    "tdnn_kernel": _several(whole(1, 1000), 5, 3, 3, 1, 1),
    "tdnn_dilation": _several(whole(1, 1000), 1, 2, 3, 1, 1),
    "xvector_output_dim": Field(_WIDTH, 512),
}
#: Fields that a config must not set, and why.
REFUSED: Final = {
    "add_adapter": "transformers has no convolutions after the encoder in this family",
    "quantization_config": (
        "quantised weights are not read; save them in float32: model.dequantize().save_pretrained(folder)"
    ),
    "pruned_heads": "attention without some of its heads is not exported",
}

#: Convolutions after the encoder.
_ADAPTER: Final[Fields] = {
    "add_adapter": _OFF,
    "adapter_kernel_size": Field(whole(1, 99), 3),
    "adapter_stride": Field(whole(1, 64), 2),
    "num_adapter_layers": Field(whole(1, 8), 3),
    "output_hidden_size": Field(optional(_WIDTH), None),
}
_BERT_ADAPTER: Final[Fields] = _ADAPTER | {
    "num_adapter_layers": Field(whole(1, 8), 1),
    "adapter_act": Field(_ACTIVATION, "relu"),
    "use_intermediate_ffn_before_adapter": _OFF,
}

_EXTRACTOR: Final[Fields] = {
    "sampling_rate": Field(whole(1_000, 192_000), 16000),
    "padding_side": Field(constant("right"), "right"),
    "padding_value": Field(number(-1e6, 1e6), 0.0),
}
_WAVEFORM_EXTRACTOR: Final[Fields] = _EXTRACTOR | {
    "feature_extractor_type": Field(constant("Wav2Vec2FeatureExtractor"), "Wav2Vec2FeatureExtractor"),
    "feature_size": Field(constant(1), 1),
    "do_normalize": Field(flag(), True),
    "return_attention_mask": Field(flag(), False),
}
_LOG_MEL_EXTRACTOR: Final[Fields] = _EXTRACTOR | {
    "feature_extractor_type": Field(constant("SeamlessM4TFeatureExtractor"), "SeamlessM4TFeatureExtractor"),
    "feature_size": Field(whole(2, 1024), 80),
    "num_mel_bins": Field(whole(2, 1024), 80),
    "stride": Field(constant(2), 2),
    "return_attention_mask": Field(constant(True), True),
}

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """The known fields of one family's config and feature extractor, and its kind of front end."""

    config: Fields
    extractor: Fields = field(default_factory=lambda: _WAVEFORM_EXTRACTOR)
    front_end: str = WAVEFORM_FRONT_END

    def conv(self, config: Values, extractor: Values) -> ConvStack:
        """The stack of strided convolutions (or mel windows) between samples and frames."""
        if self.front_end == LOG_MEL_FRONT_END:
            bands, stacked = extractor["num_mel_bins"], extractor["stride"]
            return ConvStack((MEL_WINDOW, stacked), (MEL_HOP, stacked), (bands, bands * stacked))
        return ConvStack(tuple(config["conv_kernel"]), tuple(config["conv_stride"]), tuple(config["conv_dim"]))


_TRANSFORMER: Final = _ENCODER | _CONVOLUTIONS | _NORM | _STABLE | _HEAD
_DATA2VEC: Final = _ENCODER | _CONVOLUTIONS | _HEAD | _SPEAKER_HEAD | _ADAPTER
_DATA2VEC_POSITIONS: Final[Fields] = {
    "num_conv_pos_embeddings": Field(whole(1, 64), 5),
    "conv_pos_kernel_size": Field(whole(1, 4096), 19),
}
_CONFORMER: Final = _ENCODER | _CONVOLUTIONS | _NORM | _HEAD | _SPEAKER_HEAD | _NO_VOCABULARY | _ADAPTER
_HUBERT: Final[Fields] = {"feat_proj_layer_norm": Field(flag(), True), "conv_pos_batch_norm": _OFF}
_BERT: Final[Fields] = {
    "classifier_proj_size": Field(_WIDTH, 768),
    "feature_projection_input_dim": Field(_WIDTH, 160),
    "left_max_position_embeddings": Field(whole(0, 1 << 16), 64),
    "right_max_position_embeddings": Field(whole(0, 1 << 16), 8),
}

#: By ``model_type``.
LAYOUTS: Final[Mapping[str, Layout]] = {
    "wav2vec2": Layout(_TRANSFORMER | _LANGUAGES | _SPEAKER_HEAD | _ADAPTER),
    "hubert": Layout(_TRANSFORMER | _LANGUAGES | _HUBERT | _SPEAKER_HEAD),
    "unispeech": Layout(_TRANSFORMER | _LANGUAGES | _SPEAKER_HEAD),
    "unispeech-sat": Layout(_TRANSFORMER | _LANGUAGES | _SPEAKER_HEAD),
    "wavlm": Layout(_TRANSFORMER | _BUCKETS | _SPEAKER_HEAD | _ADAPTER),
    "data2vec-audio": Layout(_DATA2VEC | _DATA2VEC_POSITIONS),
    "wav2vec2-conformer": Layout(_CONFORMER | _positions("relative", "rotary")),
    "wav2vec2-bert": Layout(
        _LARGE
        | _HEAD
        | _SPEAKER_HEAD
        | _NO_VOCABULARY
        | _BERT
        | _BERT_ADAPTER
        | _positions("relative_key", "relative", "rotary"),
        _LOG_MEL_EXTRACTOR,
        LOG_MEL_FRONT_END,
    ),
}


def config_problems(config: Values) -> Iterator[str]:
    """Contradictions between fields of ``config.json`` that are valid one by one, as text."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        yield f"num_attention_heads must divide hidden_size, but {heads} does not divide {hidden}"
    if "conv_dim" in config:
        yield from _unequal(config, "conv_dim", "conv_kernel", "conv_stride")
        if config.get("feat_extract_norm") == "group" and max(config["conv_kernel"][1:], default=1) == 1:
            yield "conv_kernel must be above 1 behind the first level where feat_extract_norm is group"
        if hidden % (groups := config["num_conv_pos_embedding_groups"]):
            yield f"num_conv_pos_embedding_groups must divide hidden_size, but {groups} does not divide {hidden}"
    if config.get("add_adapter"):
        # So that the output is a frame for every adapter_stride frames of the input, as transformers counts it.
        centred = 2 * (config["adapter_stride"] // 2) + 1 if "adapter_act" in config else 3
        if config["adapter_kernel_size"] != centred:
            yield f"adapter_kernel_size must be {centred} for an adapter_stride of {config['adapter_stride']}"
    elif config.get("use_intermediate_ffn_before_adapter"):
        yield "use_intermediate_ffn_before_adapter needs add_adapter"
    if "tdnn_dim" in config:
        yield from _unequal(config, "tdnn_dim", "tdnn_kernel", "tdnn_dilation")
    if "num_buckets" in config and config["max_bucket_distance"] <= config["num_buckets"] // 4:
        yield "max_bucket_distance must be larger than a quarter of num_buckets"
    if "position_embeddings_type" in config:
        if config["conv_depthwise_kernel_size"] % 2 == 0:
            yield "conv_depthwise_kernel_size must be odd"
        if config["position_embeddings_type"] == "relative" and hidden % 2:
            yield "hidden_size must be even where position_embeddings_type is relative"
        if config["position_embeddings_type"] == "rotary" and hidden // heads % 2:
            yield "hidden_size must be an even multiple of num_attention_heads where position_embeddings_type is rotary"


def _unequal(config: Values, *names: str) -> Iterator[str]:
    if len({len(config[name]) for name in names}) > 1:
        lengths = ", ".join(f"{name} has {len(config[name])}" for name in names)
        yield f"{', '.join(names)} must have the same number of entries, but {lengths}"


def frame_problems(layout: Layout, config: Values, extractor: Values) -> Iterator[str]:
    """Contradictions between config and feature extractor, and frames that are too long or too many, as text."""
    rate, conv = extractor["sampling_rate"], layout.conv(config, extractor)
    at = f"at the feature extractor's sampling_rate of {rate} Hz"
    if layout.front_end == LOG_MEL_FRONT_END:
        names = "the log-mel front end makes"
        if config["feature_projection_input_dim"] != conv.channels[-1]:
            yield (
                "feature_projection_input_dim must be num_mel_bins times stride of the feature extractor, "
                f"{conv.channels[-1]}, not {config['feature_projection_input_dim']}"
            )
    else:
        names = "conv_kernel and conv_stride make"
    if conv.receptive_field > LONGEST_FRAME * rate:
        yield f"{names} frames of {conv.receptive_field} samples, more than {LONGEST_FRAME} s {at}"
    if rate > MOST_FRAMES * conv.stride:
        yield f"{names} a frame every {conv.stride} samples, more than {MOST_FRAMES} a second {at}"


def adapter(config: Values) -> Adapter | None:
    """The adapter after the encoder as the manifest holds it; None if the config has none."""
    if not config.get("add_adapter"):
        return None
    size = config["output_hidden_size"] or config["hidden_size"]
    return Adapter(config["adapter_stride"] ** config["num_adapter_layers"], size)


def least_weights(config: Values) -> int:
    """A lower bound on the count of a model's parameters: attention, feed-forward and convolutions."""
    hidden: int = config["hidden_size"]
    blocks: int = config["num_hidden_layers"] * hidden * (4 * hidden + 2 * config["intermediate_size"])
    dims: list[int] = config.get("conv_dim", [])
    kernels: list[int] = config.get("conv_kernel", [])
    return blocks + sum(kernel * a * b for kernel, a, b in zip(kernels, [1, *dims], dims, strict=False))
