"""Progress in a log: lines that say what is at work and what time is left, also where steps differ."""

import re
from collections.abc import Sequence

import pytest
from lrsd_cli import progress
from lrsd_cli.progress import LineProgress


def told(
    taken: Sequence[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[tuple[int, float]]:
    """Of a stage whose steps take so many seconds: steps done and seconds left, of every line with them."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    log = LineProgress()
    log.stage("fit", len(taken))
    for number, seconds in enumerate(taken):
        now += seconds
        log.step(f"model.layers.{number}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"fit: {len(taken)} steps"
    assert lines[-1] == f"fit: {len(taken)}/{len(taken)} model.layers.{len(taken) - 1} ({sum(taken):.0f} s)"
    found = []
    for line in lines[1:-1]:
        parts = re.fullmatch(r"fit: (\d+)/\d+ model\.layers\.(\d+) \(\d+ s, about ([\d:]+) left\)", line)
        assert parts is not None, line
        assert int(parts[1]) == int(parts[2]) + 1
        seconds_left = 0
        for part in parts[3].split(":"):
            seconds_left = 60 * seconds_left + int(part)
        found.append((int(parts[1]), seconds_left))
    return found


@pytest.mark.parametrize(
    ("taken", "from_step"),
    [
        ([20.0] * 30, 1),
        ([180.0] + [20.0] * 29, 8),  # the first one compiles
        ([0.0] * 10 + [40.0] * 20, 16),  # an earlier run did the first ten
        ([20.0 + number / 4 for number in range(40)], 8),
    ],
)
def test_the_time_left_is_true_within_30_per_cent(
    taken: list[float], from_step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told(taken, monkeypatch, capsys)
    assert len(lines) > 10
    for done, left in lines:
        if done >= from_step:
            assert left == pytest.approx(sum(taken[done:]), rel=0.3)


def test_quick_steps_are_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told([0.75] * 100, monkeypatch, capsys)
    assert [done for done, _ in lines] == [14, 28, 42, 56, 70, 84, 98]
