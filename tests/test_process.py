"""What a library call may not touch, and what the command does to its own process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader
from gguf_files import write_llama
from recipes import on
from transformers import LlamaConfig, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from lrsd.compress import compress, dry_run
from lrsd.model.load import gguf_parsed_once, load_model, without_bars
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps.write import environment
from lrsd.work import process
from lrsd.work.process import OwnProcess, Process, own_process, rounds_products
from lrsd.work.residency import Residence


@pytest.fixture(scope="module")
def gguf_file(
    tiny_llama: Callable[..., LlamaConfig], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama(), tokenizer)


def surroundings() -> tuple[Any, ...]:
    return (
        gguf.GGUFReader, modeling_gguf_pytorch_utils.tqdm, transformers_logging._tqdm_hook,
        transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity(),
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
    )  # fmt: skip


def test_a_library_call_leaves_its_surroundings_as_they_were(
    gguf_file: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, libc, used = surroundings(), process._libc(), []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            used.append(name)
            return getattr(libc, name)

    class Watch(Progress):
        def step(self, what: str) -> None:
            assert surroundings() == before

    monkeypatch.setattr(process, "_libc", Watched)
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=32)
    compress(str(gguf_file), tmp_path / "out", on(Recipe.of(ratio=4), calibration), Watch())
    assert surroundings() == before
    assert "mallopt" not in used
    OwnProcess().release_at_once(2**23)
    assert "mallopt" in used or sys.platform != "linux"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux pages weights")
def test_no_hooks_stay_on_a_paged_model(tiny_model_dir: Path, text_file: Path) -> None:
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrsd.work.residency._RESIDENT", 0.0)
        prepared = dry_run(str(tiny_model_dir), on(Recipe.of(ratio=4), calibration))
    assert prepared.source.residence.paged
    for module in prepared.source.loaded.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("paged", [False, True])
def test_the_allocator_is_told_what_paging_needs(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, paged: bool
) -> None:
    told: list[int] = []

    class Told(Process):
        def release_at_once(self, large: int) -> None:
            told.append(large)

    monkeypatch.setattr("lrsd.work.residency._RESIDENT", 0.0 if paged else 1.0)
    residence = Residence(load_model(str(tiny_model_dir)).model, 2**40, Told())
    assert (residence.paged, told) == (paged, [2**20 if paged else 2**23])


def test_an_own_process_parses_a_header_once_and_puts_everything_back(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Any] = []

    class Counted(GGUFReader):
        def __init__(self, path: Any) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    before = surroundings()
    load_model(str(gguf_file))
    alone = len(parsed)
    with own_process(gguf_parsed_once(), without_bars()) as own:
        assert isinstance(own, OwnProcess)
        assert surroundings() != before
        for times in (1, 2):
            load_model(str(gguf_file))
            assert len(parsed) == alone + times, "each model once: nothing is kept in between"
    assert alone > 1
    assert surroundings() == before


def test_an_own_process_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers have it
    try:
        assert rounds_products(cuda)
        assert not rounds_products(torch.device("cpu"))
        with pytest.raises(InterruptedError), own_process():  # noqa: PT012 - the end is part of it
            assert not rounds_products(cuda)
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.deterministic
            raise InterruptedError
        assert rounds_products(cuda)
        assert torch.backends.cudnn.allow_tf32
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
        monkeypatch.setattr("lrsd.steps.write.resolve_device", lambda device: cuda)
        assert environment(Recipe.of(ratio=4))["device"] == "cuda card, products in TF32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_logs_of_a_command_are_whole_lines(gguf_file: Path, text_file: Path) -> None:
    """No carriage returns of progress bars where stderr is a pipe."""
    command = ["compress", str(gguf_file), "--ratio", "4x", "--calib", str(text_file), "--dry-run"]
    program = [sys.executable, "-m", "lrsd_cli.main", *command, "--samples", "4", "--seqlen", "32"]
    done = subprocess.run(program, capture_output=True, check=True)
    assert done.stderr.endswith(b"\n")
    assert not {*range(32)} - {10} & {*done.stderr}
    assert b"observe" in done.stderr
