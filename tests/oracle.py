"""What a saved checkpoint answers, by transformers alone: in float64, one recording at a time, whole or in windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

from families import EmotionModel, hooked

Array = np.ndarray


class Answer(NamedTuple):
    """Layers 0 … L (L + 1, T, D), the last hidden state (T, D) and the head's columns, (K,) or (T, K), or None."""

    layers: Array
    last: Array
    columns: Array | None


class Oracle:
    """Judges in float64, in which no rounding of ours or of PyTorch's is left."""

    def __init__(self, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        (name,) = config.architectures
        kind = EmotionModel if name == "EmotionModel" else getattr(transformers, name)
        self.model = kind.from_pretrained(folder).eval().double()
        self.extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        self.bert = config.model_type == "wav2vec2-bert"
        self.stride = 320 if self.bert else math.prod(config.conv_stride)

    @torch.inference_mode()
    def __call__(self, waveform: Array, window: float | None = None, context: float = 0.0) -> Answer:
        """Answer for a waveform (samples,) at 16 kHz; in windows the encoder sees one of them at a time.

        ``window`` and ``context`` are in seconds.
        """
        inputs = self.inputs(waveform)
        base = self.model.base_model
        frames = int(inputs["attention_mask"].sum()) if self.bert else self.frames(len(waveform))
        windows, split = [(0, frames, 0, frames)], nullcontext()
        if window is not None:
            size, more = round(window * 16000 / self.stride), round(context * 16000 / self.stride)
            windows = [
                (first, min(first + size, frames), max(0, first - more), min(first + size + more, frames))
                for first in range(0, frames, size)
            ]
            split = windowed(base.encoder, windows)
        with split:
            with hooked(base.encoder) as seen:
                last = base(**inputs).last_hidden_state[0, :frames]
            columns = self.columns(inputs, frames)
        count = len(seen) // len(windows)
        layers = [
            torch.cat([seen[count * w + layer][0, a - c : b - c] for w, (a, b, c, _) in enumerate(windows)])
            for layer in range(count)
        ]
        return Answer(torch.stack(layers).numpy(), last.numpy(), None if columns is None else columns.numpy())

    def inputs(self, waveform: Array) -> dict[str, torch.Tensor]:
        """What the model takes, normalised in float64 where the extractor normalises."""
        if self.bert:
            made = self.extractor(waveform, sampling_rate=16000, return_tensors="pt")
            return {"input_features": made["input_features"].double(), "attention_mask": made["attention_mask"]}
        exact = waveform.astype(np.float64)
        if self.extractor.do_normalize:
            exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-7)
        return {"input_values": torch.from_numpy(exact)[None]}

    def frames(self, samples: int) -> int:
        """Frames of a waveform."""
        for kernel, stride in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def columns(self, inputs: dict[str, torch.Tensor], frames: int) -> torch.Tensor | None:
        """The head's answer: (K,), or (T, K) of a head that answers each frame; None without a head."""
        if self.model is self.model.base_model:
            return None
        answer = self.model(**inputs)
        if isinstance(self.model, EmotionModel):
            return answer[1][0]
        columns = answer.embeddings[0] if hasattr(answer, "embeddings") else answer.logits[0]
        return columns[:frames] if columns.ndim == 2 else columns


@contextmanager
def windowed(encoder: Any, windows: list[tuple[int, int, int, int]]) -> Iterator[None]:
    """Let an encoder see the frames begin … end of each window (first, last, begin, end) and keep first … last."""
    whole = encoder.forward

    def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> BaseModelOutput:
        parts = []
        for first, last, begin, end in windows:
            output = whole(hidden[:, begin:end].clone(), output_hidden_states=True)
            parts.append([x[:, first - begin : last - begin] for x in (output[0], *output.hidden_states)])
        joined, *states = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return BaseModelOutput(last_hidden_state=joined, hidden_states=tuple(states))

    encoder.forward = forward
    try:
        yield
    finally:
        del encoder.forward
