"""From a hub id, a folder or a seed to a reference model in PyTorch, with everything a bundle must know of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from w2v_export.families import FAMILIES, Family
from w2v_export.graph.inference import InferenceGraph
from w2v_export.heads import HeadModule, RegressionHead, build_head
from w2v_models import catalogue
from w2v_models.errors import CheckpointError
from w2v_models.manifest import (
    CHECKPOINT_WEIGHTS,
    LOGITS,
    RANDOM_WEIGHTS,
    SPEAKER_EMBEDDINGS,
    Architecture,
    Head,
    Source,
)

Array = npt.NDArray[np.float32]

CONFIG: Final = "config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"
#: The training mask's embedding, absent from some checkpoints and never used in inference.
UNUSED_WEIGHTS: Final = ("masked_spec_embed",)

VOCABULARY: Final = "vocab.json"


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a reference computes of one utterance alone.

    ``layers`` (L + 1, T, D): what enters the first block and what leaves each; ``frames`` (T, D), the
    ``last_hidden_state``; ``head``: what the head's columns hold, (K,) or at frame level (T, K), None without a head
    or where the utterance is too short for it.
    """

    layers: Array
    frames: Array
    head: Array | None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A reference model as it is meant to be run: the model itself, its feature extractor, and what is known of both.

    ``model`` is transformers' own, with its head where the head is one of transformers'. ``head`` is that head, or
    another that the checkpoint's weights make up, as it goes into the graph.
    """

    source: Source
    architecture: Architecture
    family: Family
    model: Any
    extractor: Any
    head: HeadModule | None

    @property
    def encoder(self) -> Any:
        """The reference's encoder, without a head."""
        return self.model.base_model

    @property
    def head_entry(self) -> Head | None:
        """The head's place in the manifest."""
        if (head := self.head) is None:
            return None
        outputs = (LOGITS, SPEAKER_EMBEDDINGS) if head.kind == "x-vector" else (LOGITS,)
        return Head(head.kind, head.labels, outputs, head.level, head.pooling, head.margin)

    def graph(self) -> InferenceGraph:
        """The inference form, which takes over the reference's parameters."""
        conv = self.architecture.conv
        front_end, projection, encoder = self.family.parts(self.encoder, conv, self.extractor)
        return InferenceGraph(front_end, projection, encoder, conv, self.head).eval()

    @torch.inference_mode()
    def run(self, waveform: Array) -> Outputs:
        """The reference itself on one utterance alone, (samples,)."""
        inputs = self.extractor(waveform, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        frames = self.architecture.conv.num_frames(len(waveform))
        entry = self.head_entry
        with_head = entry is not None and frames >= entry.shortest
        run = self.model if with_head else self.encoder
        with _hidden_states(self.encoder) as states:
            answer = run(**inputs)
        # The log-mel extractor appends a frame, masked, where the last one is half a frame.
        *layers, last = (state[0, :frames] for state in states)
        head = None
        if with_head and self.head is not None and entry is not None:
            own = run is self.encoder  # not one of transformers' heads
            outputs = self.head.vector(last.mean(dim=0, keepdim=True)) if own else answer
            columns = outputs[entry.outputs[-1]][0]
            head = (columns[:frames] if entry.level == "frame" else columns).numpy()
        return Outputs(torch.stack(layers).numpy(), last.numpy(), head)


@contextlib.contextmanager
def _hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Collect what enters an encoder's first block, what leaves each, and what the encoder returns, while it runs."""
    states: list[Tensor] = []

    def entered(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
        states.append(arguments[0] if arguments else named["hidden_states"])

    def left(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001
        states.append(output if isinstance(output, Tensor) else output[0])

    blocks = model.encoder.layers
    hooks = [blocks[0].register_forward_pre_hook(entered, with_kwargs=True)]
    hooks += [module.register_forward_hook(left) for module in (*blocks, model.encoder)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def load(model: str, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Load a checkpoint's own weights, from a folder or the hub.

    Raises:
        CheckpointError: it cannot be found, is of an unknown architecture or head, or lacks weights; every missing,
            unexpected or misshapen weight is named.
    """
    folder, commit = (Path(model), None) if Path(model).is_dir() else download(model, revision, offline)
    family, config = _read_config(folder, model)
    extractor = _read_extractor(folder, family)
    _require_weights(folder)
    with _silence():
        try:
            reference, info = family.model(config).from_pretrained(folder, config=config, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    _refuse_incomplete(folder, reference, info)
    beside = _weights_beside_encoder(folder, reference)
    variant = catalogue.find(model)
    name = folder.resolve().name if commit is None else model
    source = Source(name, commit, CHECKPOINT_WEIGHTS, None, variant.licence if variant else None)
    head = build_head(beside, config, _vocabulary(folder))
    return Checkpoint(source, _architecture(family, config, extractor), family, reference.eval(), extractor, head)


def seeded(model: str, seed: int) -> Checkpoint:
    """Build the true architecture of a catalogue id or a local config with seeded random weights.

    What initialises to a constant, such as biases and norms, is drawn at random too, so that a parity test sees every
    weight. Shapes and speed are the model's; the embeddings mean nothing. The same seed gives the same weights on the
    same release of PyTorch.

    Raises:
        CheckpointError: the id is not in the catalogue and is no folder with a ``config.json``.
    """
    variant = catalogue.find(model)
    if Path(model).is_dir():
        family, config = _read_config(Path(model), model)
        extractor = _read_extractor(Path(model), family)
        name, labels, licence = Path(model).resolve().name, tuple[str, ...](), None
    elif variant is not None:
        family = FAMILIES[variant.model_type]
        config = family.config(**variant.config)
        extractor = family.extractor(**variant.extractor)
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
        reference = family.model(config)(config).eval()
        head: HeadModule | None = RegressionHead(config.hidden_size, labels).eval() if labels else None
    _randomise(reference, generator)
    if head is None:
        prefix = f"{reference.base_model_prefix}."
        weights = reference.state_dict() if reference is not reference.base_model else {}
        beside = {key: value for key, value in weights.items() if not key.startswith(prefix)}
        head = build_head(beside, config, _vocabulary(Path(model)))
    source = Source(name, None, RANDOM_WEIGHTS, seed, licence)
    return Checkpoint(source, _architecture(family, config, extractor), family, reference, extractor, head)


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give what initialises to a constant, such as biases and norms, values that a mistake would show in."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.is_floating_point() or value.numel() < 2 or value.min() != value.max():
            continue
        noise = torch.empty_like(value).normal_(generator=generator)
        if name.endswith("running_var"):
            value.mul_(torch.exp(0.1 * noise))
        else:
            value.add_((0.1 if "norm" in name and name.endswith("weight") else 0.05) * noise)


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
                model,
                revision=revision,
                local_files_only=offline,
                allow_patterns=[CONFIG, PREPROCESSOR, VOCABULARY, "added_tokens.json", *weights],
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


def _read_config(folder: Path, model: str) -> tuple[Family, PretrainedConfig]:
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {CONFIG}, so it is not a checkpoint folder.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from None
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if model_type not in FAMILIES:
        raise CheckpointError(f"{model} has model_type {model_type!r}; known are: {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    config: PretrainedConfig = family.config.from_dict(data)
    if getattr(config, "add_adapter", False):
        raise CheckpointError(
            f"{model} sets add_adapter in its {CONFIG}: convolutions after the encoder, which are not exported."
        )
    return family, config


def _read_extractor(folder: Path, family: Family) -> Any:
    name = family.extractor.__name__
    if not (folder / PREPROCESSOR).is_file():
        raise CheckpointError(
            f"{folder} holds no {PREPROCESSOR}, which says how the waveform is prepared. "
            f"Save it with: {name}(...).save_pretrained(folder)"
        )
    try:
        return family.extractor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / PREPROCESSOR} cannot be read: {_first_line(error)}") from None


def _vocabulary(folder: Path) -> tuple[str, ...] | None:
    """Tokens in the order of their ids, where the checkpoint lists them; None where it has a list a language."""
    tokens: dict[str, int] = {}
    for name in (VOCABULARY, "added_tokens.json"):
        try:
            listed = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(listed, dict) or not all(isinstance(index, int) for index in listed.values()):
            return None
        tokens |= listed
    ordered = sorted(tokens, key=tokens.__getitem__)
    return tuple(ordered) if sorted(tokens.values()) == list(range(len(tokens))) and tokens else None


def _require_weights(folder: Path) -> None:
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


def _weights_beside_encoder(folder: Path, model: Any) -> dict[str, Tensor]:
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


def _refuse_incomplete(folder: Path, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that leaves a weight as it was initialised, or holds an encoder weight without a place."""
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(UNUSED_WEIGHTS))
    misshapen = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    unexpected = sorted(set(info["unexpected_keys"]) - _beside_encoder(info["unexpected_keys"], model))
    problems = {"missing": missing, "of the wrong shape": misshapen, "unexpected": unexpected}
    found = [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{folder} does not hold the model that its {CONFIG} describes; {'; '.join(found)}.")


def _architecture(family: Family, config: PretrainedConfig, extractor: Any) -> Architecture:
    return Architecture(
        model_type=config.model_type,
        front_end=family.front_end,
        sample_rate=extractor.sampling_rate,
        conv=family.conv(config, extractor),
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        normalise=bool(getattr(extractor, "do_normalize", True)),
    )


class _silence:  # noqa: N801 - used as a context manager, like contextlib's
    """Keep transformers' warnings on unused weights out of the terminal: they are checked here, and refused."""

    def __enter__(self) -> None:
        self.level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()

    def __exit__(self, *error: object) -> None:
        transformers_logging.set_verbosity(self.level)
