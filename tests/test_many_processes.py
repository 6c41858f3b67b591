"""Several processes at one compression: the same bytes as one makes, whoever goes on with whose work."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, TWO_STACKS
from forks import Ended, run_in_world
from golden import digest
from transformers import AutoModelForSeq2SeqLM, BartConfig, LlamaConfig, MixtralConfig

from lrsd.compress import compress
from lrsd.errors import InputError
from lrsd.recipe import Recipe
from lrsd.work.journal import JOURNAL, partial_directory
from lrsd.work.world import World, joined

RATIO = 2.0
# Five blocks, so that the last wave of two or four processes is not full; seven batches.
BLOCKS, SAMPLES, BATCH, SEQLEN = 5, 13, 2, 24


@pytest.fixture(scope="module")
def bases(make_model, tiny_llama: Callable[..., LlamaConfig]) -> dict[str, Path]:
    return {
        "llama": make_model(tiny_llama(num_hidden_layers=BLOCKS)),
        "mixtral": make_model(MixtralConfig(**EXPERTS)),
        "bart": make_model(BartConfig(**TWO_STACKS, max_position_embeddings=70), AutoModelForSeq2SeqLM),
    }


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama propagated": ("llama", {"propagate": True}),
    "llama": ("llama", {"propagate": False}),
    "llama tokens weighed": ("llama", {"propagate": True, "token_weights": True}),
    "llama 16 bit": ("llama", {"bits": "16", "ratio": 1.3}),
    "llama fixed": ("llama", {"coding": "fixed", "propagate": True}),
    "mixtral": ("mixtral", {"propagate": True}),
    "bart": ("bart", {"propagate": True}),
}


def run(
    base: Path,
    output: Path,
    text_file: Path,
    options: dict[str, Any],
    *,
    resume: bool = False,
    victim: int | None = None,
    waits: int = 0,
) -> None:
    """victim: the process that is killed when it has waited for the others so often."""
    settings = {"calib": (str(text_file),), "samples": SAMPLES, "seqlen": SEQLEN, "batch": BATCH, "seed": 0}
    with joined() as world:
        if world.rank == victim:
            world = ends_after(world, waits)
        recipe = Recipe.of(**{"ratio": RATIO, **settings, **options})
        compress(str(base), output, recipe, resume=resume, world=world)


def require_done(ended: list[Ended]) -> None:
    assert [child.returncode for child in ended] == [0] * len(ended), "\n".join(c.stderr for c in ended)


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_any_number_of_processes_makes_the_same_bytes(
    case: str, bases: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    family, options = CASES[case]
    # Three: the last wave, and the last batches, leave one without work.
    sizes = (1, 2, 4) if case == "llama propagated" else (1, 3)
    for size in sizes:
        require_done(
            run_in_world(size, partial(run, bases[family], tmp_path / str(size), text_file, options))
        )
    assert len({digest(tmp_path / str(size)) for size in sizes}) == 1
    assert not list(tmp_path.glob("*.partial"))


def ends_after(world: World, waits: int) -> World:
    """The same process, killed when it has waited for the others so often."""

    class Mortal(type(world)):  # type: ignore[misc]
        left = waits

        def wait(self) -> None:
            Mortal.left -= 1
            if Mortal.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            super().wait()

    return Mortal(world.rank, world.size)


@pytest.mark.parametrize(("begun", "resumed"), [(1, 4), (3, 2)])
def test_any_number_of_processes_goes_on_with_the_work_of_any_other(
    begun: int, resumed: int, bases: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    """Of those that begin one is killed, in the calibration pass; begun again, another one in the fit."""
    options, start = {"propagate": True}, partial(run, bases["llama"], text_file=text_file)
    require_done(run_in_world(1, partial(start, tmp_path / "whole", options=options)))
    for victim, waits in ((begun - 1, 25), (0, 40)):
        ended = run_in_world(
            begun,
            partial(start, tmp_path / "out", options=options, resume=True, victim=victim, waits=waits),
        )
        assert ended[victim].returncode == -signal.SIGKILL, ended[victim].stderr
        for rank, other in enumerate(ended):
            if rank != victim:
                assert "OthersGoneError: another process of this run does not answer" in other.stderr
        assert finished_steps(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    require_done(run_in_world(resumed, partial(start, tmp_path / "out", options=options, resume=True)))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))


def finished_steps(output: Path) -> int:
    return len((partial_directory(output) / JOURNAL).read_text().splitlines()) - 1


def test_contradictory_starts_are_one_line(
    bases: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = partial(run, bases["llama"], tmp_path / "out", text_file)
    for ended in run_in_world(2, partial(start, {"device": "cpu:0"})):
        assert (
            "InputError: device cpu:0 would be that of all 2 processes; leave the number out" in ended.stderr
        )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(InputError, match="WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set"),
        joined(),
    ):
        pass
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            InputError, match="process 1 of this machine has no accelerator of its own, there are 1"
        ),
        joined(),
    ):
        pass
