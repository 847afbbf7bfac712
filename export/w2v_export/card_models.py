"""Reference models whose code stands only in their model cards, for transformers to load: heads that it does not have.

They are written as in the cards and share neither code nor weight loading with the graph's heads (``heads``), so that
the parity test compares two independent implementations.
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
    """Base of the models of the cards: an encoder, and a head on the mean of its frames.

    It is mixed into a family's ``PreTrainedModel``.
    """

    def add_heads(self, config: Any) -> None:
        """Add the head's modules."""
        raise NotImplementedError

    def answer(self, pooled: Tensor) -> Tensor:
        """The logits of utterances, from the means of their frames: (batch, hidden) → (batch, K)."""
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
    """The class of a card's model with a family's encoder; ``family`` is the prefix of its transformers classes."""
    base, encoder = (getattr(transformers, f"{family}{part}") for part in ("PreTrainedModel", "Model"))

    def initialise(self: Any, config: Any) -> None:
        base.__init__(self, config)
        setattr(self, self.base_model_prefix, encoder(config))
        self.add_heads(config)
        self.post_init()

    return type(card.__name__, (card, base), {"__init__": initialise})
