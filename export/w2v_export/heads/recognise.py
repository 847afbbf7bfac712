"""Heads that checkpoints carry beside the encoder: recognised by their weights, rebuilt, and named by the config."""

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

#: What the ``ForPreTraining`` models and the time mask add beside the encoder, by the first part of the name.
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
#: More than the largest vocabulary of a speech recogniser.
MOST_OUTPUTS: Final = 1 << 18
FRAME_CLASSIFICATION: Final = "ForAudioFrameClassification"


def _linear(*names: str) -> frozenset[str]:
    return frozenset(f"{name}.{part}" for name in names for part in ("weight", "bias"))


#: The weights by which a head is known, without those that may be absent; every ``tdnn.N`` counts as ``tdnn.0``.
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
    """The head that a checkpoint's weights beside the encoder make up, in evaluation mode; None where there is none.

    Args:
        weights: all of the checkpoint's weights that are not the encoder's, by name.
        config: the checkpoint's ``PretrainedConfig``.
        vocabulary: tokens in the order of their ids, where the checkpoint has a ``vocab.json``.

    Raises:
        CheckpointError: the weights are of no known head, incomplete, or do not fit the config or its labels.
    """
    weights = {name: value for name, value in weights.items() if name.partition(".")[0] not in PRETRAINING_WEIGHTS}
    weights.pop(OBJECTIVE, None)
    if not config.use_weighted_layer_sum:
        weights.pop(LAYER_WEIGHTS, None)  # the reference leaves them aside too
    if not weights:
        return None
    names = frozenset(re.sub(r"^tdnn\.\d+\.", "tdnn.0.", name) for name in weights if name != LAYER_WEIGHTS)
    if names not in _KNOWN:
        known = "; ".join(f"{head.kind} ({', '.join(sorted(parts))})" for parts, head in _KNOWN.items())
        raise CheckpointError(
            f"The checkpoint holds weights of no known head: {', '.join(sorted(weights))}. Known heads are: {known}. "
            "To export the encoder alone, save it with: model.base_model.save_pretrained(folder)"
        )
    module = _module(_KNOWN[names], weights, config, vocabulary)
    _load(module, weights, "classifier." if isinstance(module, RegressionHead) else "")
    return module.eval()


def _module(
    head: type[HeadModule], weights: Mapping[str, Tensor], config: PretrainedConfig, vocabulary: tuple[str, ...] | None
) -> HeadModule:
    """The head's module in its sizes, yet without its weights."""
    hidden_size = config.hidden_size
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
    """Load a head's weights, whose names have a prefix that the module's have not."""
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
    """Outputs of a linear layer, by its weight."""
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
    """The vocabulary where it has a token for each output, else the config's labels, else numbers."""
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


def _require_mean(config: PretrainedConfig) -> None:
    """Refuse relatives of the regression head that have its weights but pool otherwise, as their config says."""
    if (mode := getattr(config, "pooling_mode", "mean")) != "mean":
        raise CheckpointError(f"config.json sets pooling_mode to {mode!r}; the known regression head takes the mean.")


def _require_frame_classification(config: PretrainedConfig) -> None:
    """A lone classifier may stand on anything, so its architecture has to say on what."""
    architectures = config.architectures or []
    if not any(name.endswith(FRAME_CLASSIFICATION) for name in architectures):
        raise CheckpointError(
            f"The weights classifier.weight and classifier.bias are known in …{FRAME_CLASSIFICATION} alone, but "
            f"config.json names as architectures: {', '.join(architectures) or 'none'}."
        )
