"""Heads that checkpoints carry beside the encoder, recognised by their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from w2v_models.errors import CheckpointError
from w2v_models.manifest import Head

#: Weights beside the encoder that serve training or transcription, not embeddings.
IGNORED_PREFIXES = ("lm_head.", "quantizer.", "project_hid.", "project_q.")


class RegressionHead(nn.Module):
    """audeering's ``RegressionHead``: dense, tanh, projection of the mean hidden state to one number a label.

    Shape: (batch, hidden) → (batch, labels). The reference's two dropouts do nothing in inference.
    """

    def __init__(self, hidden_size: int, labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, labels)

    def forward(self, embedding: Tensor) -> Tensor:
        output: Tensor = self.out_proj(torch.tanh(self.dense(embedding)))
        return output


_REGRESSION_WEIGHTS = {f"classifier.{name}" for name in RegressionHead(1, 1).state_dict()}


def build_head(weights: Mapping[str, Tensor], labels: tuple[str, ...]) -> tuple[Head, nn.Module] | None:
    """The head that ``weights`` (all that is not the encoder's) make up, or None where there is none.

    ``labels`` are the names of the config's ``id2label``, in order.

    Raises:
        CheckpointError: the weights are of no known head, or do not fit the labels.
    """
    weights = {name: value for name, value in weights.items() if not name.startswith(IGNORED_PREFIXES)}
    if not weights:
        return None
    if set(weights) != _REGRESSION_WEIGHTS:
        raise CheckpointError(
            f"The checkpoint holds weights of no known head: {', '.join(sorted(weights))}. "
            f"Known is the regression head: {', '.join(sorted(_REGRESSION_WEIGHTS))}."
        )
    outputs, hidden_size = weights["classifier.out_proj.weight"].shape
    if len(labels) != outputs:
        raise CheckpointError(
            f"The head has {outputs} outputs but config.json names {len(labels)} labels ({', '.join(labels)}); "
            "give id2label one name for each output."
        )
    module = RegressionHead(hidden_size, outputs)
    module.load_state_dict({name.removeprefix("classifier."): value for name, value in weights.items()})
    return Head("regression", labels), module.eval()
