"""Tolerances by precision (fp32, bf16, fp16, int8): how near a bundle must be to its PyTorch reference.

They decide whether an export offers a precision. Which matrix products of a bundle become int8 is decided by them too,
in ``w2v_export.precision.int8``; which devices compute int8, in ``w2v_runtime.engines.base``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Tolerance:
    """Bounds of one output: the largest difference, absolute or relative, and the smallest cosine that pass.

    A difference passes if it is within either bound: float32 rounds in proportion, so large values may differ by more.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    min_cosine: float = -1.0


#: By precision, then by what is compared. Read by the exporter, ``w2v-models verify`` and the tests.
TOLERANCES: Final[dict[str, dict[str, Tolerance]]] = {
    "fp32": {
        "frames": Tolerance(max_abs=1e-4, min_cosine=0.999999),
        # Where there is one frame only, its mean is that frame, with values up to 4.
        "pooled": Tolerance(max_abs=2e-5, max_rel=1e-5, min_cosine=0.999999),
        # Before the last norm, trained models hold values of thousands, so that only the relative difference tells.
        "layers": Tolerance(max_rel=2e-5, min_cosine=0.999999),
        "logits": Tolerance(max_abs=2e-5, max_rel=2e-5),
    },
    # No export stores it: OpenVINO computes the fp32 graphs in bfloat16, whose numbers have 8 significant bits.
    "bf16": {
        "frames": Tolerance(max_abs=math.inf, min_cosine=0.9998),
        "pooled": Tolerance(max_abs=math.inf, min_cosine=0.9999),
        "layers": Tolerance(max_abs=math.inf, min_cosine=0.9999),
        "logits": Tolerance(max_rel=0.05),
    },
    "fp16": {
        "frames": Tolerance(max_abs=math.inf, min_cosine=0.9995),
        "pooled": Tolerance(max_abs=math.inf, min_cosine=0.9999),
        "layers": Tolerance(max_abs=math.inf, min_cosine=0.9999),
        "logits": Tolerance(max_rel=0.02),
    },
    "int8": {
        "frames": Tolerance(max_abs=math.inf, min_cosine=0.995),
        "pooled": Tolerance(max_abs=math.inf, min_cosine=0.999),
        "layers": Tolerance(max_abs=math.inf, min_cosine=0.999),
        "logits": Tolerance(max_rel=0.1),
    },
}
#: How many times as far from PyTorch's float64 answer as PyTorch in float32 itself a bundle may be, in fp32. Where
#: channels hold hundreds between two blocks, as in trained models, float32 has no digits left for the bounds above.
ROUNDING_FACTOR: Final = 2.0
#: The shortest waveform, in seconds, that is compared in a reduced precision; silence is not compared either. Where an
#: embedding is one frame, a few, or many that are alike, rounding errors do not average out and show in full.
SHORTEST_SECONDS: Final = {"bf16": 1.0, "fp16": 1.0, "int8": 1.0}


@dataclass(frozen=True)
class ParityRow:
    """One output of one case, bundle against reference.

    ``max_abs`` is max |Δ|; ``max_rel`` is max |Δ| over the reference's largest magnitude; ``min_cosine`` is the
    smallest cosine of any vector (a frame, a pooled vector, the logits) with its reference. ``rounding`` is 0 where the
    reference is PyTorch in float32; else the reference is PyTorch in float64, and ``rounding`` how far the float32
    answers of all cases are from it at most.
    """

    case: str
    output: str
    max_abs: float
    max_rel: float
    min_cosine: float
    rounding: float = 0.0

    def within(self, precision: str) -> bool:
        """Whether this row is within the tolerance of ``precision``; a difference that is not finite never is."""
        tolerance = TOLERANCES[precision][self.output]
        finite = math.isfinite(self.max_abs) and math.isfinite(self.max_rel)
        max_abs = max(tolerance.max_abs, ROUNDING_FACTOR * self.rounding)
        within = self.max_abs <= max_abs or self.max_rel <= tolerance.max_rel
        return finite and within and self.min_cosine >= tolerance.min_cosine


def worst(rows: tuple[ParityRow, ...], output: str) -> ParityRow | None:
    """The largest differences of ``output`` over all cases, as one row named ``worst``; None where it has no row."""
    chosen = [row for row in rows if row.output == output]
    if not chosen:
        return None
    return ParityRow(
        "worst",
        output,
        max(row.max_abs for row in chosen),
        max(row.max_rel for row in chosen),
        min(row.min_cosine for row in chosen),
        max(row.rounding for row in chosen),
    )
