"""int8 end to end: weights made hard on purpose, what the gate decides, batches, pauses, families and windows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import families  # noqa: E402
from conftest import save_checkpoint, speech  # noqa: E402
from w2v_export import export_bundle  # noqa: E402
from w2v_export.checkpoint import Checkpoint, load  # noqa: E402
from w2v_export.graph.quantised import quantisable  # noqa: E402
from w2v_export.precision import int8  # noqa: E402
from w2v_export.references import reference_outputs  # noqa: E402
from w2v_models.errors import BundleError, ParityError  # noqa: E402
from w2v_models.manifest import EMBEDDING, LAST_HIDDEN_STATE, LENGTHS, WAVEFORM  # noqa: E402
from w2v_models.tolerances import TOLERANCES  # noqa: E402
from w2v_runtime import Embedder  # noqa: E402
from w2v_runtime.embedding.parity import Reference, compare  # noqa: E402
from w2v_runtime.embedding.windows import Windowing  # noqa: E402

BOTH = ("fp32", "int8")
FRAMES, POOLED = (TOLERANCES["int8"][name].min_cosine for name in ("frames", "pooled"))
CHANNELS = (5, 29)


def stick_out(model: Any, factor: float) -> None:
    """Let two channels of every attention's values be ``factor`` times as large as they were.

    What the model computes stays the same: the output's weights are divided by as much. Trained transformers have such
    channels (Dettmers et al. 2022, "LLM.int8()").
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(".attention"):
                for channel in CHANNELS:
                    module.v_proj.weight[channel] *= factor
                    module.v_proj.bias[channel] *= factor
                    module.out_proj.weight[:, channel] /= factor


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Callable[[float], Path]:
    """The tiny large model, with channels that stick out by a factor."""
    made: dict[float, Path] = {}

    def checkpoint(factor: float) -> Path:
        if factor not in made:
            import transformers

            folder = save_checkpoint(tmp_path_factory.mktemp("hard") / "checkpoint", "large")
            model = transformers.Wav2Vec2Model.from_pretrained(folder)
            stick_out(model, factor)
            model.save_pretrained(folder)
            made[factor] = folder
        return made[factor]

    return checkpoint


@pytest.fixture(scope="module")
def exported(checkpoints, hard, tmp_path_factory) -> Callable[[str | float], Path]:
    """Bundles of both precisions by the kind of checkpoint, or by the factor of one that is hard; made once."""
    made: dict[str | float, Path] = {}

    def bundle(kind: str | float) -> Path:
        if kind not in made:
            checkpoint = hard(kind) if isinstance(kind, float) else checkpoints(kind)
            made[kind] = export_bundle(checkpoint, tmp_path_factory.mktemp("int8") / "bundle", precision=BOTH).folder
        return made[kind]

    return bundle


def references_of(checkpoint: Checkpoint) -> list[Reference]:
    return reference_outputs(checkpoint, [], lambda done, total: None)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def rounded_whole(checkpoint: Checkpoint) -> Any:
    """A checkpoint's graph with every product in int8, as it comes."""
    graph = checkpoint.graph()
    int8.turn_channels_last(graph)
    int8.install(graph, {name: int8.round_product(product, None) for name, product in quantisable(graph).items()})
    return graph


@pytest.mark.parametrize("factor", [1e3, 1e5])
def test_channels_that_stick_out_pass_the_gate_only_with_its_help(hard, exported, factor):
    """Rounded as they come they miss it; evened out, or left in fp32 where that is too little, the bundle holds it."""
    checkpoint = load(str(hard(factor)))
    references = references_of(checkpoint)
    plain = int8.worst_cosines(
        rounded_whole(checkpoint), int8.comparable(references, "int8", checkpoint.architecture.sample_rate)
    )
    assert plain["pooled"] < POOLED, "these weights are not hard"
    embedder = Embedder(exported(factor), device="cpu", precision="int8")
    record = embedder.manifest.precisions["int8"]
    hurt = [name for name in quantisable(checkpoint.graph()) if name.endswith("attention.output")]
    assert len(hurt) == 3
    helped = record.kept + record.smoothed
    assert [name for name in hurt if name not in helped] == []
    assert set(record.kept).isdisjoint(record.smoothed)
    assert len(record.kept) <= len(quantisable(checkpoint.graph())) // 2
    rows = compare(embedder, references)
    assert [row for row in rows if not row.within("int8")] == []


def test_what_stays_in_fp32_is_what_harms_most_and_no_more(hard):
    """One fewer would miss the gate; what is kept does more harm alone than what is not."""
    checkpoint = load(str(hard(1e5)))
    references = int8.comparable(references_of(checkpoint), "int8", checkpoint.architecture.sample_rate)
    exact = quantisable(checkpoint.graph())
    rounded = {name: int8.round_product(product, None) for name, product in exact.items()}
    graph = checkpoint.graph()
    int8.turn_channels_last(graph)
    by_harm = sorted(exact, key=lambda name: not name.endswith("attention.output"))
    exact = quantisable(graph)
    kept = int8.fewest_kept(graph, references, exact, rounded, by_harm)
    assert kept == by_harm[: len(kept)]
    assert int8.passes(graph, references)
    int8.install(graph, {kept[-1]: rounded[kept[-1]]})
    assert not int8.passes(graph, references)


def test_a_model_that_cannot_pass_is_refused(checkpoints, tmp_path, monkeypatch):
    """With the cosines, and nothing is left behind: no bundle, no temporary folder."""
    monkeypatch.setattr(int8, "MARGIN", 1e-9)
    with pytest.raises(
        ParityError, match=r"with 1\d of 2\d matrix products in fp32, .* Export this model without int8"
    ):
        export_bundle(checkpoints("large"), tmp_path / "out" / "bundle", precision=BOTH)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_refuses_it_with_one_sentence(checkpoints, tmp_path):
    """Exit code 1, and nothing is left."""
    script = "from w2v_export.precision import int8\nint8.MARGIN = 1e-9\nfrom w2v_export.cli import main; main()"
    arguments = ["--model", checkpoints("large"), "--output", tmp_path / "out" / "bundle", "--precision", "int8"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Export this model without int8." in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["base", "large"])
def test_a_neighbour_and_the_padding_change_no_bit(exported, kind):
    """Beside speech, beside a shout ten thousand times as loud, with garbage in the padding: the same bits."""
    engine = Embedder(exported(kind), device="cpu", precision="int8").engine
    quiet, shout = 0.01 * speech(1.3, seed=1), 1e4 * speech(2.0, seed=2)
    answers = []
    for neighbour, fill in ((speech(2.0, seed=3), 0.0), (shout, 0.0), (shout, np.nan), (shout, 1e30)):
        batch = np.full((2, len(shout)), fill, np.float32)
        batch[0, : len(quiet)], batch[1] = quiet, neighbour
        lengths = np.array([len(quiet), len(shout)])
        frames, pooled = engine.run({WAVEFORM: batch, LENGTHS: lengths}, [LAST_HIDDEN_STATE, EMBEDDING])
        answers.append((frames[0, :64], pooled[0]))
    for frames, pooled in answers[1:]:
        assert np.array_equal(frames, answers[0][0])
        assert np.array_equal(pooled, answers[0][1])
    (alone,) = engine.run({WAVEFORM: quiet[None], LENGTHS: np.array([len(quiet)])}, [EMBEDDING])
    assert cosines(alone[0], answers[0][1]) > 0.9999


def test_a_pause_keeps_its_resolution(exported):
    """The frames of a pause at -60 dB are as near to fp32 as those of the speech around it."""
    voice = speech(4)
    voice[16000:32000] *= 1e-3
    exact, rounded = (
        Embedder(exported("large"), device="cpu", precision=precision).embed((voice, 16000), level="frame").values
        for precision in BOTH
    )
    near = cosines(exact, rounded)
    assert near[52:98].min() >= FRAMES
    assert near.min() >= FRAMES


@pytest.mark.parametrize(
    "name",
    ["hubert", "wavlm-stable", "data2vec", "conformer-relative", "mms", "w2v-bert", "classifier-weighted", "x-vector"],
)
def test_every_family_holds_it(tmp_path, name):
    """Frames, pooled vectors, layers and heads, alone, in batches with NaN, and as a window, against transformers."""
    checkpoint = families.save(tmp_path / "checkpoint", name)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", precision=("int8",))
    record = bundle.manifest.precisions["int8"]
    assert len(record.kept) < len(quantisable(load(str(checkpoint)).graph())) / 2
    rows = compare(Embedder(bundle.folder, device="cpu", precision="int8"), references_of(load(str(checkpoint))))
    assert {"frames", "pooled", "layers"} <= {row.output for row in rows}
    assert [row for row in rows if not row.within("int8")] == []
    assert max(row.max_rel for row in rows) > 1e-4, "this was not computed in int8"


def test_a_bundle_of_int8_alone(checkpoints, tmp_path):
    """It holds no fp32 graph or weight, says so when asked for one, and embeds long audio, too."""
    folder = export_bundle(checkpoints("large"), tmp_path / "bundle", precision=("int8",)).folder
    names = {path.name for path in (folder / "onnx").iterdir()}
    assert all("_int8" in name for name in names)
    with pytest.raises(BundleError, match="int8"):
        Embedder(folder, device="cpu")
    whole = Embedder(folder, device="cpu", precision="int8")
    windowed = Embedder(folder, device="cpu", precision="int8", windowing=Windowing(window=2, context=1, whole=4))
    voice = speech(7), 16000
    assert cosines(whole.embed(voice).values, windowed.embed(voice).values) > 0.99


def test_both_precisions_answer_from_one_bundle(exported):
    """Different numbers, near each other, from files that are a third of the size."""
    folder = exported("emotion")
    exact, rounded = (
        Embedder(folder, device="cpu", precision=precision).embed((speech(3), 16000)) for precision in BOTH
    )
    assert not np.array_equal(exact.values, rounded.values)
    assert cosines(exact.values, rounded.values) >= POOLED
    scale = np.abs(exact.logits).max()
    assert np.abs(exact.logits - rounded.logits).max() <= TOLERANCES["int8"]["logits"].max_rel * scale
