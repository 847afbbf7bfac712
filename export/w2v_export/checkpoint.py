"""From a hub id, a folder or a seed to a reference model in PyTorch, with everything a bundle must know of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from w2v_export.families import FAMILIES, Family
from w2v_export.graph.inference import InferenceGraph
from w2v_export.heads import HeadModule, RegressionHead, build_head
from w2v_export.hub import ADDED_TOKENS, CONFIG, PREPROCESSOR, VOCABULARY, download, first_line
from w2v_export.weights import refuse_incomplete, require_weights, weights_beside_encoder
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
    require_weights(folder)
    with _silence():
        try:
            reference, info = family.model(config).from_pretrained(folder, config=config, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from None
    refuse_incomplete(folder, reference, info)
    beside = weights_beside_encoder(folder, reference)
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
        raise CheckpointError(f"{folder / PREPROCESSOR} cannot be read: {first_line(error)}") from None


def _vocabulary(folder: Path) -> tuple[str, ...] | None:
    """Tokens in the order of their ids, where the checkpoint lists them; None where it has a list a language."""
    tokens: dict[str, int] = {}
    for name in (VOCABULARY, ADDED_TOKENS):
        try:
            listed = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(listed, dict) or not all(isinstance(index, int) for index in listed.values()):
            return None
        tokens |= listed
    ordered = sorted(tokens, key=tokens.__getitem__)
    return tuple(ordered) if sorted(tokens.values()) == list(range(len(tokens))) and tokens else None


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
