"""Processes that share batches: what each makes of its own adds up to what one makes of all."""

import pytest

from lrsd.work.world import World


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_every_batch_is_one_process_s(size: int, count: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert sorted(batch for share in shares for batch in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (0, 0)])
def test_a_process_outside_its_world_is_an_error(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="rank must be in"):
        World(rank, size)
