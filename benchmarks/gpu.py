"""Everything that embeds speech on an NVIDIA GPU, side by side. Printed, and written to results/gpu.{json,md}.

    python benchmarks/gpu.py                                    # base and large, about fifteen minutes on one H200
    python benchmarks/gpu.py --quick --models base              # fewer peers, rows and rounds, about four minutes
    python benchmarks/gpu.py --device cpu --output FOLDER       # the same rows where there is no GPU, with less audio

It needs a GPU, PyTorch with CUDA, transformers, this package with onnxruntime-gpu, and no network: weights are seeded.
Nothing may run beside it. Results are written after each row, so that a run cut short keeps what it had.

Warm forward passes of batches, from samples in host memory to vectors in host memory, are taken in rounds in which
every peer has one turn. Beside them stands what the GPU multiplies in large square matrices: its peak, measured.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
import numpy as np
import numpy.typing as npt
import seeded
import soundfile
from ceilings import operations
from corpus import lognormal
from cpu import MODELS
from cpu_rows import in_rounds, run
from machine import facts
from workers import Worker, WorkerError

from w2v_export.signals import speech_like
from w2v_models import Bundle
from w2v_models.manifest import EMBEDDING, FRAME_LENGTHS, LAST_HIDDEN_STATE
from w2v_runtime.embedding.parity import difference
from w2v_runtime.threads.processors import available

Array = npt.NDArray[np.float32]
RATE = 16000
#: Seconds of a turn at least.
TURN = 0.5
_EMBED = "from w2v_runtime.commands.embed import main; main()"
_EXPORT = "from w2v_export.cli import main; main()"


@dataclass(frozen=True)
class Scale:
    """How much is measured: utterances of 10 s in the batches, rounds, files, and how often they are embedded."""

    batches: tuple[int, ...]
    rounds: int
    files: int
    copies: int
    square: int


SCALES = {
    "cuda": Scale((1, 8, 48), 5, 450, 8, 8192),
    "quick": Scale((8, 48), 2, 450, 4, 8192),
    "cpu": Scale((1, 2), 1, 8, 2, 1024),
}
#: What a quick run leaves out.
_SLOW_TO_BEGIN = ("torch.compile fp16", "transformers fp16, attention written out", "transformers bf16")


@functools.cache
def waveforms(row: str) -> list[Array]:
    """The utterances of a row: ``48 × 10 s``, or of many lengths in ``mixed 32``."""
    if row.startswith("mixed"):
        count = int(row.split()[1])
        lengths = np.linspace(2, 16, count) if count > 4 else np.linspace(1, 4, count)
    else:
        lengths = np.full(int(row.split()[0]), 10.0)
    return [speech_like(round(length * RATE), RATE, seed=i % 8) for i, length in enumerate(lengths)]


class TorchPeer:
    """transformers: a padded batch, with an attention mask where the model has one, pooled on the device."""

    def __init__(self, folder: Path, device: str, precision: str, attention: str, compiled: bool) -> None:
        import torch
        from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        self._torch, self._device = torch, device
        self._extract = Wav2Vec2FeatureExtractor.from_pretrained(folder / seeded.CHECKPOINT)
        path = folder / seeded.CHECKPOINT
        model = Wav2Vec2Model.from_pretrained(path, attn_implementation=attention).eval().to(device)
        self._dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        self._model: Any = model.to(self._dtype)
        self._lengths = model._get_feat_extract_output_lengths
        self._run: Any = torch.compile(self._model) if compiled else self._model

    def embed(self, row: str, level: str) -> list[Array]:
        """The pooled vectors of a row, or the frames of each utterance."""
        return self._embed(waveforms(row), level)

    def alone(self, row: str) -> list[Array]:
        """The frames of each utterance of a row, embedded alone."""
        return [self._embed([waveform], "frame")[0] for waveform in waveforms(row)]

    def seconds(self, row: str, level: str) -> float:
        """Seconds of a batch: the median of a turn."""
        audio = waveforms(row)
        return _turn(lambda: self._embed(audio, level))

    def _embed(self, audio: list[Array], level: str) -> list[Array]:
        torch = self._torch
        inputs = self._extract(audio, sampling_rate=RATE, padding=True, return_tensors="pt")
        values = inputs.input_values.to(self._device, self._dtype, non_blocking=True)
        mask = inputs.attention_mask.to(self._device) if self._extract.return_attention_mask else None
        with torch.inference_mode():
            frames = self._run(values, attention_mask=mask).last_hidden_state
            lengths = self._lengths(torch.tensor([len(waveform) for waveform in audio])).to(self._device)
            if level == "frame":
                frames = frames.float().cpu().numpy()
                return [row[:length] for row, length in zip(frames, lengths.tolist(), strict=True)]
            valid = torch.arange(frames.shape[1], device=self._device)[None, :, None] < lengths[:, None, None]
            pooled = torch.where(valid, frames.float(), 0.0).sum(1) / lengths[:, None]
            return list(pooled.cpu().numpy())


class OurPeer:
    """This package's bundle."""

    def __init__(self, folder: Path, device: str, precision: str) -> None:
        from w2v_runtime import Embedder

        self._embedder = Embedder(folder / seeded.BUNDLE, device=device, precision=precision)

    def embed(self, row: str, level: str) -> list[Array]:
        """The pooled vectors of a row, or the frames of each utterance."""
        return self._embed(waveforms(row), level)

    def seconds(self, row: str, level: str) -> float:
        """Seconds of a batch: the median of a turn."""
        audio = waveforms(row)
        return _turn(lambda: self._embed(audio, level))

    def _embed(self, audio: list[Array], level: str) -> list[Array]:
        if level == "utterance":
            return list(self._embedder.forward(audio, [EMBEDDING])[0])
        frames, lengths = self._embedder.forward(audio, [LAST_HIDDEN_STATE, FRAME_LENGTHS])
        return [row[:length] for row, length in zip(frames, lengths, strict=True)]

    def engine_alone(self, folder: Path, copies: int) -> float:
        """Seconds of the engine over the files' samples, decoded and batched beforehand as ``w2v-embed`` does it."""
        from w2v_runtime.embedding.batching import Pool
        from w2v_runtime.embedding.corpus import BATCH_SECONDS

        engine = self._embedder.engine
        pool = Pool(round(BATCH_SECONDS[engine.device] * RATE), longest_first=True)
        for path in sorted(folder.glob("*.wav")):
            samples = soundfile.read(path, dtype="float32")[0]
            pool.add(len(samples), samples)
        batches = []
        while len(pool):
            batches.append(pool.take())
        run_batch = partial(self._embedder.forward, outputs=[EMBEDDING])
        run_batch(batches[0])
        start = time.perf_counter()
        with ThreadPoolExecutor(engine.runs) as threads:
            list(threads.map(run_batch, batches * copies))
        return time.perf_counter() - start


class Peak:
    """What the device multiplies in square matrices, by PyTorch."""

    def __init__(self, device: str, size: int) -> None:
        self._device, self._size = device, size

    def measure(self, precision: str) -> float:
        """Operations a second: the fastest of several turns."""
        import torch

        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
        a, b = (torch.randn(self._size, self._size, device=self._device).to(dtype) for _ in range(2))

        def multiply() -> None:
            for _ in range(10):
                torch.matmul(a, b)
            if self._device != "cpu":
                torch.cuda.synchronize()

        multiply()
        return 10 * 2 * self._size**3 / min(_turn(multiply) for _ in range(3))

    def name(self) -> str:
        """The device in its maker's words."""
        import torch

        return "the processor" if self._device == "cpu" else str(torch.cuda.get_device_name(self._device))

    def count(self) -> int:
        """GPUs that are here."""
        import torch

        return int(torch.cuda.device_count())


def _turn(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    while sum(times) < TURN or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peers(device: str, quick: bool) -> dict[str, tuple[Any, ...]]:
    """What is compared, by name: the class and the arguments behind the model's folder. The first is the baseline."""
    found: dict[str, tuple[Any, ...]] = {gpu_report.BASELINE: (TorchPeer, device, "fp32", "sdpa", False)}
    if device == "cpu":
        return found | {f"w2v-onnx {precision}": (OurPeer, device, precision) for precision in ("fp32", "fp16")}
    found |= {
        "transformers tf32": (TorchPeer, device, "tf32", "sdpa", False),
        "transformers bf16": (TorchPeer, device, "bf16", "sdpa", False),
        "transformers fp16, attention written out": (TorchPeer, device, "fp16", "eager", False),
        "transformers fp16": (TorchPeer, device, "fp16", "sdpa", False),
        "torch.compile fp16": (TorchPeer, device, "fp16", "sdpa", True),
    }
    found |= {f"w2v-onnx {precision}": (OurPeer, device, precision) for precision in ("fp32", "tf32", "fp16")}
    return {name: peer for name, peer in found.items() if not (quick and name in _SLOW_TO_BEGIN)}


def prepare(model: str, folder: Path) -> None:
    """The seeded checkpoint, and the bundle with its fp16 graph."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / seeded.CHECKPOINT).exists():
        subprocess.run([sys.executable, seeded.__file__, seeded.CHECKPOINT, model, folder], check=True)
    if not (folder / seeded.BUNDLE).exists():
        options = ("--random-weights", "--precision", "fp32,fp16", "--output", folder / seeded.BUNDLE)
        subprocess.run([sys.executable, "-c", _EXPORT, "--model", model, *options], check=True)


def make_files(folder: Path, count: int) -> Path:
    """WAV files at 16 kHz with log-normal durations, 4 s in the mean."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for i, seconds in enumerate(lognormal(count, 3.5)):
            soundfile.write(folder / f"{i:04}.wav", speech_like(round(seconds * RATE), RATE, seed=i % 50), RATE)
    return folder


def measure_files(folder: Path, files: Path, device: str, precision: str, copies: int) -> dict[str, float]:
    """Whole processes over the files once and ``copies`` times, and the engine alone over as many."""
    seconds = sum(float(soundfile.info(path).duration) for path in files.glob("*.wav"))
    with tempfile.TemporaryDirectory() as place:
        again = Path(place) / "again"
        for i in range(copies):
            (again / str(i)).mkdir(parents=True)
            for path in files.glob("*.wav"):
                (again / str(i) / path.name).symlink_to(path)
        walls = []
        for source in (files, again):
            options = ("-m", folder / seeded.BUNDLE, "-o", Path(place) / "out.npz", "--overwrite", "--no-progress")
            words = (source, *options, "--device", device, "--precision", precision)
            walls.append(run([sys.executable, "-c", _EMBED, *map(str, words)])[0])
    with Worker(OurPeer, folder, device, precision) as worker:
        alone = worker.ask("engine_alone", files, copies)
    return {"audio": seconds, "copies": copies, "once": walls[0], "again": walls[1], "alone": alone}


def measure(name: str, work: Path, device: str, quick: bool, results: dict[str, Any], save: Callable[[], None]) -> None:
    """All rows of a model, into ``results``; ``save`` is called after each."""
    folder, scale = work / name, SCALES["quick" if quick and device == "cuda" else device]
    prepare(MODELS[name], folder)
    files = make_files(work / f"files-{scale.files}", scale.files)
    architecture = Bundle.open(folder / seeded.BUNDLE).manifest.architecture
    result = results["models"][name] = {"rows": {}, "accuracy": {}, "files": {}, "skipped": {}}
    skipped: dict[str, str] = result["skipped"]
    mixed = f"mixed {max(scale.batches[-1] // 2, 3)}"
    rows = [(f"{count} × 10 s", "utterance") for count in scale.batches]
    rows += [(f"{scale.batches[-2]} × 10 s", "frame"), (mixed, "utterance")]
    workers: dict[str, Worker] = {}
    try:
        for peer, (kind, *arguments) in peers(device, quick).items():
            try:
                workers[peer] = Worker(kind, folder, *arguments)
            except WorkerError as error:
                skipped[peer] = str(error)
        expected = workers[gpu_report.BASELINE].ask("alone", mixed)
        for peer, worker in workers.items():
            frames, pooled = (worker.ask("embed", mixed, level) for level in ("frame", "utterance"))
            each = [difference(mine, theirs) for mine, theirs in zip(frames, expected, strict=True)]
            means = np.stack([theirs.mean(0) for theirs in expected])
            result["accuracy"][peer] = {
                "frame_cosine": min(cosine for _, _, cosine in each),
                "pooled_cosine": difference(np.stack(pooled), means)[2],
                "difference": max(largest for largest, _, _ in each),
            }
        save()
        for row, level in rows:
            turns = {p: partial(w.ask, "seconds", row, level) for p, w in workers.items() if p not in skipped}
            audio = waveforms(row)
            result["rows"][f"{row}, {'pooled' if level == 'utterance' else 'frames'}"] = {
                "audio": sum(map(len, audio)) / RATE,
                "operations": sum(operations(architecture, len(waveform)) for waveform in audio),
                "seconds": in_rounds(turns, scale.rounds, skipped),
            }
            save()
    finally:
        for worker in workers.values():
            worker.close()
    devices = [device] if results["gpus"] < 2 else [device, ",".join(f"cuda:{i}" for i in range(results["gpus"]))]
    for place in devices:
        result["files"][place] = measure_files(folder, files, place, "fp16", scale.copies)
        save()


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer peers, rows and rounds")
    parser.add_argument("--models", default=",".join(MODELS), help="of base,large; default both")
    parser.add_argument("--output", type=Path, default=gpu_report.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and options.output == gpu_report.RESULTS:
        parser.error("figures of a processor do not go to results/: give another folder with --output")
    work = Path(os.environ.get("W2V_BENCH_DIR", Path(tempfile.gettempdir()) / "w2v-bench")).resolve() / "gpu"
    work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with Worker(Peak, options.device, SCALES[options.device].square) as worker:
        precisions = ("fp32",) if options.device == "cpu" else ("fp32", "tf32", "bf16", "fp16")
        results: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/gpu.py", *arguments]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {"device": worker.ask("name")} | facts(available()),
            "gpus": worker.ask("count"),
            "peaks": {precision: worker.ask("measure", precision) for precision in precisions},
            "models": {},
        }

    def save() -> None:
        text = json.dumps(results, indent=2, ensure_ascii=False)
        (options.output / "gpu.json").write_text(text + "\n", encoding="utf-8")
        gpu_report.write(options.output)

    save()
    for name in options.models.split(","):
        measure(name, work, options.device, options.quick, results, save)
    print((options.output / "gpu.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
