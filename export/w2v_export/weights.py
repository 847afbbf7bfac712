"""The weights of a checkpoint: read from their files, which of them stand beside the encoder, whether all are there."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from w2v_export.hub import CONFIG, first_line
from w2v_models import schema
from w2v_models.errors import CheckpointError

#: The training mask's embedding, absent from some checkpoints and never used in inference.
UNUSED_WEIGHTS: Final = ("masked_spec_embed",)
#: First parts of the names of an encoder's weights, where it was saved without a head.
_ENCODER_PARTS: Final = frozenset(("feature_extractor", "feature_projection", "encoder", *UNUSED_WEIGHTS))
#: Integers that go with a batch norm, and nothing else does.
_COUNTER: Final = "num_batches_tracked"
#: How older releases of transformers called the parts of a weight norm.
_RENAMED: Final = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
#: Formats of safetensors that hold PyTorch's names and shapes; absent in files of others than transformers.
_FORMATS: Final = (None, "pt", "mlx")


def read(files: Mapping[Path, frozenset[str] | None]) -> dict[str, Tensor]:
    """Every weight by its name, from files with the names that each must hold.

    Files are mapped into memory, old pickles aside, so that what is not used is not read.

    Raises:
        CheckpointError: a file is damaged or of another format, holds other weights than its index says, or weights
            that are no floating-point numbers.
    """
    weights: dict[str, Tensor] = {}
    for path, expected in files.items():
        held = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
        if expected is not None and expected != held.keys():
            differing = {"lacks": expected - held.keys(), "holds besides": held.keys() - expected}
            found = [f"{what} {schema.listed(names)}" for what, names in differing.items() if names]
            raise CheckpointError(f"{path} does not hold what its index says: it {' and '.join(found)}.")
        if odd := {name: value for name, value in held.items() if not _is_readable(name, value)}:
            kinds = {f"{value.layout} {value.dtype}".replace("torch.", "") for value in odd.values()}
            raise CheckpointError(
                f"{path} holds weights that are no plain floating-point numbers but {', '.join(sorted(kinds))}: "
                f"{schema.listed(odd)}; save the model in float32, float16 or bfloat16."
            )
        weights |= held
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            framework = (file.metadata() or {}).get("format")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _damaged(path, error) from None
    if framework not in _FORMATS:
        raise CheckpointError(f"{path} holds weights for {framework!r:.80}, not for PyTorch.")
    return weights


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a pickle can fail in any way
        raise _damaged(path, error) from None
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path} holds {schema.shown(type(data).__name__)} in place of weights by name.")
    if strange := [str(name) for name, value in data.items() if not (type(name) is str and isinstance(value, Tensor))]:
        raise CheckpointError(
            f"{path} does not hold weights alone, but also {schema.listed(strange)}; "
            "save those alone with: model.save_pretrained(folder)"
        )
    return data


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as weights: {first_line(error)}.")


def _is_readable(name: str, value: Tensor) -> bool:
    return value.layout == torch.strided and (value.is_floating_point() or name.endswith(_COUNTER))


def beside_encoder(names: Iterable[str], prefix: str) -> set[str]:
    """Which of a checkpoint's weights are not the encoder's.

    Saved with a head, the encoder's names begin with ``prefix`` and a dot. Saved alone, they have none, and are known
    by their first part, which also finds encoder weights that have no place in the model.
    """
    names, prefix = set(names), f"{prefix}."
    if any(name.startswith(prefix) for name in names):
        return {name for name in names if not name.startswith(prefix)}
    return {name for name in names if name.partition(".")[0] not in _ENCODER_PARTS}


def refuse_incomplete(folder: Path, shapes: Mapping[str, tuple[int, ...]], model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that leaves a weight as it was initialised, or holds an encoder weight without a place.

    Args:
        folder: the checkpoint's.
        shapes: those of its weights, by their names in the files.
        model: what transformers loaded of them.
        info: what it said about it.

    Raises:
        CheckpointError: with every such weight.
    """
    beside = beside_encoder(shapes, model.base_model_prefix)
    problems = {
        "missing": sorted(name for name in info["missing_keys"] if not name.endswith(UNUSED_WEIGHTS)),
        "unexpected": sorted(set(info["unexpected_keys"]) - beside),
    }
    found = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{folder} does not hold the model that its {CONFIG} describes; {'; '.join(found)}.")


def refuse_misshapen(folder: Path, shapes: Mapping[str, tuple[int, ...]], model: Any) -> None:
    """Refuse weights that do not have the shape of their place in a model, which need hold no weights of its own.

    Raises:
        CheckpointError: with every such weight by its name in the file, and both shapes.
    """
    own, prefix = model.state_dict(), f"{model.base_model_prefix}."
    found = []
    for name, shape in shapes.items():
        stem, _, part = name.rpartition(".")
        current = f"{stem}.{_RENAMED[part]}" if part in _RENAMED else name
        places = (place for place in (current, prefix + current, current.removeprefix(prefix)) if place in own)
        if (place := next(places, None)) and shape != (wanted := tuple(own[place].shape)):
            found.append(f"{name} {shape} for {wanted}")
    if found:
        raise CheckpointError(
            f"{folder} does not hold the model that its {CONFIG} describes; of the wrong shape: "
            f"{', '.join(sorted(found))}."
        )


def refuse_not_finite(folder: Path, model: Any) -> None:
    """Refuse weights that hold NaN or infinity, of which every embedding would.

    Raises:
        CheckpointError: with every such weight.
    """
    used = {name: value for name, value in model.state_dict().items() if not name.endswith(UNUSED_WEIGHTS)}
    if bad := [name for name, value in used.items() if value.numel() and not _is_finite(value)]:
        raise CheckpointError(
            f"{folder} holds weights that are NaN or infinite: {', '.join(bad)}. The checkpoint is damaged, or its "
            "training diverged."
        )


def _is_finite(value: Tensor) -> bool:
    """By the extremes, in which NaN shows too: many times faster than number by number."""
    return all(bool(extreme.isfinite()) for extreme in value.aminmax())
