"""What embeds waveforms: transformers, torch.compile, optimum's export, CTranslate2, and this package.

    python benchmarks/peers.py PEER FOLDER THREADS OUT.npz AUDIO    # files in, embeddings out, as a script does it

Each is opened by a function that imports what it needs and no more, so that a process pays for its own peer alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
#: A batch of waveforms (samples,) at 16 kHz and a level: ``utterance`` gives the mean over time (D,) of each, ``frame``
#: frames (T, D).
Embed = Callable[[Sequence[Array], str], list[Array]]
#: Opens a peer on a model's folder, with so many threads.
Open = Callable[[Path, int], Embed]

RATE = 16000
#: The forms of a model in its folder.
CHECKPOINT, OPTIMUM, BUNDLE, FP16_BUNDLE = "checkpoint", "optimum", "bundle", "bundle-fp16"
#: CTranslate2's forms by the precision of the weights in them.
CTRANSLATE2 = {"fp32": "ctranslate2-fp32", "int8": "ctranslate2-int8"}
#: Seconds of a turn at least: short forward passes are repeated in it.
TURN = 0.5


def open_transformers(
    folder: Path, threads: int, precision: str, device: str = "cpu", attention: str = "sdpa", compiled: bool = False
) -> Embed:
    """The recipe: feature extractor, model, mean over time; batches are padded, and masked if the model has masks."""
    import torch
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder / CHECKPOINT)
    model = Wav2Vec2Model.from_pretrained(folder / CHECKPOINT, attn_implementation=attention).eval()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    model.to(device, dtype)
    run: Any = torch.compile(model, dynamic=False if device == "cpu" else None) if compiled else model

    @torch.inference_mode()
    def embed(audio: Sequence[Array], level: str) -> list[Array]:
        inputs = extractor(list(audio), sampling_rate=RATE, padding=True, return_tensors="pt")
        values = inputs.input_values.to(device, dtype, non_blocking=True)
        masked = len(audio) > 1 and extractor.return_attention_mask
        mask = inputs.attention_mask.to(device) if masked else None
        frames = run(values, attention_mask=mask).last_hidden_state.float()
        lengths = model._get_feat_extract_output_lengths(torch.tensor([len(waveform) for waveform in audio]))
        if level == "frame":
            return [row[:length] for row, length in zip(frames.cpu().numpy(), lengths.tolist(), strict=True)]
        if len(audio) == 1:
            return list(frames.mean(dim=1).cpu().numpy())
        counts = lengths.to(device)[:, None]
        valid = torch.arange(frames.shape[1], device=device) < counts
        return list((torch.where(valid[:, :, None], frames, 0.0).sum(dim=1) / counts).cpu().numpy())

    return embed


def open_optimum(folder: Path, threads: int) -> Embed:
    """The export of optimum on ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / OPTIMUM / "model.onnx", options, providers=["CPUExecutionProvider"])
    return _one_by_one(folder, lambda values: session.run(["last_hidden_state"], {"input_values": values})[0])


def open_ctranslate2(folder: Path, threads: int, precision: str) -> Embed:
    """CTranslate2's Wav2Vec2, which knows the architecture of the large models only."""
    import ctranslate2

    path = folder / CTRANSLATE2[precision]
    if not path.exists():
        raise ValueError("does not know this architecture")
    compute_type = {"fp32": "float32", "int8": "int8"}[precision]
    model = ctranslate2.models.Wav2Vec2(str(path), device="cpu", compute_type=compute_type, intra_threads=threads)

    def run(values: Array) -> Array:
        return np.array(model.encode(ctranslate2.StorageView.from_array(values[None]), to_cpu=True))

    return _one_by_one(folder, run)


def _one_by_one(folder: Path, run: Callable[[Array], Array]) -> Embed:
    """What ``run`` (1, samples) → (1, T, D) makes of each waveform alone, behind the feature extractor."""
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder / CHECKPOINT)

    def embed(audio: Sequence[Array], level: str) -> list[Array]:
        inputs = [extractor(waveform, sampling_rate=RATE, return_tensors="np").input_values for waveform in audio]
        frames = [run(values)[0] for values in inputs]
        return [each.mean(axis=0) for each in frames] if level == "utterance" else frames

    return embed


def open_ours(folder: Path, threads: int, device: str, precision: str, bundle: str = BUNDLE) -> Embed:
    """This package's bundle."""
    from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE
    from w2v_runtime import Embedder

    embedder = Embedder(folder / bundle, device=device, precision=precision, threads=threads)

    def embed(audio: Sequence[Array], level: str) -> list[Array]:
        if len(audio) == 1:
            return [embedder.embed((audio[0], RATE), level=level).values]
        if level == "utterance":
            return list(embedder.forward(audio, [EMBEDDING])[0])
        frames, lengths = embedder.forward(audio, [LAST_HIDDEN_STATE, FRAME_LENGTHS])
        return [row[:length] for row, length in zip(frames, lengths, strict=True)]

    return embed


@dataclass(frozen=True)
class Peer:
    """A way to embed: what it computes in, how it is opened, and the words of ``w2v-embed`` where that is ours.

    ``compiled``: it takes a minute to compile, or a quarter with its cache, so it has a part in warm rows only.
    ``full``: it has a part in full runs only.
    """

    precision: str
    open: Open
    options: tuple[str, ...] = ()
    compiled: bool = False
    full: bool = False


def _torch(precision: str, full: bool = False, **options: Any) -> Peer:
    opened = partial(open_transformers, precision=precision, **options)
    return Peer(precision, opened, compiled="compiled" in options, full=full)


def _ours(device: str, precision: str, bundle: str = BUNDLE) -> Peer:
    opened = partial(open_ours, device=device, precision=precision, bundle=bundle)
    return Peer(precision, opened, ("--device", device, "--precision", precision))


#: What every other peer is compared with.
BASELINE = "transformers fp32"
#: On a processor.
PEERS = {
    BASELINE: _torch("fp32"),
    "transformers bf16": _torch("bf16"),
    "torch.compile fp32": _torch("fp32", full=True, compiled=True),
    "torch.compile bf16": _torch("bf16", full=True, compiled=True),
    "optimum, ONNX Runtime fp32": Peer("fp32", open_optimum),
    "CTranslate2 fp32": Peer("fp32", partial(open_ctranslate2, precision="fp32"), full=True),
    "CTranslate2 int8": Peer("int8", partial(open_ctranslate2, precision="int8")),
    "w2v-onnx cpu fp32": _ours("cpu", "fp32"),
    "w2v-onnx cpu int8": _ours("cpu", "int8"),
    "w2v-onnx openvino fp32": _ours("openvino", "fp32"),
    "w2v-onnx openvino bf16": _ours("openvino", "bf16"),
}
#: On a GPU.
GPU_PEERS = {
    BASELINE: _torch("fp32", device="cuda"),
    "transformers tf32": _torch("tf32", device="cuda"),
    "transformers bf16": _torch("bf16", full=True, device="cuda"),
    "transformers fp16, attention written out": _torch("fp16", full=True, device="cuda", attention="eager"),
    "transformers fp16": _torch("fp16", device="cuda"),
    "torch.compile fp16": _torch("fp16", full=True, device="cuda", compiled=True),
    **{f"w2v-onnx {precision}": _ours("cuda", precision, FP16_BUNDLE) for precision in ("fp32", "tf32", "fp16")},
}
#: On a processor, where the rows of a GPU are tried.
TRIAL_PEERS = {
    BASELINE: _torch("fp32"),
    **{f"w2v-onnx {precision}": _ours("cpu", precision, FP16_BUNDLE) for precision in ("fp32", "fp16")},
}


class Turns:
    """An opened peer that takes turns."""

    def __init__(self, opened: Open, folder: Path, threads: int) -> None:
        self._embed = opened(folder, threads)

    def seconds(self, audio: Sequence[Array], level: str) -> float:
        """Seconds of one forward pass, from samples to vectors in the host's memory: the median of a turn."""
        times: list[float] = []
        while sum(times) < TURN:
            start = time.perf_counter()
            self._embed(audio, level)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def embed(self, audio: Sequence[Array], level: str) -> list[Array]:
        """What the peer computes."""
        return self._embed(audio, level)


def embed_files(name: str, folder: Path, threads: int, output: Path, audio: Path) -> None:
    """Embed a file, or the WAV files below a folder one at a time, and store the vectors."""
    import soundfile

    embed = PEERS[name].open(folder, threads)
    paths = sorted(audio.rglob("*.wav")) if audio.is_dir() else [audio]
    waveforms = (soundfile.read(path, dtype="float32")[0] for path in paths)
    embeddings = np.stack([embed([waveform], "utterance")[0] for waveform in waveforms])
    np.savez(output, paths=[str(path) for path in paths], embeddings=embeddings)


if __name__ == "__main__":
    embed_files(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
