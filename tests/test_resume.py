"""Stopped at any moment and resumed, a run ends as if nothing had happened; it goes on with nothing else."""

import errno
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from io import FileIO
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from forks import Ended, run_in_fork
from lrsd_cli.main import main
from recipes import on
from safetensors.torch import load_file, save_file

from lrsd.compress import compress
from lrsd.errors import InputError, LrsdError, StorageError
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps.write import environment
from lrsd.work import files, journal, streams
from lrsd.work.journal import JOURNAL, Journal, difference, partial_directory
from lrsd.work.records import read_record

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

# With propagation every part of the work writes: moments, both streams, a block's own inputs, packed layers.
SETTINGS = Recipe.of(ratio=4, propagate=True, batch=4)
SAMPLES = 8

Run = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def tiny_model_dir(make_model: Any, tiny_llama: Any) -> Path:
    """Two small blocks: there are hundreds of sessions, and each costs what it reads and writes."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(tiny_llama(**sizes))


@pytest.fixture
def run(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> Run:
    """Compress into one place; returns the files written, without those of time and memory."""

    def start(model: Path = tiny_model_dir, text: Path = text_file, **changes: Any) -> dict[str, bytes]:
        resume, settings = changes.pop("resume", True), changes.pop("settings", SETTINGS)
        calibration = Calibration(calib=str(text), **{"samples": SAMPLES, "seqlen": 32} | changes)
        output = tmp_path / "work" / "out"
        compress(str(model), output, on(settings, calibration), resume=resume)
        assert not partial_directory(output).exists()
        found = {path.name: path.read_bytes() for path in output.iterdir() if path.name != "run.json"}
        for path in output.iterdir():
            path.unlink()
        return found

    return start


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return partial_directory(tmp_path / "work" / "out")


# --- killed -----------------------------------------------------------------------------------------


def kill_test(model: Path, text: Path, place: Path) -> Any:
    from kill_test import KillTest

    size = ["--samples", str(SAMPLES), "--seqlen", "32", "--batch", "4", "--propagate"]
    return KillTest([str(model), "--ratio", "4x", "--calib", str(text), *size], place)


@pytest.mark.slow
def test_killed_at_every_journal_line_it_ends_byte_identical(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    from kill_test import journal_kills

    test = kill_test(tiny_model_dir, text_file, tmp_path)
    journal_kills(test)
    # Header, text, two blocks observed, plan, two blocks fitted, written; three times each.
    assert sum(test.kills.values()) == 8 * 3


@pytest.mark.slow
def test_killed_at_random_moments_and_at_writes_it_ends_byte_identical(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The short version of `scripts/kill_test.py`."""
    from kill_test import boundary_kills, random_kills

    test = kill_test(tiny_model_dir, text_file, tmp_path)
    random_kills(test, 6, random.Random(0))
    boundary_kills(test, tmp_path, stride=41)
    assert sum(test.kills.values()) >= 9


# --- stopped ----------------------------------------------------------------------------------------


class Faults:
    """Does something at the write of a given number: of a tensor file, a text, a journal line, a sync."""

    def __init__(self, patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> None:
        self.left = 0
        self._fault = fault
        for module in (files, streams):
            patch.setattr(module, "save_file", self._before(save_file))
        patch.setattr("transformers.modeling_utils.safe_save_file", self._before(save_file))
        patch.setattr(Path, "write_text", self._before(Path.write_text))
        patch.setattr(os, "fsync", self._before(os.fsync))
        patch.setattr(journal, "FileIO", self._torn())

    def _before(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*arguments: Any, **named: Any) -> Any:
            self.count()
            return write(*arguments, **named)

        return faulty

    def _torn(self) -> type[FileIO]:
        faults = self

        class Torn(FileIO):
            def write(self, content: Any) -> int:
                try:
                    faults.count()
                except OSError:
                    super().write(content[: len(content) // 2])
                    raise
                return super().write(content)

        return Torn

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            self._fault()


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_a_full_disk_at_any_write_loses_nothing(
    run: Run, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Session n ends at its nth write; each says so, and the last one ends as if nothing had happened."""
    expected = run()
    said: list[str] = []
    with monkeypatch.context() as patch:
        faults = Faults(patch, full_disk)
        while True:
            faults.left = len(said) + 1
            before = finished(partial)
            try:
                found = run()
                break
            except StorageError as error:
                said.append(f"{error}; {'; '.join(getattr(error, '__notes__', []))}")
            assert finished(partial)[: len(before)] == before
    assert found == expected
    assert len(said) > 10
    assert all(re.match(r"cannot write .*: No space left on device; free some space", line) for line in said)
    assert "--resume" in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_write_loses_nothing(
    run: Run, partial: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    expected = run()
    stopped = 0
    previous = signal.signal(number, _stop)
    try:
        with monkeypatch.context() as patch:
            faults = Faults(patch, lambda: os.kill(os.getpid(), number))
            while True:
                # Every second session is stopped at once, the others later and later.
                faults.left = 1 if stopped % 2 else stopped + 1
                try:
                    found = run()
                    break
                except KeyboardInterrupt:
                    stopped += 1
    finally:
        signal.signal(number, previous)
    assert found == expected
    assert stopped > 10


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def finished(partial: Path) -> list[str]:
    if not (partial / JOURNAL).exists():
        return []
    lines = (partial / JOURNAL).read_text().split("\n")[1:-1]
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_the_command_says_how_to_go_on(
    number: signal.Signals, code: int, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    finish = Journal.finish

    def stop(self: Journal, step: str, *arguments: Any, **named: Any) -> None:
        finish(self, step, *arguments, **named)
        if step == "observe-0001" and "--resume" not in sys.argv:
            os.kill(os.getpid(), number)

    size = ["--samples", "8", "--seqlen", "32"]
    command = [
        "compress",
        str(tiny_model_dir),
        "--ratio",
        "4x",
        "--calib",
        str(text_file),
        *size,
        "-o",
        "out",
    ]

    def lrsd(*more: str) -> Ended:
        def work() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            setattr(Journal, "finish", stop)  # noqa: B010 - this process is thrown away
            sys.argv = ["lrsd", *command, *more]
            main()

        return run_in_fork(work, tmp_path)

    stopped = lrsd()
    assert (stopped.returncode, stopped.stdout) == (code, "")
    said = stopped.stderr.splitlines()[-1]
    assert said.endswith(
        f"finished work is kept in {tmp_path / 'out.partial'}; the same command with --resume goes on"
    )
    assert said.startswith({130: "interrupted; ", 143: "terminated; "}[code])

    again = lrsd()
    assert again.returncode == 1
    assert "add --resume" in again.stderr
    resumed = lrsd("--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- resumed with something else ----------------------------------------------------------------------


@pytest.fixture
def stopped(run: Run, partial: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run that was stopped after the calibration pass; its finished steps."""
    with monkeypatch.context() as patch:
        patch.setattr("lrsd.compress.fit_blocks", lambda *arguments: _stop(0, None))
        with pytest.raises(KeyboardInterrupt):
            run(resume=False)
    steps = finished(partial)
    assert steps == ["text", "observe-0000", "observe-0001", "plan"]
    return steps


def other_model(model: Path, place: Path) -> Path:
    """One weight more in the middle of a matrix, which no sample of a few values would notice."""
    place.mkdir()
    for path in model.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    tensors = load_file(place / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][17, 13] += 1
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "rms_norm_eps", 0.5),
        pytest.param("tokenizer.json", "normalizer", {"type": "Lowercase"}, marks=pytest.mark.slow),
    ],
)
def test_the_same_weights_with_another_configuration_or_tokenizer_are_another_model(
    run: Run, tiny_model_dir: Path, tmp_path: Path, name: str, key: str, value: Any
) -> None:
    changed = copytree(tiny_model_dir, tmp_path / "other")
    content = json.loads((changed / name).read_text())
    (changed / name).write_text(json.dumps(content | {key: value}))
    with pytest.raises(InputError, match="model was"):
        run(model=changed)
    run(model=copytree(tiny_model_dir, tmp_path / "moved"))  # the same in another place


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"settings": Recipe.of(ratio=3, propagate=True, batch=4)},
            r"recipe\.ratio was '4\.0x', is '3\.0x'",
        ),
        ({"settings": Recipe.of(ratio=4, batch=4)}, "recipe.propagate was True, is None"),
        ({"seed": 1}, "recipe.seed was 0, is 1"),
        ({"samples": 9}, "recipe.samples was 8, is 9"),
    ],
)
def test_another_recipe_is_refused_by_name(run: Run, partial: Path, changes: Any, field: str) -> None:
    before = finished(partial)
    with pytest.raises(InputError, match=field) as refusal:
        run(**changes)
    assert not hasattr(refusal.value, "__notes__"), "no advice to repeat what was refused"
    assert finished(partial) == before


@pytest.mark.slow
def test_another_run_is_refused_where_only_the_move_is_left(
    run: Run, partial: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run()
    with monkeypatch.context() as patch:
        patch.setattr("lrsd.compress.move_into_place", lambda *arguments: _stop(0, None))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert finished(partial)[-1] == "written"
    with pytest.raises(InputError, match=r"recipe\.seed was 0, is 1"):
        run(seed=1)
    with pytest.raises(InputError, match="model was"):
        run(model=other_model(tiny_model_dir, tmp_path / "other"))
    with pytest.raises(InputError, match="no such model directory"):
        run(model=tmp_path / "nowhere")
    assert run() == expected


@pytest.mark.slow
def test_a_finished_command_may_be_repeated_with_resume(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """A job that is queued again prints the same manifest; another command's result is left alone."""
    calibration = Calibration(calib=str(text_file), samples=SAMPLES, seqlen=32)
    output = tmp_path / "out"

    def run(model: Path = tiny_model_dir, settings: Recipe = SETTINGS) -> Any:
        return compress(str(model), output, on(settings, calibration), resume=True)

    first = run()
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}
    assert run() == first
    with pytest.raises(InputError, match=r"another run: ratio was '4\.0x', is '3\.0x'"):
        run(settings=Recipe.of(ratio=3, propagate=True, batch=4))
    with pytest.raises(InputError, match="holds the result of another run: model was"):
        run(model=other_model(tiny_model_dir, tmp_path / "other"))
    with pytest.raises(InputError, match="already exists and is not empty"):
        compress(str(tiny_model_dir), output, on(SETTINGS, calibration))
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}
    assert after == before


@pytest.mark.usefixtures("stopped")
def test_another_model_text_or_environment_is_refused_by_name(
    run: Run,
    partial: Path,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = finished(partial)
    with pytest.raises(InputError, match="model was"):
        run(model=other_model(tiny_model_dir, tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr("lrsd.steps.write.version", lambda package: "99.0")
        with pytest.raises(InputError, match=r"environment\.lrsd was '0.1.0', is '99.0'"):
            run()
    torch.set_num_threads(2)
    try:
        with pytest.raises(InputError, match=r"environment\.threads was '1', is '2'"):
            run()
    finally:
        torch.set_num_threads(1)
    text = text_file.read_text()
    try:
        text_file.write_text(text + ".")
        with pytest.raises(InputError, match="text was"):
            run()
    finally:
        text_file.write_text(text)
    assert finished(partial) == before


def test_unfinished_work_is_neither_overwritten_nor_shared(
    run: Run, stopped: list[str], partial: Path
) -> None:
    with pytest.raises(InputError, match="add --resume"):
        run(resume=False)
    held = Journal(partial)
    with pytest.raises(InputError, match="another lrsd is at work"):
        run()
    held.close()
    assert finished(partial) == stopped


def test_a_run_that_began_meanwhile_is_not_written_into(partial: Path) -> None:
    """Two commands load the model; the first begins, and ends."""
    second = Journal(partial)
    first = Journal(partial)
    first.begin("cpu")
    first.finish("text", None)
    first.close()
    with pytest.raises(InputError, match=r"another lrsd began .* --resume"):
        second.begin("cpu")
    assert finished(partial) == ["text"]


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("resume", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_journal_killed_while_it_was_removed_is_none(
    run: Run, partial: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Journal(partial)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **options: _stop(0, None))
        with pytest.raises(KeyboardInterrupt):
            left.remove()
    left.close()
    assert len(list(partial.iterdir())) > 1
    assert "model.safetensors" in run(resume=resume)


@pytest.mark.slow
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_killed_before_its_first_block_is_begun_anew(run: Run, partial: Path, resume: bool) -> None:
    expected = run()
    for content in ("", '{"model": "anot', '{"model": "another"}\n' if not resume else ""):
        partial.mkdir(parents=True)
        (partial / JOURNAL).write_text(content)
        assert run(resume=resume) == expected
    if not resume:  # the text of another run is no reason to refuse
        partial.mkdir(parents=True)
        (partial / JOURNAL).write_text('{"model": "another"}\n{"step": "text", "seconds": 1, "keep": []}\n')
        assert run(resume=resume) == expected


def test_a_resumed_run_reads_no_text_and_observes_nothing_again(
    run: Run, stopped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*arguments: object) -> None:
        raise AssertionError("finished work is done again")

    monkeypatch.setattr("lrsd.steps.prepare.calibration_samples", again)
    monkeypatch.setattr("lrsd.steps.observe.block_statistics", again)
    monkeypatch.setattr("lrsd.steps.plan.make_plan", again)
    assert "model.safetensors" in run()


def test_a_resumed_run_decodes_each_record_once(
    run: Run, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after everything was fitted; the fit that is left undone reads moments, which hold no menus."""
    settings = Recipe.of(ratio=4, propagate=False, batch=4)
    with monkeypatch.context() as patch:
        patch.setattr("lrsd.compress.write_result", lambda *arguments: _stop(0, None))
        with pytest.raises(KeyboardInterrupt):
            run(settings=settings)
    assert finished(partial)[-1] == "fit-0001"
    content = (partial / JOURNAL).read_text().splitlines(keepends=True)
    (partial / JOURNAL).write_text("".join(content[:-1]))
    moments = partial / "observe-0001.moments.safetensors"
    whole = moments.read_bytes()
    moments.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LrsdError, match=r"observe-0001\.moments"):
        run(settings=settings)
    moments.write_bytes(whole)
    decoded: list[str] = []

    def counted(path: Path, kind: type) -> Any:
        decoded.append(path.stem)
        return read_record(path, kind)

    monkeypatch.setattr(journal, "read_record", counted)
    run(settings=settings)
    assert sorted(decoded) == [
        "fit-0000", "fit-0001", "observe-0000", "observe-0001", "observe-0001.moments", "plan", "text",
    ]  # fmt: skip


def test_the_journal_counts_steps_by_name(stopped: list[str], partial: Path) -> None:
    with closing(Journal(partial)) as held:
        assert [held.count(name) for name in ("text", "observe-", "fit-")] == [1, 2, 0]
        assert held.finished_steps == len(stopped) - 1


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    run: Run, partial: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """Nobody else is blamed, and nothing is left behind."""

    def refused(*arguments: Any) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr("fcntl.flock", refused)
    with pytest.raises(
        StorageError, match=rf"cannot be locked \({os.strerror(refusal)}\), .*; choose"
    ) as error:
        run()
    assert "\n" not in str(error.value)
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["observe-0001.safetensors", JOURNAL])
def test_damaged_work_is_named(run: Run, stopped: list[str], partial: Path, damage: str) -> None:
    content = (partial / damage).read_bytes()
    (partial / damage).write_bytes(content[: len(content) // 2] + b"\n")
    with pytest.raises(LrsdError, match=damage.removesuffix(".safetensors")):
        run()


def test_a_directory_in_the_way_is_left_alone(run: Run, partial: Path) -> None:
    partial.mkdir(parents=True)
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="in the way"):
        run()
    assert [path.name for path in partial.iterdir()] == ["thesis.txt"]


def test_work_that_would_end_the_same_is_not_kept(run: Run, partial: Path) -> None:
    with pytest.raises(LrsdError, match="ratio"):
        run(settings=Recipe.of(ratio=1000))
    assert not partial.exists()


def test_an_error_that_would_come_back_is_not_told_to_resume(
    run: Run, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("sliding_attention")

    with monkeypatch.context() as patch:
        patch.setattr("lrsd.compress.write_result", broken)
        with pytest.raises(KeyError) as error:
            run()
    (note,) = error.value.__notes__
    assert "the same command would end like this again" in note
    assert "--resume" not in note
    assert partial.exists()


def test_another_graphics_card_of_the_same_model_goes_on_and_another_model_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cards = {"cuda:0": "H100", "cuda:1": "H100", "cuda:2": "A100"}
    monkeypatch.setattr("lrsd.steps.write.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards[str(device)])
    first, same, other = (environment(Recipe.of(ratio=4, device=card)) for card in cards)
    assert first == same
    assert difference(first, other) is not None
