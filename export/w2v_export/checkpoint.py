"""From a hub id, a folder or a seed to a reference model in PyTorch, with everything a bundle must know of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model
from transformers.utils import logging as transformers_logging

from w2v_export.heads import RegressionHead, build_head
from w2v_models import catalogue
from w2v_models.errors import CheckpointError
from w2v_models.manifest import CHECKPOINT_WEIGHTS, RANDOM_WEIGHTS, Architecture, ConvStack, Head, Source

CONFIG: Final = "config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"
#: The training mask's embedding, absent from some checkpoints and never used in inference.
UNUSED_WEIGHTS: Final = ("masked_spec_embed",)

MODEL_TYPES: Final = ("wav2vec2",)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A reference model as it is meant to be run: encoder, feature extractor and, if it has one, head."""

    source: Source
    architecture: Architecture
    encoder: Wav2Vec2Model
    extractor: Wav2Vec2FeatureExtractor
    head: Head | None
    head_module: nn.Module | None

    @torch.inference_mode()
    def run(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The reference itself, one utterance alone: (samples,) → frames (T, D), their mean (D,), logits (K,)."""
        inputs = self.extractor(waveform, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        frames = self.encoder(**inputs).last_hidden_state
        pooled = frames.mean(dim=1)
        logits = None if self.head_module is None else self.head_module(pooled)[0].numpy()
        return frames[0].numpy(), pooled[0].numpy(), logits


def load(model: str, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Load a checkpoint's own weights, from a folder or the hub.

    Raises:
        CheckpointError: it cannot be found, is of an unknown architecture or head, or lacks weights; every missing,
            unexpected or misshapen weight is named.
    """
    folder, commit = (Path(model), None) if Path(model).is_dir() else download(model, revision, offline)
    config, extractor = _read_config(folder, model), _read_extractor(folder)
    _require_weights(folder)
    with _silence():
        try:
            encoder, info = Wav2Vec2Model.from_pretrained(folder, config=config, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    _refuse_incomplete(folder, encoder, info)
    built = build_head(_weights_beside_encoder(folder, encoder), _labels(config))
    head, module = built or (None, None)
    variant = catalogue.find(model)
    name = folder.resolve().name if commit is None else model
    source = Source(name, commit, CHECKPOINT_WEIGHTS, None, variant.licence if variant else None)
    return Checkpoint(source, _architecture(config, extractor), encoder.eval(), extractor, head, module)


def seeded(model: str, seed: int) -> Checkpoint:
    """Build the true architecture of a catalogue id or a local config with seeded random weights.

    Biases and norms are drawn at random too, so that a parity test sees every weight. Shapes and speed are the
    model's; the embeddings mean nothing. The same seed gives the same weights on the same release of PyTorch.

    Raises:
        CheckpointError: the id is not in the catalogue and is no folder with a ``config.json``.
    """
    variant = catalogue.find(model)
    if Path(model).is_dir():
        config, extractor = _read_config(Path(model), model), _read_extractor(Path(model))
        name, labels, licence = Path(model).resolve().name, tuple[str, ...](), None
    elif variant is not None:
        config = Wav2Vec2Config(**variant.config)
        extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=variant.attention_mask)
        name, labels, licence = variant.id, variant.labels, variant.licence
    else:
        known = ", ".join(entry.id for entry in catalogue.CATALOGUE)
        raise CheckpointError(
            f"{model} is neither a folder nor in the catalogue, so its architecture is unknown without its files. "
            f"The catalogue holds: {known}."
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Wav2Vec2Model(config).eval()
        module = RegressionHead(config.hidden_size, len(labels)).eval() if labels else None
    _randomise(encoder, generator)
    head = Head("regression", labels) if labels else None
    source = Source(name, None, RANDOM_WEIGHTS, seed, licence)
    return Checkpoint(source, _architecture(config, extractor), encoder, extractor, head, module)


@torch.no_grad()
def _randomise(encoder: nn.Module, generator: torch.Generator) -> None:
    """Give biases and norms, which initialise to 0 and 1, values that a mistake would show in."""
    for name, parameter in encoder.named_parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.05 * noise)
        elif "norm" in name and name.endswith("weight"):
            parameter.add_(0.1 * noise)


def download(model: str, revision: str | None, offline: bool) -> tuple[Path, str]:
    """Fetch a checkpoint's files from the hub, or find them in its cache: (snapshot folder, commit).

    Raises:
        CheckpointError: the id is unknown, or the hub cannot be reached and the cache does not hold it.
    """
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model} is not a folder; give a checkpoint folder or a hub id such as org/name.")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

    try:
        weights = [SAFETENSORS, f"{SAFETENSORS}.index.json", "model-*.safetensors"]
        if offline:
            weights += [PICKLE]
        elif not any(name.endswith(".safetensors") for name in HfApi().list_repo_files(model, revision=revision)):
            weights = [PICKLE, f"{PICKLE}.index.json", "pytorch_model-*.bin"]
        folder = Path(
            snapshot_download(
                model, revision=revision, local_files_only=offline, allow_patterns=[CONFIG, PREPROCESSOR, *weights]
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise
        raise CheckpointError(
            f"{model} is neither a folder nor a model on the hub: {_first_line(error)}. Check the name."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = _first_line(error) if isinstance(error, HfHubHTTPError) else "the hub cannot be reached"
        raise CheckpointError(
            f"{model} cannot be fetched ({why}) and is not in the hub's cache. Give the folder of a "
            "checkpoint, or --random-weights to try things out without the weights."
        ) from None
    return folder, folder.name


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _read_config(folder: Path, model: str) -> PretrainedConfig:
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {CONFIG}, so it is not a checkpoint folder.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from None
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{model} has model_type {model_type!r}; known is: {', '.join(MODEL_TYPES)}.")
    config = Wav2Vec2Config.from_dict(data)
    for option in ("add_adapter", "adapter_attn_dim"):
        if getattr(config, option, None):
            raise CheckpointError(f"{model} sets {option} in its {CONFIG}, which this release cannot export.")
    return config


def _read_extractor(folder: Path) -> Wav2Vec2FeatureExtractor:
    if not (folder / PREPROCESSOR).is_file():
        raise CheckpointError(
            f"{folder} holds no {PREPROCESSOR}, which says whether the waveform is normalised. "
            "Save it with: Wav2Vec2FeatureExtractor(...).save_pretrained(folder)"
        )
    try:
        extractor: Wav2Vec2FeatureExtractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / PREPROCESSOR} cannot be read: {_first_line(error)}") from None
    return extractor


def _require_weights(folder: Path) -> None:
    names = (SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLE, f"{PICKLE}.index.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}.")


def _encoder_parts(encoder: nn.Module) -> set[str]:
    return {name.partition(".")[0] for name in encoder.state_dict()} | set(UNUSED_WEIGHTS)


def _is_encoder_weight(name: str, parts: set[str]) -> bool:
    return name.removeprefix(f"{Wav2Vec2Model.base_model_prefix}.").partition(".")[0] in parts


def _weights_beside_encoder(folder: Path, encoder: nn.Module) -> dict[str, Tensor]:
    """The checkpoint's weights that are not the encoder's, by name."""
    parts = _encoder_parts(encoder)
    if (folder / SAFETENSORS).is_file():
        with safe_open(folder / SAFETENSORS, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if not _is_encoder_weight(key, parts)}  # noqa: SIM118
    if (folder / PICKLE).is_file():
        loaded: Mapping[str, Any] = torch.load(folder / PICKLE, map_location="cpu", weights_only=True)
        return {key: value for key, value in loaded.items() if not _is_encoder_weight(key, parts)}
    return {}  # weights in several files are those of large encoders without a head


def _refuse_incomplete(folder: Path, encoder: nn.Module, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that leaves an encoder weight as it was initialised, or holds one that has no place."""
    parts = _encoder_parts(encoder)
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(UNUSED_WEIGHTS))
    misshapen = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    unexpected = sorted(name for name in info["unexpected_keys"] if _is_encoder_weight(name, parts))
    problems = {"missing": missing, "of the wrong shape": misshapen, "unexpected": unexpected}
    found = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{folder} does not hold the encoder that its {CONFIG} describes; {'; '.join(found)}.")


def _labels(config: PretrainedConfig) -> tuple[str, ...]:
    return tuple(config.id2label[index] for index in sorted(config.id2label))


def _architecture(config: PretrainedConfig, extractor: Wav2Vec2FeatureExtractor) -> Architecture:
    conv = ConvStack(tuple(config.conv_kernel), tuple(config.conv_stride), tuple(config.conv_dim))
    return Architecture(
        model_type=config.model_type,
        sample_rate=extractor.sampling_rate,
        conv=conv,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        normalise=bool(extractor.do_normalize),
    )


class _silence:  # noqa: N801 - used as a context manager, like contextlib's
    """Keep transformers' warnings on unused weights out of the terminal: they are checked here, and refused."""

    def __enter__(self) -> None:
        self.level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()

    def __exit__(self, *error: object) -> None:
        transformers_logging.set_verbosity(self.level)
