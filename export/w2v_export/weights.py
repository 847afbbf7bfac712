"""Read a checkpoint's weights, find those beside the encoder, and check that all are there, shaped and finite."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from w2v_export import foreign
from w2v_export.hub import CONFIG, first_line
from w2v_models import schema
from w2v_models.errors import CheckpointError

#: The embedding of masked frames in training, missing from some checkpoints and never used in inference.
UNUSED_WEIGHTS: Final = ("masked_spec_embed",)
#: First parts of the encoder's weight names in a checkpoint that was saved without a head.
_ENCODER_PARTS: Final = frozenset(
    ("feature_extractor", "feature_projection", "encoder", "intermediate_ffn", "adapter", *UNUSED_WEIGHTS)
)
#: The counter of a batch norm: the only integer weight that is accepted.
_COUNTER: Final = "num_batches_tracked"
#: Names of a weight norm's parts in older releases of transformers, and their present names.
_RENAMED: Final = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
#: Values of ``format`` in a safetensors header with PyTorch's names and shapes; None if it has none.
_FORMATS: Final = (None, "pt", "mlx")


def read(files: Mapping[Path, frozenset[str] | None]) -> dict[str, Tensor]:
    """Read all weights by name from ``files``, each with the weight names that its index lists, or None.

    Files are memory-mapped, except pickles of the old format, so that unused weights are not read.

    Raises:
        CheckpointError: a file is damaged or of another format, holds other weights than its index lists, or weights
            that are not floating-point numbers.
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
    return CheckpointError(f"{path} cannot be read as weights: {first_line(error)}. {foreign.damaged(path)}")


def _is_readable(name: str, value: Tensor) -> bool:
    return value.layout == torch.strided and (value.is_floating_point() or name.endswith(_COUNTER))


def beside_encoder(names: Iterable[str], prefix: str) -> set[str]:
    """The names of a checkpoint's weights that are not the encoder's.

    In a checkpoint with a head, the encoder's names begin with ``prefix`` and a dot. In one of the encoder alone they
    have no prefix and are recognised by their first part, also those that the model has no parameter for.
    """
    names, prefix = set(names), f"{prefix}."
    if any(name.startswith(prefix) for name in names):
        return {name for name in names if not name.startswith(prefix)}
    return {name for name in names if name.partition(".")[0] not in _ENCODER_PARTS}


def refuse_incomplete(folder: Path, shapes: Mapping[str, tuple[int, ...]], model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks a weight of the model, or holds an encoder weight that the model does not have.

    Args:
        folder: the checkpoint's folder.
        shapes: the shapes of its weights, by their names in the files.
        model: the model that transformers loaded.
        info: the ``loading_info`` that transformers returned.

    Raises:
        CheckpointError: there are such weights; the message names each.
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
    """Refuse weights whose shape differs from that of the model's parameter; ``model`` may be on the meta device.

    Raises:
        CheckpointError: there are such weights; the message has each name in the file, and both shapes.
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
    """Refuse weights that hold NaN or infinity, which would spread to every embedding.

    Raises:
        CheckpointError: there are such weights; the message names each.
    """
    used = {name: value for name, value in model.state_dict().items() if not name.endswith(UNUSED_WEIGHTS)}
    if bad := [name for name, value in used.items() if value.numel() and not _is_finite(value)]:
        raise CheckpointError(
            f"{folder} holds weights that are NaN or infinite: {', '.join(bad)}. The checkpoint is damaged, or its "
            "training diverged."
        )


def _is_finite(value: Tensor) -> bool:
    """Whether all numbers are finite, by minimum and maximum (NaN reaches both): many times faster than one by one."""
    return all(bool(extreme.isfinite()) for extreme in value.aminmax())
