"""The scripts that the README cites start and explain themselves: they import the program of today.

And what the benchmarks stand on: the noise off the grid, the rows kept, the halves of the texts.
"""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from forks import run_in_fork

FOLDER = Path(__file__).parent.parent / "scripts"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_starts(script: Path) -> None:
    command = "parser(" in script.read_text().lower() and "__main__" in script.read_text()

    def start() -> None:
        sys.argv, sys.path[:0] = [str(script), "--help"], [str(script.parent)]
        runpy.run_path(str(script), run_name="__main__" if command else script.stem)

    ended = run_in_fork(start)
    assert ended.returncode == 0, ended.stderr
    if command:
        assert ended.stdout.startswith(f"usage: {script.name} ")


def test_noise_stays_within_half_a_step(generator: torch.Generator) -> None:
    moved = runpy.run_path(str(FOLDER / "move_off_grid.py"))["moved"]
    step = torch.rand(24, 3, 1, generator=generator) + 0.1
    codes = torch.randint(16, (24, 3, 32), generator=generator)
    codes[..., :2] = torch.tensor([4, 5])  # two neighbours, as nearly every group has
    codes[0, 0] = 7  # a group of one value has no step
    W_OI = (step * (codes - 8)).flatten(1)
    found = moved(W_OI, torch.Generator().manual_seed(1))
    noise = (found - W_OI).view_as(codes) / step
    assert noise.abs().max() <= 0.5 + 1e-4  # float32 values, up to eight steps from zero
    assert noise[0, 0].eq(0).all()
    assert noise.ne(0).float().mean() > 0.95
    assert noise.abs().mean() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(moved(W_OI, torch.Generator().manual_seed(1)), found, rtol=0, atol=0)
    assert not torch.equal(moved(W_OI, torch.Generator().manual_seed(2)), found)


def test_interrupted_bench_runs_only_what_is_missing(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    def measured(*options: str) -> list[str]:
        """Names of the rows that were not there yet."""
        command = [
            "--model", tiny_model_dir, "--calib", text_file, "--eval", text_file, "--samples", 2,
            "--seqlen", 16, "--windows", 1, "--length", 32, "--methods", "gptq", "--out", tmp_path, *options,
        ]  # fmt: skip

        def start() -> None:
            sys.argv, sys.path[:0] = ["bench_quality.py", *map(str, command)], [str(FOLDER)]
            runpy.run_path(str(FOLDER / "bench_quality.py"), run_name="__main__")

        ended = run_in_fork(start)
        assert ended.returncode == 0, ended.stderr
        return [line.split('"')[3] for line in ended.stdout.splitlines() if line.startswith("{")]

    assert measured() == ["dense", "gptq 4x"]
    assert measured() == []
    assert measured("--seeds", "2", "--ratios", "4", "3") == ["gptq 4x", "gptq 3x", "gptq 3x"]


def test_halves_of_a_kind_share_no_long_paragraph(tmp_path: Path) -> None:
    prose = tmp_path / "wiki.raw"
    articles = [
        f" = {n} = \n\nArticle {n} says this of itself, and so do its lines.\n\n" * 9 for n in range(8)
    ]
    prose.write_text("\n" + "\n".join(articles), encoding="utf-8")
    texts = runpy.run_path(str(FOLDER / "kinds_of_text.py"))
    halves = texts["write_halves"](prose, tmp_path / "texts")
    assert tuple(halves) == texts["KINDS"]
    for calibration, evaluation in halves.values():
        first, second = (
            {part.strip("\n") for part in Path(half).read_text(encoding="utf-8").split("\n\n")}
            for half in (calibration, evaluation)
        )
        assert first
        assert second
        assert not [part for part in first & second if len(part) > 40]


def test_items_hold_the_true_continuation_among_others_of_its_length() -> None:
    made = runpy.run_path(str(FOLDER / "make_choices.py"))
    text = "\n".join(" ".join(f"{line}.{word}" for word in range(64)) for line in range(30))
    found = made["stretches"](text, 6, 3)
    assert len(found) == 30 * (64 // 9)
    items = made["make_items"](found, 40, 4, 0)
    assert items == made["make_items"](found, 40, 4, 0)
    assert items != made["make_items"](found, 40, 4, 1)
    assert len({item.context for item in items}) == 40
    assert {item.answer for item in items} == {0, 1, 2, 3}
    for item in items:
        assert f"{item.context} {item.choices[item.answer]}" in text
        assert len(set(item.choices)) == 4
        assert {len(choice.split()) for choice in item.choices} == {3}
        wrong = [choice for choice in item.choices if f"{item.context} {choice}" not in text]
        assert len(wrong) == 3
