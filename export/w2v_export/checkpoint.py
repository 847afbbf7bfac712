"""Load a checkpoint from the hub, a folder or a seed as a PyTorch reference model, with its manifest entries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from optimum.utils import is_transformers_version
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BatchFeature, PretrainedConfig
from transformers.utils import logging as transformers_logging

from w2v_export.card_models import CardModel
from w2v_export.description import Description, describe, describe_architecture
from w2v_export.families import FAMILIES, Family
from w2v_export.graph.inference import InferenceGraph
from w2v_export.heads.recognise import HeadModule, build_head
from w2v_export.hub import CONFIG, first_line
from w2v_export.weights import beside_encoder, read, refuse_incomplete, refuse_misshapen, refuse_not_finite
from w2v_models.errors import CheckpointError
from w2v_models.manifest import (
    CHECKPOINT_WEIGHTS,
    LAST_LAYER,
    LOG_MEL_FRONT_END,
    LOGITS,
    RANDOM_WEIGHTS,
    SPEAKER_EMBEDDINGS,
    Architecture,
    Head,
    Source,
)

Array = npt.NDArray[np.float32]
#: How transformers is told to load weights in float32.
_FLOAT32: Final = {"dtype" if is_transformers_version(">=", "4.56") else "torch_dtype": torch.float32}


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of a reference model for one utterance alone.

    ``layers`` (L + 1, T, D) are the hidden states: the input of the first block, then the output of each block.
    ``frames`` (T, D) is the ``last_hidden_state``. ``head`` has the values of the head's columns, (K,) or at frame
    level (T, K); None without a head or if the utterance is too short for it.
    """

    layers: Array
    frames: Array
    head: Array | None

    @property
    def finite(self) -> bool:
        """Whether no output holds NaN or infinity."""
        return all(
            values is None or bool(np.isfinite(values).all()) for values in (self.layers, self.frames, self.head)
        )


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A reference model with its feature extractor and their description.

    ``model`` is transformers' model with its head, or one of ``card_models``. ``head`` is the same head as a module of
    the graph; its weights are loaded independently of ``model``'s.
    """

    source: Source
    architecture: Architecture
    family: Family
    model: Any
    extractor: Any
    head: HeadModule | None

    @property
    def encoder(self) -> Any:
        """The reference model without its head."""
        return self.model.base_model

    @property
    def head_entry(self) -> Head | None:
        """The head's entry in the manifest; None without a head."""
        if (head := self.head) is None:
            return None
        outputs = (LOGITS, SPEAKER_EMBEDDINGS) if head.kind == "x-vector" else (LOGITS,)
        return Head(head.kind, head.labels, outputs, head.level, head.pooling, head.margin)

    def graph(self) -> InferenceGraph:
        """The graph to export (:class:`InferenceGraph`), which takes over the reference's parameters."""
        conv = self.architecture.conv
        front_end, projection, encoder = self.family.parts(self.encoder, conv, self.extractor)
        if self.head is not None:
            self.head.sums_last = self._sums_last()
        return InferenceGraph(front_end, projection, encoder, conv, self.head).eval()

    def to_float64(self) -> None:
        """Let the reference compute in float64: for its own numbers without rounding, and for nothing else.

        A block is in float64 while it runs, so that the weights take little more memory than before.
        """
        encoder = self.encoder.encoder
        blocks, encoder.layers = encoder.layers, nn.ModuleList()
        self.model.double()
        encoder.layers = blocks
        for block in blocks:
            block.register_forward_pre_hook(lambda block, _: block.double() and None)
            block.register_forward_hook(lambda block, *_: block.float() and None)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.encoder.feature_projection.projection.weight.dtype
        return dtype

    @torch.inference_mode()
    def _sums_last(self) -> bool:
        """Whether the reference's hidden states end with its last hidden state: those of transformers 5 do not."""
        noise = torch.randn(4 * self.architecture.conv.receptive_field, generator=torch.Generator().manual_seed(0))
        inputs = self.extractor(noise.numpy(), sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        answer = self.encoder(**inputs, output_hidden_states=True)
        return torch.equal(answer.hidden_states[-1], answer.last_hidden_state)

    @torch.inference_mode()
    def run(self, waveform: Array) -> Outputs:
        """Run the reference model on one utterance alone, (samples,) float32."""
        inputs = self.extractor(waveform, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        frames = self.architecture.conv.num_frames(len(waveform))
        step = self.architecture.step(LAST_LAYER)
        if step > 1 and self.architecture.front_end == LOG_MEL_FRONT_END:
            # A convolution of the adapter would reach the masked frame that the extractor appends to some recordings.
            inputs = BatchFeature({name: values[:, :frames] for name, values in inputs.items()})
        entry = self.head_entry
        with_head = entry is not None and frames >= entry.shortest
        card = isinstance(self.model, CardModel)
        run = self.model if with_head and not card else self.encoder
        with _hidden_states(self.encoder) as states:
            answer = run(**inputs.to(self._dtype), output_hidden_states=card)
        # The log-mel extractor appends a masked frame if the last frame is incomplete.
        *layers, last = (state[0, :frames] for state in states)
        frames = len(last)
        head = None
        if with_head and entry is not None:
            if card:
                hidden_states = [state[:, :frames] for state in answer.hidden_states]
                columns = self.model.answer(hidden_states, last[None])[0]
            else:
                columns = answer[entry.outputs[-1]][0]
            head = (columns[:frames] if entry.level == "frame" else columns).numpy()
        return Outputs(torch.stack(layers).numpy(), last.numpy(), head)


@contextlib.contextmanager
def _hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Collect hidden states while a model runs: the first block's input, all blocks' output, and the last one's own."""
    states: list[Tensor] = []

    def entered(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
        states.append(arguments[0] if arguments else named["hidden_states"])

    def left(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001
        states.append(output if isinstance(output, Tensor) else output[0])

    blocks, final = model.encoder.layers, getattr(model, "adapter", None) or model.encoder
    hooks = [blocks[0].register_forward_pre_hook(entered, with_kwargs=True)]
    hooks += [module.register_forward_hook(left) for module in (*blocks, final)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def load(model: str, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Load a checkpoint's own weights, from a folder or the hub.

    Raises:
        CheckpointError: as for ``describe`` and ``read_checkpoint``.
    """
    return read_checkpoint(describe(model, revision, offline), offline)


def read_checkpoint(described: Description, offline: bool = False, with_head: bool = True) -> Checkpoint:
    """Load the weights of a checkpoint, with its head or its encoder alone.

    transformers loads the reference model from the folder, and the adapter of a chosen language into it. The graph's
    head is loaded from the files that ``weight_files`` finds, so that the parity test compares the two.

    Raises:
        CheckpointError: the head is unknown, or weights are missing, unexpected, of the wrong shape or not finite; the
            message names every such weight.
    """
    files, folder = described.weight_files(offline), described.folder
    assert folder is not None
    family, config, extractor = _instantiate(described)
    weights, adapter = read(files), described.adapter_file()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if adapter is not None:
        weights |= read({adapter: None})
    try:
        head = build_head(_head_weights(weights, family), config, described.vocabulary) if with_head else None
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if with_head and head is None and (named := family.named_head(config)):
        raise CheckpointError(
            f"{folder / CONFIG} names {config.architectures[0]}, but the weights hold no {named} head; "
            "--no-head exports the encoder alone."
        )
    kind = "ctc" if adapter is not None else head.kind if head else None  # only that class can take an adapter
    model = family.model(kind)
    del weights  # pickles of the old format are in memory as a whole
    with _silence():
        try:
            reference, info = model.from_pretrained(folder, config=config, output_loading_info=True, **_FLOAT32)
            if adapter is not None:
                reference.load_adapter(described.language)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            with torch.device("meta"):  # the model without memory for weights
                refuse_misshapen(folder, shapes, model(config))
            raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from None
    refuse_incomplete(folder, shapes, reference, info)
    refuse_not_finite(folder, reference)
    source = Source(described.name, described.commit, CHECKPOINT_WEIGHTS, None, described.licence, described.language)
    model = reference if with_head else reference.base_model
    return Checkpoint(source, described.architecture, family, model.eval(), extractor, head)


def seeded(model: str, seed: int) -> Checkpoint:
    """Build the architecture of a catalogue id or checkpoint folder with seeded random weights (``--random-weights``).

    Raises:
        CheckpointError: as for ``describe_architecture``.
    """
    return draw(describe_architecture(model), seed)


def draw(described: Description, seed: int, with_head: bool = True) -> Checkpoint:
    """Build an architecture with seeded random weights, with its head or its encoder alone.

    Parameters that initialise to a constant, such as biases and norms, are drawn at random too, so that a parity test
    sees every weight. Shapes and speed are the model's; the embeddings are meaningless. The same seed gives the same
    weights on the same release of PyTorch.

    Raises:
        CheckpointError: the head cannot be exported.
    """
    family, config, extractor = _instantiate(described)
    if described.labels:
        config.id2label = dict(enumerate(described.labels))
    try:
        kind = "regression" if described.labels else family.named_head(config)
        model = family.model(kind if with_head else None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reference = model(config).eval()
        _randomise(reference, torch.Generator().manual_seed(seed))
        head = build_head(_head_weights(reference.state_dict(), family), config, described.vocabulary)
    except CheckpointError as error:
        raise CheckpointError(f"{described.folder or described.name}: {error}") from None
    source = Source(described.name, None, RANDOM_WEIGHTS, seed, described.licence)
    return Checkpoint(source, described.architecture, family, reference, extractor, head)


def _head_weights(weights: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The weights that are not the encoder's."""
    return {name: weights[name] for name in beside_encoder(weights, family.prefix)}


def _instantiate(described: Description) -> tuple[Family, PretrainedConfig, Any]:
    """The family, config and feature extractor of a description."""
    family, options = FAMILIES[described.model_type], dict(described.config)
    if options["id2label"] is not None:
        del options["num_labels"]  # id2label determines it
    return family, family.config(**options), family.extractor(**described.extractor)


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Add noise to parameters that initialise to a constant, such as biases and norms, so that mistakes show."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.is_floating_point() or value.numel() < 2 or value.min() != value.max():
            continue
        noise = torch.empty_like(value).normal_(generator=generator)
        if name.endswith("running_var"):
            value.mul_(torch.exp(0.1 * noise))
        else:
            value.add_((0.1 if "norm" in name and name.endswith("weight") else 0.05) * noise)


class _silence:  # noqa: N801 - used as a context manager, like contextlib's
    """Silence transformers' progress, and its warnings of unused weights, which are checked and refused here."""

    def __enter__(self) -> None:
        self.level, self.bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        transformers_logging.set_verbosity(self.level)
        if self.bars:
            transformers_logging.enable_progress_bar()
