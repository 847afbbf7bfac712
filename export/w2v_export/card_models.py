"""Models that only their cards define, for transformers to load: the reference for the heads that it does not have.

They are written as the cards have them and share nothing with the graph's heads, neither code nor the way their
weights are read, so that a mistake in one does not prove itself by the other.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


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
    """What the models of the cards have in common: an encoder, and a head on the mean of its frames.

    To be mixed into a family's ``PreTrainedModel``.
    """

    def add_heads(self, config: Any) -> None:
        """Add the head's modules."""
        raise NotImplementedError

    def answer(self, pooled: Tensor) -> Tensor:
        """The logits of utterances, from the means of their frames (batch, hidden)."""
        raise NotImplementedError


class EmotionModel(CardModel):
    """https://huggingface.co/audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim."""

    classifier: CardHead

    def add_heads(self, config: Any) -> None:
        self.classifier = CardHead(config, config.num_labels)

    def answer(self, pooled: Tensor) -> Tensor:
        answer: Tensor = self.classifier(pooled)
        return answer


class AgeGenderModel(CardModel):
    """https://huggingface.co/audeering/wav2vec2-large-robust-24-ft-age-gender."""

    age: CardHead
    gender: CardHead

    def add_heads(self, config: Any) -> None:
        self.age = CardHead(config, 1)
        self.gender = CardHead(config, 3)

    def answer(self, pooled: Tensor) -> Tensor:
        return torch.hstack([self.age(pooled), torch.softmax(self.gender(pooled), dim=1)])


def card_class(family: str, card: type[CardModel]) -> Any:
    """A card's model around the encoder of a family, which is given by the prefix of its classes in transformers."""
    base, encoder = (getattr(transformers, f"{family}{part}") for part in ("PreTrainedModel", "Model"))

    def initialise(self: Any, config: Any) -> None:
        base.__init__(self, config)
        setattr(self, self.base_model_prefix, encoder(config))
        self.add_heads(config)
        self.post_init()

    return type(card.__name__, (card, base), {"__init__": initialise})
