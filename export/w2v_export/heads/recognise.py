"""Recognise a checkpoint's head by the names of its weights, and build its module with the config's labels.

To add a head, write its module in ``heads.modules``, add its weight names to ``_KNOWN``, and build it in ``_module``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from torch import Tensor
from transformers import PretrainedConfig

from w2v_export.heads.modules import (
    AgeGenderHead,
    CTCHead,
    FrameClassificationHead,
    HeadModule,
    RegressionHead,
    SequenceClassificationHead,
    XVectorHead,
)
from w2v_models.errors import CheckpointError

__all__ = ["HeadModule", "build_head"]

#: Weights of ``ForPreTraining`` models and of the time mask, by the first part of the name; they are no head.
PRETRAINING_WEIGHTS: Final = frozenset(
    {
        "quantizer",
        "project_hid",
        "project_q",
        "ctc_proj",
        "speaker_proj",
        "label_embeddings_concat",
        "layer_norm_for_extract",
        "masked_spec_embed",
    }
)
LAYER_WEIGHTS: Final = "layer_weights"
#: The speakers' centres in the x-vector's training loss (``AMSoftmaxLoss``).
OBJECTIVE: Final = "objective.weight"
#: The limit on a head's outputs, above the largest vocabulary of a speech recogniser.
MOST_OUTPUTS: Final = 1 << 18
FRAME_CLASSIFICATION: Final = "ForAudioFrameClassification"


def _linear(*names: str) -> frozenset[str]:
    return frozenset(f"{name}.{part}" for name in names for part in ("weight", "bias"))


#: Heads by the names of their weights, without optional ones; every ``tdnn.N`` counts as ``tdnn.0``.
_KNOWN: Final[dict[frozenset[str], type[HeadModule]]] = {
    _linear("classifier.dense", "classifier.out_proj"): RegressionHead,
    _linear("age.dense", "age.out_proj", "gender.dense", "gender.out_proj"): AgeGenderHead,
    _linear("projector", "classifier"): SequenceClassificationHead,
    _linear("projector", "tdnn.0.kernel", "feature_extractor", "classifier"): XVectorHead,
    _linear("classifier"): FrameClassificationHead,
    _linear("lm_head"): CTCHead,
}


def build_head(
    weights: Mapping[str, Tensor], config: PretrainedConfig, vocabulary: tuple[str, ...] | None
) -> HeadModule | None:
    """Build a checkpoint's head from the weights that are not the encoder's, in evaluation mode; None without a head.

    Args:
        weights: all of the checkpoint's weights that are not the encoder's, by name.
        config: the checkpoint's ``PretrainedConfig``.
        vocabulary: tokens in the order of their ids, or None if the checkpoint has no ``vocab.json``.

    Raises:
        CheckpointError: the weights belong to no known head, are incomplete, or do not fit the config or its labels.
    """
    weights = {name: value for name, value in weights.items() if name.partition(".")[0] not in PRETRAINING_WEIGHTS}
    weights.pop(OBJECTIVE, None)
    if not config.use_weighted_layer_sum:
        weights.pop(LAYER_WEIGHTS, None)  # the reference ignores them too
    if not weights:
        return None
    names = frozenset(re.sub(r"^tdnn\.\d+\.", "tdnn.0.", name) for name in weights if name != LAYER_WEIGHTS)
    if names not in _KNOWN:
        known = "; ".join(f"{head.kind} ({', '.join(sorted(parts))})" for parts, head in _KNOWN.items())
        raise CheckpointError(
            f"The checkpoint holds weights of no known head: {', '.join(sorted(weights))}. Known heads are: {known}. "
            "--no-head exports the encoder alone."
        )
    module = _module(_KNOWN[names], weights, config, vocabulary)
    _load(module, weights, "classifier." if isinstance(module, RegressionHead) else "")
    return module.eval()


def _module(
    head: type[HeadModule], weights: Mapping[str, Tensor], config: PretrainedConfig, vocabulary: tuple[str, ...] | None
) -> HeadModule:
    """The head's module with the checkpoint's sizes, before its weights are loaded."""
    hidden_size = config.hidden_size
    if getattr(config, "add_adapter", False):
        _require_ctc(head)
        hidden_size = config.output_hidden_size
    summed = config.num_hidden_layers + 1 if config.use_weighted_layer_sum else 0
    if head is RegressionHead:
        _require_mean(config)
        return RegressionHead(hidden_size, _labels(config, _outputs(weights, "classifier.out_proj")))
    if head is AgeGenderHead:
        return AgeGenderHead(hidden_size)
    if head is CTCHead:
        return CTCHead(hidden_size, _tokens(config, vocabulary, _outputs(weights, "lm_head")))
    if head is XVectorHead:
        return XVectorHead(hidden_size, _tdnn(config), _outputs(weights, "feature_extractor"), summed)
    labels = _labels(config, _outputs(weights, "classifier"))
    if head is SequenceClassificationHead:
        return SequenceClassificationHead(hidden_size, _outputs(weights, "projector"), labels, summed)
    _require_frame_classification(config)
    return FrameClassificationHead(hidden_size, labels, summed)


def _load(module: HeadModule, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Load a head's weights into its module; ``prefix`` is removed from their names.

    Raises:
        CheckpointError: weights are missing, unexpected or of the wrong shape.
    """
    own = {prefix + name: value for name, value in module.state_dict().items()}
    problems = {
        "missing": own.keys() - weights.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of the wrong shape": {
            f"{name} {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        },
    }
    found = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(
            f"The checkpoint does not hold the {module.kind} head that its config.json describes; {'; '.join(found)}."
        )
    module.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})


def _outputs(weights: Mapping[str, Tensor], layer: str) -> int:
    """The number of outputs of a linear layer, by the shape of its weight."""
    shape = tuple(weights[f"{layer}.weight"].shape)
    if len(shape) != 2 or not 1 <= shape[0] <= MOST_OUTPUTS:
        raise CheckpointError(
            f"{layer}.weight is of the wrong shape, {shape}, for a layer of 1 to {MOST_OUTPUTS} outputs."
        )
    return shape[0]


def _labels(config: PretrainedConfig, outputs: int) -> tuple[str, ...]:
    """Names of ``id2label`` in the order of their ids."""
    labels = tuple(str(config.id2label[index]) for index in sorted(config.id2label or ()))
    if len(labels) != outputs:
        named = f"{len(labels)} labels ({', '.join(labels)})" if labels else "no labels"
        raise CheckpointError(
            f"The head has {outputs} outputs but config.json names {named}; give id2label one name for each output."
        )
    return labels


def _tokens(config: PretrainedConfig, vocabulary: tuple[str, ...] | None, outputs: int) -> tuple[str, ...]:
    """Names of CTC outputs: the vocabulary if it has one token per output, else the config's labels, else numbers."""
    if vocabulary is not None and len(vocabulary) == outputs:
        return vocabulary
    if len(config.id2label or ()) == outputs:
        return _labels(config, outputs)
    return tuple(f"token_{index}" for index in range(outputs))


def _tdnn(config: PretrainedConfig) -> list[tuple[int, int, int]]:
    """(channels, kernel, dilation) of each time-delay layer."""
    options = [getattr(config, name, ()) for name in ("tdnn_dim", "tdnn_kernel", "tdnn_dilation")]
    if not options[0] or len({len(option) for option in options}) > 1:
        raise CheckpointError(
            "config.json must give tdnn_dim, tdnn_kernel and tdnn_dilation one number for each layer of the x-vector."
        )
    return list(zip(*options, strict=True))


def _require_ctc(head: type[HeadModule]) -> None:
    """Refuse other heads behind an adapter, which transformers refuses too."""
    if head is not CTCHead:
        raise CheckpointError(
            f"config.json sets add_adapter, and behind an adapter only a {CTCHead.kind} head is known, not "
            f"{head.kind}; --no-head exports the encoder and its adapter alone."
        )


def _require_mean(config: PretrainedConfig) -> None:
    """Refuse heads with the weights of the regression head whose config sets another pooling than the mean."""
    if (mode := getattr(config, "pooling_mode", "mean")) != "mean":
        raise CheckpointError(f"config.json sets pooling_mode to {mode!r}; the known regression head takes the mean.")


def _require_frame_classification(config: PretrainedConfig) -> None:
    """Refuse a single classifier layer, unless the config names a frame classification model: its input is unknown."""
    architectures = config.architectures or []
    if not any(name.endswith(FRAME_CLASSIFICATION) for name in architectures):
        raise CheckpointError(
            f"The weights classifier.weight and classifier.bias are known in …{FRAME_CLASSIFICATION} alone, but "
            f"config.json names as architectures: {', '.join(architectures) or 'none'}. Name it there if it is one; "
            "--no-head exports the encoder alone."
        )
