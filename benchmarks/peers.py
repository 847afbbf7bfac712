"""What embeds a waveform on this machine: transformers, torch.compile, optimum's export, CTranslate2, and this package.

    python benchmarks/peers.py PEER FOLDER THREADS OUT.npz AUDIO    # files in, embeddings out, as a script does it

Each is opened by a function that imports what it needs and no more, so that a process pays for its own peer alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from seeded import BUNDLE, CHECKPOINT, CTRANSLATE2, OPTIMUM

Array = npt.NDArray[np.float32]
#: A waveform (samples,) at 16 kHz and a level: ``utterance`` gives the mean over time (D,), ``frame`` frames (T, D).
Embed = Callable[[Array, str], Array]
#: Opens a peer on a model's folder, with so many threads.
Open = Callable[[Path, int], Embed]

RATE = 16000
#: Seconds of a turn at least: short forward passes are repeated in it.
TURN = 0.5


class UnavailableError(Exception):
    """A peer cannot be had for a model; the message is what stands in the table."""


def open_transformers(folder: Path, threads: int, precision: str, compiled: bool = False) -> Embed:
    """The recipe: feature extractor, model, mean over time."""
    import torch
    from transformers import Wav2Vec2Model

    torch.set_num_threads(threads)
    extract = _feature_extractor(folder)
    model = Wav2Vec2Model.from_pretrained(folder / CHECKPOINT, attn_implementation="sdpa").eval()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model.to(dtype)
    run: Any = torch.compile(model, dynamic=False) if compiled else model

    @torch.inference_mode()
    def embed(waveform: Array, level: str) -> Array:
        frames = run(torch.from_numpy(extract(waveform)).to(dtype)).last_hidden_state[0].float()
        result: Array = (frames.mean(dim=0) if level == "utterance" else frames).numpy()
        return result

    return embed


def open_optimum(folder: Path, threads: int) -> Embed:
    """The export of optimum on ONNX Runtime."""
    import onnxruntime

    extract = _feature_extractor(folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / OPTIMUM / "model.onnx", options, providers=["CPUExecutionProvider"])

    def embed(waveform: Array, level: str) -> Array:
        (frames,) = session.run(["last_hidden_state"], {"input_values": extract(waveform)})
        return _pooled(frames[0], level)

    return embed


def open_ctranslate2(folder: Path, threads: int, precision: str) -> Embed:
    """CTranslate2's Wav2Vec2, which knows the architecture of the large models only."""
    import ctranslate2

    if not (folder / CTRANSLATE2[precision]).exists():
        raise UnavailableError("does not know this architecture")
    extract = _feature_extractor(folder)
    compute_type = {"fp32": "float32", "int8": "int8"}[precision]
    model = ctranslate2.models.Wav2Vec2(
        str(folder / CTRANSLATE2[precision]), device="cpu", compute_type=compute_type, intra_threads=threads
    )

    def embed(waveform: Array, level: str) -> Array:
        features = ctranslate2.StorageView.from_array(extract(waveform)[None])
        return _pooled(np.array(model.encode(features, to_cpu=True))[0], level)

    return embed


def open_ours(folder: Path, threads: int, device: str, precision: str) -> Embed:
    """This package's bundle."""
    from w2v_runtime import Embedder

    embedder = Embedder(folder / BUNDLE, device=device, precision=precision, threads=threads)
    return lambda waveform, level: embedder.embed((waveform, RATE), level=level).values


def _feature_extractor(folder: Path) -> Callable[[Array], Array]:
    """The feature extractor of transformers: (samples,) → (1, samples)."""
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder / CHECKPOINT)

    def extract(waveform: Array) -> Array:
        values: Array = extractor(waveform, sampling_rate=RATE, return_tensors="np").input_values
        return values

    return extract


def _pooled(frames: Array, level: str) -> Array:
    return frames.mean(axis=0) if level == "utterance" else frames


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


def _torch(precision: str, compiled: bool = False) -> Peer:
    opened = partial(open_transformers, precision=precision, compiled=compiled)
    return Peer(precision, opened, compiled=compiled, full=compiled)


def _ours(device: str, precision: str) -> Peer:
    return Peer(
        precision,
        partial(open_ours, device=device, precision=precision),
        ("--device", device, "--precision", precision),
    )


#: What every other peer is compared with.
BASELINE = "transformers fp32"
PEERS = {
    BASELINE: _torch("fp32"),
    "transformers bf16": _torch("bf16"),
    "torch.compile fp32": _torch("fp32", compiled=True),
    "torch.compile bf16": _torch("bf16", compiled=True),
    "optimum, ONNX Runtime fp32": Peer("fp32", open_optimum),
    "CTranslate2 fp32": Peer("fp32", partial(open_ctranslate2, precision="fp32"), full=True),
    "CTranslate2 int8": Peer("int8", partial(open_ctranslate2, precision="int8")),
    "w2v-onnx cpu fp32": _ours("cpu", "fp32"),
    "w2v-onnx cpu int8": _ours("cpu", "int8"),
    "w2v-onnx openvino fp32": _ours("openvino", "fp32"),
    "w2v-onnx openvino bf16": _ours("openvino", "bf16"),
}


class Turns:
    """An opened peer that takes turns."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self._embed = PEERS[name].open(folder, threads)

    def seconds(self, waveform: Array) -> float:
        """Seconds of one forward pass, from samples to the pooled vector: the median of a turn."""
        times: list[float] = []
        while sum(times) < TURN:
            start = time.perf_counter()
            self._embed(waveform, "utterance")
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def embed(self, waveform: Array, level: str) -> Array:
        """What the peer computes."""
        return self._embed(waveform, level)


def embed_files(name: str, folder: Path, threads: int, output: Path, audio: Path) -> None:
    """Embed a file, or the WAV files of a folder one at a time, and store the vectors."""
    import soundfile

    embed = PEERS[name].open(folder, threads)
    paths = sorted(audio.glob("*.wav")) if audio.is_dir() else [audio]
    waveforms = (soundfile.read(path, dtype="float32")[0] for path in paths)
    embeddings = np.stack([embed(waveform, "utterance") for waveform in waveforms])
    np.savez(output, paths=[str(path) for path in paths], embeddings=embeddings)


if __name__ == "__main__":
    embed_files(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
