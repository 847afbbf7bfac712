"""The batch plan: every input once, little padding, nearly in order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from w2v_runtime.embedding.batching import MAX_PADDING, Pool, pad

RATE = 16_000


def planned(lengths, budget, waiting):
    """Batches of (position, samples) from a pool that is kept at ``waiting`` inputs while there are more."""
    pool, batches = Pool(budget), []
    for position, samples in enumerate(lengths):
        pool.add(samples, (position, samples))
        if len(pool) >= waiting:
            batches.append(pool.take())
    while len(pool):
        batches.append(pool.take())
    assert pool.samples == 0
    return batches


def padding(batches):
    """The padding's share of all samples in padded batches."""
    padded = sum(len(batch) * max(samples for _, samples in batch) for batch in batches)
    return 1 - sum(samples for batch in batches for _, samples in batch) / padded


LENGTHS = st.lists(st.integers(400, 60 * RATE), max_size=80)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 100 * RATE), st.integers(1, 100))
def test_every_input_is_in_just_one_batch(lengths, budget, waiting):
    """Whatever the lengths, the budget and the pool's size, nothing is lost and nothing comes twice."""
    batches = planned(lengths, budget, waiting)
    assert sorted(position for batch in batches for position, _ in batch) == list(range(len(lengths)))
    assert all(batches)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 100 * RATE), st.integers(1, 100))
def test_a_batch_keeps_to_its_budget_and_padding(lengths, budget, waiting):
    """Only an input alone may exceed the budget; the padding's share has a bound in every batch."""
    for batch in planned(lengths, budget, waiting):
        samples = [samples for _, samples in batch]
        padded = len(samples) * max(samples)
        assert samples == sorted(samples)
        assert len(samples) == 1 or padded <= budget
        assert padded - sum(samples) <= MAX_PADDING * padded


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 100 * RATE), st.integers(1, 100))
def test_each_batch_holds_the_input_that_waited_longest(lengths, budget, waiting):
    """And none that came later than the pool has room for beside those that have left."""
    left = set[int]()
    for batch in planned(lengths, budget, waiting):
        positions = [position for position, _ in batch]
        assert min(set(range(len(lengths))) - left) in positions
        assert max(positions) < len(left) + waiting
        left.update(positions)


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(400, 10 * RATE))
def test_equal_lengths_fill_the_budget(count, samples):
    """Without padding to avoid, batches are as large as the budget allows, in order."""
    batches = planned([samples] * count, 8 * samples, 1000)
    assert [position for batch in batches for position, _ in batch] == list(range(count))
    assert all(len(batch) == 8 for batch in batches[:-1])


def test_speech_like_lengths_waste_little():
    """2000 log-normal durations of median 4 s: padding at most 4 %, and batches filled by two thirds."""
    seconds = np.random.default_rng(0).lognormal(np.log(4), 0.6, 2000)
    lengths = [int(value * RATE) for value in seconds]
    batches = planned(lengths, 32 * RATE, 190)
    assert padding(batches) <= 0.04
    assert len(batches) <= 1.5 * sum(lengths) / (32 * RATE)


def test_padding_stands_behind_each_waveform():
    """Rows are the waveforms, filled up to the longest with the value asked for."""
    waveforms = [np.array([1, 2, 3], np.float32), np.array([4], np.float32)]
    batch, lengths = pad(waveforms, fill=-1)
    assert batch.dtype == np.float32
    assert lengths.dtype == np.int64
    assert batch.tolist() == [[1, 2, 3], [4, -1, -1]]
    assert lengths.tolist() == [3, 1]
