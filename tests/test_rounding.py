"""Where float32 has no digits left for the usual bounds: PyTorch in float64 judges, and what is wrong still fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import LAYER, TINY, speech
from w2v_models import TOLERANCES
from w2v_models.tolerances import ROUNDING_FACTOR, ParityRow
from w2v_runtime.commands.models import app

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from oracle import Oracle  # noqa: E402
from w2v_export import export_bundle  # noqa: E402
from w2v_export.checkpoint import load  # noqa: E402
from w2v_export.exporter import UnprovenError  # noqa: E402
from w2v_export.graph import encoder, waveform  # noqa: E402
from w2v_models.bundle import Bundle  # noqa: E402
from w2v_runtime import Embedder  # noqa: E402

FRAMES = TOLERANCES["fp32"]["frames"].max_abs
WAVEFORM = speech(1.3, seed=8)


@pytest.fixture(scope="module")
def massive(tmp_path_factory) -> Path:
    """A checkpoint with what trained encoders have: two channels at +600 between two of its blocks."""
    torch.manual_seed(0)
    size = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**TINY | LAYER | size))
    with torch.no_grad():
        for block, value in ((0, 600), (2, -600)):
            model.encoder.layers[block].feed_forward.output_dense.bias[[3, 200]] += value
    folder = tmp_path_factory.mktemp("massive") / "massive"
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(massive, tmp_path_factory) -> Bundle:
    return export_bundle(massive, tmp_path_factory.mktemp("bundle") / "bundle")


def test_float64_judges_where_float32_has_no_digits_left(massive, bundle):
    """PyTorch itself is beyond the usual bound; the bundle is within twice that, and every row says by what."""
    exact = Oracle(massive)(WAVEFORM).last
    assert np.abs(load(str(massive)).run(WAVEFORM).frames - exact).max() > FRAMES / 2
    rows = bundle.manifest.precisions["fp32"].parity
    assert all(row.rounding > 0 for row in rows)
    assert max(row.rounding for row in rows if row.output == "frames") > FRAMES / 2
    assert all(row.within("fp32") for row in rows)
    mine = Embedder(bundle).embed((WAVEFORM, 16000), level="frame").values
    largest = max(row.rounding for row in rows if row.output == "frames")
    assert np.abs(mine - exact).max() <= max(FRAMES, ROUNDING_FACTOR * largest)


def test_the_table_says_that_it_was_float64_and_a_bundle_verifies_by_it(bundle):
    """On any machine, without PyTorch: the exact answers and PyTorch's distances are stored."""
    shown = CliRunner().invoke(app, ["show", str(bundle.folder)]).stdout
    assert "fp32 against PyTorch in float64" in shown
    verified = CliRunner().invoke(app, ["verify", str(bundle.folder)])
    assert verified.exit_code == 0, verified.output
    assert "fp32 against PyTorch in float64" in verified.stdout


def test_an_ordinary_model_is_compared_with_float32(bundles):
    """It is clearly within the usual bounds, and nothing else was asked."""
    manifest = Bundle.open(bundles("large")).manifest
    assert all(row.rounding == 0 for row in manifest.precisions["fp32"].parity)
    assert "float64" not in CliRunner().invoke(app, ["show", str(bundles("large"))]).stdout


def wrong_epsilon(monkeypatch) -> None:
    """The epsilon of most other models in the normalisation of the waveform: wrong for quiet recordings."""
    monkeypatch.setattr(waveform, "NORMALISATION_EPSILON", 1e-5)


def missing_mask(monkeypatch) -> None:
    """Padding is attended to in a batch."""
    right = encoder.attention
    monkeypatch.setattr(encoder, "attention", lambda q, k, v, lengths, *rest: right(q, k, v, None, *rest))


def wrong_norm(monkeypatch) -> None:
    """The epsilon of another release in every norm of the blocks."""
    right = encoder.EncoderLayer.__init__

    def initialise(self, layer, *arguments, **options):
        layer.layer_norm.eps = layer.final_layer_norm.eps = 1e-3
        right(self, layer, *arguments, **options)

    monkeypatch.setattr(encoder.EncoderLayer, "__init__", initialise)


@pytest.mark.parametrize("break_it", [wrong_epsilon, missing_mask, wrong_norm])
def test_what_is_wrong_still_fails(massive, tmp_path, monkeypatch, break_it):
    """Float64 forgives what float32 rounds, and nothing else."""
    break_it(monkeypatch)
    with pytest.raises(UnprovenError) as caught:
        export_bundle(massive, tmp_path / "bundle")
    missed = [row for row in caught.value.rows if not row.within("fp32")]
    assert {row.output for row in missed} >= {"frames"}
    assert all(row.rounding > 0 for row in missed)


@pytest.mark.parametrize(
    ("largest", "rounding", "passes"),
    [(2e-4, 0.0, False), (2e-4, 9e-5, False), (2e-4, 1.1e-4, True), (9e-5, 0.0, True)],
)
def test_the_bound_of_a_row_is_the_larger_of_the_two(largest, rounding, passes):
    """The table's, or twice PyTorch's own distance."""
    assert ParityRow("x", "frames", largest, 1.0, 1.0, rounding).within("fp32") is passes
