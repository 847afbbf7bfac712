"""Reference models that transformers lacks, for transformers to load: those of model cards, and its heads elsewhere.

They are written as in the cards, or as transformers has the head around other encoders, and share neither code nor
weight loading with the graph's heads (``heads``), so that the parity test compares two independent implementations.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import TDNNLayer


class CardHead(nn.Module):
    """audeering's ``RegressionHead`` and ``ModelHead``, without their dropout."""

    def __init__(self, config: Any, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, outputs)

    def forward(self, features: Tensor) -> Tensor:
        answer: Tensor = self.out_proj(torch.tanh(self.dense(features)))
        return answer


class CardModel:
    """Base of the models: an encoder, and a head on its hidden states; mixed into a family's ``PreTrainedModel``."""

    def add_heads(self, config: Any) -> None:
        """Add the head's modules."""
        raise NotImplementedError

    def answer(self, states: list[Tensor], last: Tensor) -> Tensor:
        """The head's columns of one utterance, (1, K) or (1, time, K), from transformers' ``hidden_states`` 0 … L.

        Each is (1, time, hidden), as is ``last``, the ``last_hidden_state``.
        """
        raise NotImplementedError


class EmotionModel(CardModel):
    """https://huggingface.co/audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim."""

    classifier: CardHead

    def add_heads(self, config: Any) -> None:
        self.classifier = CardHead(config, config.num_labels)

    def answer(self, states: list[Tensor], last: Tensor) -> Tensor:  # noqa: ARG002
        answer: Tensor = self.classifier(last.mean(dim=1))
        return answer


class AgeGenderModel(CardModel):
    """https://huggingface.co/audeering/wav2vec2-large-robust-24-ft-age-gender."""

    age: CardHead
    gender: CardHead

    def add_heads(self, config: Any) -> None:
        self.age = CardHead(config, 1)
        self.gender = CardHead(config, 3)

    def answer(self, states: list[Tensor], last: Tensor) -> Tensor:  # noqa: ARG002
        pooled = last.mean(dim=1)
        return torch.hstack([self.age(pooled), torch.softmax(self.gender(pooled), dim=1)])


class SummingModel(CardModel):
    """Base of the models whose head may take a weighted sum of all hidden states."""

    def add_heads(self, config: Any) -> None:
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.ones(config.num_hidden_layers + 1) / (config.num_hidden_layers + 1))

    def summed(self, states: list[Tensor], last: Tensor) -> Tensor:
        """The head's input: the sum, or the last hidden state."""
        if not self.config.use_weighted_layer_sum:  # type: ignore[attr-defined]
            return last
        weights = torch.softmax(self.layer_weights, dim=-1).view(-1, 1, 1)
        return (torch.cat(states) * weights).sum(dim=0, keepdim=True)


class XVectorModel(SummingModel):
    """``Wav2Vec2ForXVector``."""

    def add_heads(self, config: Any) -> None:
        super().add_heads(config)
        self.projector = nn.Linear(config.hidden_size, config.tdnn_dim[0])
        self.tdnn = nn.ModuleList(TDNNLayer(config, i) for i in range(len(config.tdnn_dim)))
        self.feature_extractor = nn.Linear(2 * config.tdnn_dim[-1], config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)

    def answer(self, states: list[Tensor], last: Tensor) -> Tensor:
        frames = self.projector(self.summed(states, last))
        for layer in self.tdnn:
            frames = layer(frames)
        embedding: Tensor = self.feature_extractor(torch.hstack([frames.mean(dim=1), frames.std(dim=1)]))
        return embedding


class FrameModel(SummingModel):
    """``Wav2Vec2ForAudioFrameClassification``."""

    def add_heads(self, config: Any) -> None:
        super().add_heads(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def answer(self, states: list[Tensor], last: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.summed(states, last))
        return logits


def card_class(family: str, card: type[CardModel]) -> Any:
    """The class of a model with a family's encoder; ``family`` is the prefix of the family's transformers classes."""
    base, encoder = (getattr(transformers, f"{family}{part}") for part in ("PreTrainedModel", "Model"))

    def initialise(self: Any, config: Any) -> None:
        base.__init__(self, config)
        setattr(self, self.base_model_prefix, encoder(config))
        self.add_heads(config)
        self.post_init()

    return type(card.__name__, (card, base), {"__init__": initialise})
