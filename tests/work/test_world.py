"""Processes that share batches: what each makes of its own adds up to what one makes of all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lrsd.model.layout import find_layout
from lrsd.model.load import load_model
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.steps.observe import Weights, block_statistics
from lrsd.work.streams import Stream
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


@torch.no_grad()
def test_moments_of_all_processes_add_up_to_those_of_one(tiny_model_dir: Path) -> None:
    loaded = load_model(str(tiny_model_dir))
    tokens = torch.arange(5 * 24).view(5, 24) * 7 % 290 + 3
    layout = find_layout(loaded.model, loaded.kind.example(loaded.model))
    replay = Replay.start(loaded.model, layout, list(Samples({"input_ids": tokens}).split(1)))
    outputs = Stream()
    weights = Weights(rows=True, tokens=True)
    whole = block_statistics(replay, 0, replay.inputs[0], outputs, weights)
    shared = Stream()
    parts = [
        block_statistics(replace(replay, world=World(rank, 2)), 0, replay.inputs[0], shared, weights)
        for rank in (0, 1)
    ]
    for name, group in whole.items():
        merged = parts[0][name] + parts[1][name]
        assert merged.moments.count == group.moments.count
        torch.testing.assert_close(merged.moments.gram, group.moments.gram, rtol=1e-12, atol=1e-12)
        assert merged.rows.keys() == group.rows.keys() != set()
        for layer, sums_O in group.rows.items():
            torch.testing.assert_close(merged.rows[layer], sums_O)
        assert sorted(merged.tokens) == sorted(group.tokens) == list(range(5))
    assert len(shared) == len(outputs) == 5
    assert all(torch.equal(a, b) for a, b in zip(shared, outputs, strict=True))
