"""The weights of a checkpoint: which belong to the encoder, which beside it, and whether all are there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from w2v_export.hub import CONFIG, PICKLE, SAFETENSORS
from w2v_models.errors import CheckpointError

#: The training mask's embedding, absent from some checkpoints and never used in inference.
UNUSED_WEIGHTS: Final = ("masked_spec_embed",)


def require_weights(folder: Path) -> None:
    names = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLE, f"{PICKLE}.index.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}.")


def _beside_encoder(names: Iterable[str], model: Any) -> set[str]:
    """Which of a checkpoint's weights are not the encoder's.

    Saved with a head, the encoder's names have its prefix. Saved alone, they have none, and are known by their first
    part, which also finds encoder weights that have no place in the model.
    """
    names, prefix = set(names), f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in names):
        return {name for name in names if not name.startswith(prefix)}
    parts = {name.partition(".")[0] for name in model.base_model.state_dict()} | set(UNUSED_WEIGHTS)
    return {name for name in names if name.partition(".")[0] not in parts}


def weights_beside_encoder(folder: Path, model: Any) -> dict[str, Tensor]:
    """The checkpoint's weights that are not the encoder's, by name, from however many files."""
    weights: dict[str, Tensor] = {}
    if files := sorted(folder.glob("model*.safetensors")):
        held: dict[str, Path] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                held |= dict.fromkeys(file.keys(), path)
        for name in _beside_encoder(held, model):
            with safe_open(held[name], framework="pt") as file:
                weights[name] = file.get_tensor(name)
        return weights
    for path in sorted(folder.glob("pytorch_model*.bin")):
        weights |= torch.load(path, map_location="cpu", weights_only=True)
    return {name: weights[name] for name in _beside_encoder(weights, model)}


def refuse_incomplete(folder: Path, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that leaves a weight as it was initialised, or holds an encoder weight without a place."""
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(UNUSED_WEIGHTS))
    misshapen = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    unexpected = sorted(set(info["unexpected_keys"]) - _beside_encoder(info["unexpected_keys"], model))
    problems = {"missing": missing, "of the wrong shape": misshapen, "unexpected": unexpected}
    found = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{folder} does not hold the model that its {CONFIG} describes; {'; '.join(found)}.")
