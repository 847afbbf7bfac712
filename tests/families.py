"""Tiny checkpoints of every family and head, saved as users save them, and what transformers computes of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from conftest import GROUP, LAYER, TINY

SIZE = {name: TINY[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")}
WAVLM = TINY | {"num_buckets": 32, "max_bucket_distance": 80}
CONFORMER = TINY | LAYER | {"conv_depthwise_kernel_size": 7, "hidden_act": "swish"}

#: By name: the class's prefix in transformers, the class's suffix, and its config.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hubert": ("Hubert", "Model", TINY | GROUP),
    "distilhubert": ("Hubert", "Model", TINY | GROUP | {"feat_proj_layer_norm": False}),
    "hubert-batch-norm": ("Hubert", "Model", TINY | GROUP | {"conv_pos_batch_norm": True}),
    "unispeech": ("UniSpeech", "Model", TINY | LAYER),
    "unispeech-sat": ("UniSpeechSat", "Model", TINY | GROUP),
    "wavlm": ("WavLM", "Model", WAVLM | GROUP),
    "wavlm-stable": ("WavLM", "Model", WAVLM | LAYER),
    "data2vec": (
        "Data2VecAudio",
        "Model",
        TINY | {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7},
    ),
    "conformer-relative": ("Wav2Vec2Conformer", "Model", CONFORMER | {"position_embeddings_type": "relative"}),
    "conformer-rotary": ("Wav2Vec2Conformer", "Model", CONFORMER | {"position_embeddings_type": "rotary"}),
    "mms": ("Wav2Vec2", "Model", TINY | LAYER | {"adapter_attn_dim": 8}),
    "w2v-bert": ("Wav2Vec2Bert", "Model", SIZE | {"conv_depthwise_kernel_size": 7}),
}
TDNN = {"tdnn_dim": [40, 40, 56], "tdnn_kernel": [5, 3, 1], "tdnn_dilation": [1, 2, 1], "xvector_output_dim": 24}
NAMED = {"id2label": {0: "neutral", 1: "happy", 2: "angry"}, "label2id": {"neutral": 0, "happy": 1, "angry": 2}}
WEIGHTED = {"use_weighted_layer_sum": True, "classifier_proj_size": 32}
HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classifier": ("Hubert", "ForSequenceClassification", TINY | GROUP | NAMED | {"classifier_proj_size": 32}),
    "classifier-weighted": ("Wav2Vec2", "ForSequenceClassification", TINY | LAYER | NAMED | WEIGHTED),
    "x-vector": ("WavLM", "ForXVector", WAVLM | GROUP | TDNN | WEIGHTED),
    "frames": ("Wav2Vec2", "ForAudioFrameClassification", TINY | LAYER | {"num_labels": 2} | WEIGHTED),
    "ctc-bert": ("Wav2Vec2Bert", "ForCTC", SIZE | {"conv_depthwise_kernel_size": 7, "vocab_size": 7}),
}
#: Checkpoints that take the waveform as it is.
RAW: dict[str, tuple[str, str, dict[str, Any]]] = {
    "raw": ("Wav2Vec2", "Model", TINY | GROUP),
    "raw-wavlm": ("WavLM", "Model", WAVLM | GROUP),
    "raw-gaps": ("Wav2Vec2", "Model", TINY | GROUP | {"conv_kernel": [3, 3, 3, 3, 3, 2, 2]}),
}
#: The first convolution forgets two of five samples.
GAPS = {"gaps": ("Wav2Vec2", "Model", TINY | LAYER | {"conv_kernel": [3, 3, 3, 3, 3, 2, 2]})}


def save(folder: Path, name: str) -> Path:
    """Save a tiny checkpoint by name, every weight of it at random."""
    prefix, suffix, config = (FAMILIES | HEADS | RAW | GAPS)[name]
    torch.manual_seed(0)
    model = getattr(transformers, prefix + suffix)(getattr(transformers, f"{prefix}Config")(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and value.numel() > 1 and value.min() == value.max():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(torch.exp(0.2 * noise) if key.endswith("running_var") else value + 0.2 * noise)
    model.save_pretrained(folder)
    if prefix == "Wav2Vec2Bert":
        transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder)
        if suffix == "ForCTC":
            tokens = ("<pad>", "<s>", "|", "e", ",", "'", "f0")
            (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    else:
        masked = "stable" in name
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=name not in RAW, return_attention_mask=masked)
        extractor.save_pretrained(folder)
    return folder


@contextmanager
def hooked(encoder: Any) -> Iterator[list[torch.Tensor]]:
    """What enters the first block of a reference and what leaves each."""
    seen: list[torch.Tensor] = []
    blocks = encoder.layers
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, named: seen.append((*args, *named.values())[0]), with_kwargs=True
        )
    ]
    hooks += [
        block.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in blocks
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class EmotionModel(transformers.Wav2Vec2PreTrainedModel):
    """The class that audeering's model card tells users to paste."""

    def __init__(self, config):
        super().__init__(config)
        self.wav2vec2 = transformers.Wav2Vec2Model(config)
        self.classifier = torch.nn.Module()
        self.classifier.dense = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier.out_proj = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_values):
        hidden = self.wav2vec2(input_values)[0].mean(dim=1)
        return hidden, self.classifier.out_proj(torch.tanh(self.classifier.dense(hidden)))


class Reference:
    """A user's script around a saved checkpoint: one recording at a time."""

    def __init__(self, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder)
        self.model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
        self.extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)

    @torch.inference_mode()
    def __call__(self, waveform: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """``frames`` valid frames of layers 0 … L (L + 1, T, D), of the last hidden state (T, D), and the answer."""
        inputs = self.extractor(waveform, sampling_rate=16000, return_tensors="pt")
        with hooked(self.model.base_model.encoder) as layers:
            last = self.model.base_model(**inputs).last_hidden_state
        answer = self.model(**inputs)
        return torch.stack([layer[0, :frames] for layer in layers]).numpy(), last[0, :frames].numpy(), answer
