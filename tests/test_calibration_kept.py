"""What calibration found of a model, kept for other runs: the same bytes as without, and no second pass."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import EXPERTS
from golden import digest
from transformers import LlamaConfig, MixtralConfig

from lrsd.compress import compress
from lrsd.errors import CheckpointError, InputError
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.work.journal import partial_directory


class Stopped(KeyboardInterrupt):
    pass


class Told(Progress):
    """What a run says; stopped after so many steps."""

    def __init__(self, steps: int | None = None) -> None:
        self.notes: list[str] = []
        self._left = steps

    def step(self, what: str) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Stopped

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def bases(make_model: Any, tiny_llama: Callable[..., LlamaConfig]) -> dict[str, Path]:
    return {"llama": make_model(tiny_llama()), "mixtral": make_model(MixtralConfig(**EXPERTS))}


@pytest.fixture
def run(bases: dict[str, Path], text_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def start(
        name: str, kept: Path | None, family: str = "llama", *, steps: int | None = None, **changes: Any
    ) -> list[str]:
        told = Told(steps)
        recipe = Recipe.of(**{"calib": str(text_file), "samples": 9, "seqlen": 24, "batch": 2} | changes)
        output = tmp_path / name
        compress(str(bases[family]), output, recipe, told, resume=True, calibration=kept)
        return told.notes

    return start


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_another_ratio_takes_what_the_first_one_found(
    run: Callable[..., list[str]], family: str, tmp_path: Path
) -> None:
    kept = tmp_path / "calibration"
    run("plain", None, family, ratio=3)
    assert not any("calibration is taken" in line for line in run("first", kept, family, ratio=2))
    (found,) = kept.iterdir()
    assert any(f"calibration is taken from {found}" in line for line in run("second", kept, family, ratio=3))
    assert digest(tmp_path / "plain") == digest(tmp_path / "second") != digest(tmp_path / "first")
    assert list(kept.iterdir()) == [found]


def test_another_text_or_seed_is_kept_apart(run: Callable[..., list[str]], tmp_path: Path) -> None:
    kept = tmp_path / "calibration"
    for number, changes in enumerate(({"seed": 0}, {"seed": 1}, {"row_weights": False}, {"seqlen": 16})):
        run(f"out-{number}", kept, ratio=2, **changes)
        assert len(list(kept.iterdir())) == number + 1


def test_a_run_that_began_on_it_goes_on_with_it_only(run: Callable[..., list[str]], tmp_path: Path) -> None:
    kept = tmp_path / "calibration"
    run("first", kept, ratio=2)
    (found,) = kept.iterdir()
    with pytest.raises(Stopped):
        run("second", kept, ratio=3, steps=1)
    moved = found.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is not there any more; delete the former"):
        run("second", kept, ratio=3)
    assert partial_directory(tmp_path / "second").exists()
    moved.rename(found)
    run("second", kept, ratio=3)
    # And one that began without it does not mix the two.
    with pytest.raises(Stopped):
        run("third", tmp_path / "nothing", ratio=3, steps=1)
    assert not any("calibration is taken" in line for line in run("third", kept, ratio=3))
    assert digest(tmp_path / "second") == digest(tmp_path / "third")


def test_a_damaged_record_is_one_line(run: Callable[..., list[str]], tmp_path: Path) -> None:
    kept = tmp_path / "calibration"
    run("first", kept, ratio=2)
    (record,) = kept.glob("*/observe-0001.moments.safetensors")
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"observe-0001\.moments\.safetensors"):
        run("second", kept, ratio=3)
    shutil.rmtree(kept)
