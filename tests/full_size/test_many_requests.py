"""Hundreds of random requests of every kind of checkpoint, against transformers in float64: `make test-full`."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from random_requests import KINDS, ask


@pytest.mark.parametrize("number", range(2, 16))
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_request_is_answered_as_transformers_does(relatives, kind, number, tmp_path):
    """Every array of every recording, whatever is asked for."""
    ask(kind, number, *relatives(kind), tmp_path)
