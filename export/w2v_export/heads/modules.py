"""The modules of the heads, with the weight names of transformers.

All families of speech models in transformers have the same heads, so one module of each kind serves them all.
Dropout does nothing in inference and is left out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from w2v_models.errors import CheckpointError


class HeadModule(nn.Module):
    """Base of the heads: ``frames``, then pooling by the caller, who knows the valid frames, then ``vector``.

    Attributes:
        kind: the head's name in the manifest.
        labels: names of the output's columns, in order; of ``embeddings`` for x-vectors, else of ``logits``.
        level: whether there is one output per utterance or per frame.
        pooling: statistics over an utterance's valid head frames that ``vector`` takes, concatenated in this order;
            ``std1`` is the standard deviation with n - 1 in the denominator. Empty at frame level.
        margin: encoder frames lost on each side to convolutions without padding: n valid encoder frames give
            n - 2·margin valid head frames, the first of them centred on encoder frame ``margin``.
        sums_last: whether the last term of a weighted sum of hidden states is the ``last_hidden_state``, as in
            transformers 4, or the last layer before the norm that follows it, as in transformers 5.

    Args:
        labels: as above.
        summed: number of hidden states in the learned weighted sum that replaces the last hidden state; 0 for none.
    """

    kind: str
    labels: tuple[str, ...]
    level: Literal["utterance", "frame"] = "utterance"
    pooling: tuple[str, ...] = ("mean",)
    margin: int = 0
    sums_last: bool = True

    def __init__(self, labels: tuple[str, ...], summed: int = 0) -> None:
        super().__init__()
        self.labels = labels
        self.layer_weights = nn.Parameter(torch.zeros(summed)) if summed else None

    def frames(self, layers: list[Tensor], last: Tensor) -> Tensor:
        """The head's frames, which at frame level are the logits.

        Args:
            layers: hidden states 0 … L, (batch, time, hidden) each, before any norm that follows the last block.
            last: the reference's ``last_hidden_state``, (batch, time, hidden).

        Returns:
            (batch, max(0, time - 2·margin), channels).
        """
        raise NotImplementedError

    def vector(self, pooled: Tensor) -> dict[str, Tensor]:
        """Outputs of utterances, ``logits`` (batch, K), for x-vectors also ``embeddings``.

        Args:
            pooled: the statistics of the head's frames, (batch, len(pooling)·channels).
        """
        raise NotImplementedError

    def hidden_states(self, layers: list[Tensor], last: Tensor) -> Tensor:
        """The head's input: ``last``, or the sum of all hidden states with softmax weights."""
        if self.layer_weights is None:
            return last
        if self.sums_last:
            layers = [*layers[:-1], last]
        weights = F.softmax(self.layer_weights, dim=0).unbind()
        first, *others = [weight * layer for weight, layer in zip(weights, layers, strict=True)]
        return sum(others, first)


class RegressionHead(HeadModule):
    """audeering's ``RegressionHead``: dense, tanh and projection of the mean hidden state.

    Its weight names are those of the checkpoint without the prefix ``classifier.``.
    """

    kind = "regression"

    def __init__(self, hidden_size: int, labels: tuple[str, ...]) -> None:
        super().__init__(labels)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, len(labels))

    def frames(self, layers: list[Tensor], last: Tensor) -> Tensor:  # noqa: ARG002
        return last

    def vector(self, pooled: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out_proj(torch.tanh(self.dense(pooled)))}


class AgeGenderHead(HeadModule):
    """audeering's ``AgeGenderModel``: age in hundreds of years, then the probabilities of three genders."""

    kind = "age-gender"

    def __init__(self, hidden_size: int) -> None:
        super().__init__(("age", "female", "male", "child"))
        self.age = RegressionHead(hidden_size, self.labels[:1])
        self.gender = RegressionHead(hidden_size, self.labels[1:])

    def frames(self, layers: list[Tensor], last: Tensor) -> Tensor:  # noqa: ARG002
        return last

    def vector(self, pooled: Tensor) -> dict[str, Tensor]:
        age, gender = self.age.vector(pooled)["logits"], self.gender.vector(pooled)["logits"]
        return {"logits": torch.cat([age, F.softmax(gender, dim=-1)], dim=-1)}


class SequenceClassificationHead(HeadModule):
    """``ForSequenceClassification``: projection of each frame, mean, classifier."""

    kind = "sequence-classification"

    def __init__(self, hidden_size: int, channels: int, labels: tuple[str, ...], summed: int) -> None:
        super().__init__(labels, summed)
        self.projector = nn.Linear(hidden_size, channels)
        self.classifier = nn.Linear(channels, len(labels))

    def frames(self, layers: list[Tensor], last: Tensor) -> Tensor:
        frames: Tensor = self.projector(self.hidden_states(layers, last))
        return frames

    def vector(self, pooled: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classifier(pooled)}


class TDNNLayer(nn.Module):
    """Dilated convolution without padding, then ReLU: (batch, time, in) → (batch, time - (kernel-1)·dilation, out).

    As in the reference, the weight is a linear layer over the kernel's frames side by side. It is applied as such: one
    matrix product, without transposes.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(inputs * kernel, outputs)
        self.span, self.dilation = (kernel - 1) * dilation, dilation

    def forward(self, frames: Tensor) -> Tensor:
        shifts = range(0, self.span + 1, self.dilation)
        views = [frames[:, shift : shift - self.span or None] for shift in shifts]
        return F.relu(self.kernel(torch.cat(views, dim=-1)))


class XVectorHead(HeadModule):
    """``ForXVector``: projection, time-delay layers, mean and deviation over time, embedding, classifier.

    Args:
        hidden_size: the encoder's width.
        tdnn: (channels, kernel, dilation) of each time-delay layer.
        dimension: the size of the embedding and, as in transformers, of the logits.
        summed: as for :class:`HeadModule`.

    Raises:
        CheckpointError: the layers take an odd number of frames, so not the same number on both sides.
    """

    kind = "x-vector"
    pooling = ("mean", "std1")

    def __init__(self, hidden_size: int, tdnn: list[tuple[int, int, int]], dimension: int, summed: int) -> None:
        super().__init__(tuple(f"x{index}" for index in range(dimension)), summed)
        channels = [width for width, _, _ in tdnn]
        self.projector = nn.Linear(hidden_size, channels[0])
        self.tdnn = nn.Sequential(
            *(TDNNLayer(inputs, *layer) for inputs, layer in zip([channels[0], *channels[:-1]], tdnn, strict=True))
        )
        self.feature_extractor = nn.Linear(2 * channels[-1], dimension)
        self.classifier = nn.Linear(dimension, dimension)
        span = sum((kernel - 1) * dilation for _, kernel, dilation in tdnn)
        if span % 2:
            raise CheckpointError(
                f"The x-vector's layers take {span} frames, an odd number, so that its frames stand between those of "
                "the encoder; tdnn_kernel and tdnn_dilation in config.json must take an even number."
            )
        self.margin = span // 2

    def frames(self, layers: list[Tensor], last: Tensor) -> Tensor:
        frames: Tensor = self.tdnn(self.projector(self.hidden_states(layers, last)))
        return frames

    def vector(self, pooled: Tensor) -> dict[str, Tensor]:
        embeddings = self.feature_extractor(pooled)
        return {"logits": self.classifier(embeddings), "embeddings": embeddings}


class FrameClassificationHead(HeadModule):
    """``ForAudioFrameClassification``: logits of each frame, such as who speaks."""

    kind = "frame-classification"
    level = "frame"
    pooling = ()

    def __init__(self, hidden_size: int, labels: tuple[str, ...], summed: int) -> None:
        super().__init__(labels, summed)
        self.classifier = nn.Linear(hidden_size, len(labels))

    def frames(self, layers: list[Tensor], last: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.hidden_states(layers, last))
        return logits


class CTCHead(HeadModule):
    """``ForCTC``: logits of each frame over the tokens of a transcription."""

    kind = "ctc"
    level = "frame"
    pooling = ()

    def __init__(self, hidden_size: int, labels: tuple[str, ...]) -> None:
        super().__init__(labels)
        self.lm_head = nn.Linear(hidden_size, len(labels))

    def frames(self, layers: list[Tensor], last: Tensor) -> Tensor:  # noqa: ARG002
        logits: Tensor = self.lm_head(last)
        return logits
