"""The global batch is shared so that every sequence is read once, on every layout."""

import pytest

from smallgpt.parallel.strategy import Growth, share_batch


def test_a_growing_size_adds_up():
    """A sum that differs from its parts would skip sequences, or read some twice."""
    for growth in (Growth(12), Growth(8, 1), Growth(8, 6), Growth(4, 7)):
        sizes = [growth.at(step) for step in range(10)]
        assert [growth.before(step) for step in range(11)] == [sum(sizes[:n]) for n in range(11)]
        assert sizes == sorted(sizes) and sizes[growth.warmup :] == [growth.full] * (
            10 - growth.warmup
        )
    assert [Growth(8, 6).at(step) for step in range(7)] == [2, 2, 2, 4, 4, 4, 8]


@pytest.mark.parametrize("micro_batch", [1, 3, 16])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("data_size", [1, 2])
@pytest.mark.parametrize("warmup", [0, 6])
def test_every_sequence_is_read_once(warmup, data_size, depth, micro_batch):
    """Whatever the layout, the readers of a step together read what follows the step before it, in
    equal parts that fill the pipeline."""
    shares = share_batch(16 * 48, 16, micro_batch, data_size, depth, warmup)
    expected = Growth(48, warmup)
    for step in range(9):
        parts = [shares.of(step, rank) for rank in range(data_size)]
        read = [row for ranges in parts for rows in ranges for row in rows]
        assert read == list(range(expected.before(step), expected.before(step + 1)))
        for ranges in parts:
            assert len(ranges) % depth == 0
            assert max(map(len, ranges)) <= micro_batch
