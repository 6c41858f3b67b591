"""Onloading: a model larger than the accelerator is compressed on it, to the same bytes as on a CPU."""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from simulated import DEVICE, OnDevice, bytes_on_device, reckoning_alike, simulated_device
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lrsd.compress import compress
from lrsd.errors import InputError
from lrsd.model.slots import weight_slot
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.work.onloading import Onloading, compute_device
from lrsd.work.residency import MappedFiles, Residence

# Of blocks of 0.8 MB, most of it in layers that are left dense, so that weights are what takes memory.
WIDE = 2048
ONLY = {"include": ("*.q_proj",), "samples": 4, "seqlen": 16, "batch": 1}


@pytest.fixture(scope="module")
def wide_model(
    make_model: Callable[..., Path], tiny_llama: Callable[..., LlamaConfig]
) -> Callable[[int], Path]:
    return cache(lambda blocks: make_model(tiny_llama(intermediate_size=WIDE, num_hidden_layers=blocks)))


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def weights_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("allocation", "blocks", "limit"),
    [
        ("uniform", 4, 2_500_000),
        pytest.param("kl", 8, 6_200_000, marks=pytest.mark.slow),  # probes hold blocks in float32
    ],
)
def test_a_model_larger_than_the_device_gives_the_same_bytes_within_its_memory(
    wide_model: Callable[[int], Path],
    text_file: Path,
    tmp_path: Path,
    allocation: str,
    blocks: int,
    limit: int,
) -> None:
    source = wide_model(blocks)
    recipe = {"ratio": 4, "calib": str(text_file), "allocation": allocation, **ONLY}
    held, looks = list[int](), count()

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, LlamaDecoderLayer) and next(looks) % 5 == 0:  # a look takes as long as a block
            held.append(bytes_on_device())

    with reckoning_alike():
        compress(str(source), tmp_path / "host", Recipe.of(device="cpu", **recipe))
        with simulated_device() as simulation, ExitStack() as undone:
            undone.callback(register_module_forward_hook(look).remove)
            recipe |= {"device": "cuda", "device_memory": f"{limit}B"}
            manifest = compress(str(source), tmp_path / "device", Recipe.of(**recipe))
            assert bytes_on_device() < 10_000  # tables, no weights
    assert weights_of(tmp_path / "device") == weights_of(tmp_path / "host")
    total = sum(len(content) for content in weights_of(source).values())
    assert max(held) < limit < total < sum(simulation.to_device.values())
    assert total / 10 < manifest.memory["device_predicted"] <= limit


def test_layers_whose_squares_do_not_fit_are_solved_on_the_host_to_the_same_bytes(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = {"ratio": 4, "calib": str(text_file), "allocation": "uniform", "samples": 4, "seqlen": 16}
    recipe["include"] = ("*.q_proj", "*.down_proj")
    notes = Notes()
    with reckoning_alike():
        compress(str(tiny_model_dir), tmp_path / "host", Recipe.of(device="cpu", **recipe))
        with simulated_device():
            recipe |= {"device": "cuda", "device_memory": "1900KB"}
            compress(str(tiny_model_dir), tmp_path / "device", Recipe.of(**recipe), notes)
    assert "layers of more than 64 inputs are solved on the host" in notes.lines[-1]
    assert weights_of(tmp_path / "device") == weights_of(tmp_path / "host")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("500KB", r"model.layers.\d takes 0.00 GB, .* are allowed; allow more with --device-memory, or"),
        ("900KB", r"of device memory, 0.00 GB are allowed; lower --batch"),
    ],
    ids=["no block fits", "a block fits, but nothing beside it"],
)
def test_what_does_not_fit_the_device_is_refused_before_any_work(
    wide_model: Callable[[int], Path], text_file: Path, tmp_path: Path, size: str, message: str
) -> None:
    recipe = Recipe.of(ratio=4, calib=str(text_file), device="cuda", device_memory=size, **ONLY)
    with (
        simulated_device(),
        patch("lrsd.steps.prepare.observe_model", lambda *args, **named: pytest.fail("work was begun")),
        pytest.raises(InputError, match=message) as refused,
    ):
        compress(str(wide_model(4)), tmp_path / "work" / "out", recipe)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "work").exists() or list((tmp_path / "work").iterdir()) == []


def stack_of(blocks: int) -> nn.Module:
    """Linear blocks of 16 KB and an embedding of 4 KB."""
    model = nn.Sequential(
        nn.Linear(32, 32, bias=False), *(nn.Linear(64, 64, bias=False) for _ in range(blocks))
    )
    model.get_submodule("0").forward = lambda x: x  # type: ignore[method-assign]  # its weight is outside
    return model.requires_grad_(False)


def names_of(blocks: int) -> list[str]:
    return [str(number) for number in range(1, blocks + 1)]


@pytest.mark.parametrize(
    ("room", "brought"),
    [
        (4 + 6 * 16, [100, 100, 100]),  # all fit: brought once
        (4 + 3 * 16, [100, 148, 196]),  # three of six fit: in every pass the other three are brought
        (4 + 16, [100, 196, 292]),  # one fits: all are brought again, but what is in none
    ],
)
def test_as_much_stays_on_the_device_as_there_is_room_for(room: int, brought: list[int]) -> None:
    """What is brought in three passes, in KB: a model's blocks run in a circle, where the one that was not
    used for the longest time is the next."""
    found = []
    with simulated_device() as simulation:
        model = stack_of(6)
        onloading = Onloading(model, names_of(6), DEVICE, room * 1024)
        onloading.reserved = 0
        for _ in range(3):
            model(torch.zeros(1, 64).to(DEVICE))
            found.append(sum(simulation.to_device.values()) // 1024)
            assert onloading.held() <= room * 1024
        onloading.close()
        assert not any(isinstance(parameter, OnDevice) for parameter in model.parameters())
    assert found == brought


def test_finished_blocks_leave_first() -> None:
    with simulated_device():
        model = stack_of(3)
        onloading = Onloading(model, names_of(3), DEVICE, (4 + 2 * 16) * 1024)
        onloading.reserved = 0
        x = torch.zeros(1, 64).to(DEVICE)
        first, second, third = (model.get_submodule(name) for name in names_of(3))
        first(x)
        second(x)
        onloading.finished(first)
        third(x)
        assert [type(block.weight) is OnDevice for block in (first, second, third)] == [False, True, True]


def test_weights_on_the_host_stay_those_of_the_files_but_for_what_is_written(tiny_model_dir: Path) -> None:
    with simulated_device():
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).eval()
        files = MappedFiles()
        before = {name: (p.data_ptr(), p in files) for name, p in model.named_parameters()}
        residence = Residence(model, 2**40)
        residence.onload(["model.layers.0", "model.layers.1"], torch.device("cuda"), None)
        assert compute_device(model) == DEVICE
        with torch.no_grad():
            logits = model(torch.arange(5)[None].to(DEVICE)).logits
        assert isinstance(logits, OnDevice)
        slot = weight_slot(model, "model.layers.1.mlp.up_proj")
        written = slot.read() + 1
        assert isinstance(written, OnDevice)
        slot.write(written)
        residence.close()
        for name, parameter in model.named_parameters():
            assert not isinstance(parameter, OnDevice)
            if name != f"{slot.name}.weight":
                assert (parameter.data_ptr(), parameter in files) == before[name]
        assert torch.equal(slot.parameter, written.cpu().bfloat16())
        assert compute_device(model) == torch.device("cpu")


def test_on_cuda_the_next_block_is_copied_while_one_is_computed() -> None:
    """With streams that are none: what is called, and in which order."""
    calls: list[str] = []

    def told(what: str, result: Any = None) -> Callable[..., Any]:
        return lambda *args: calls.append(what) or result

    replaced: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.Stream": lambda device: SimpleNamespace(record_event=told("recorded", "event")),
        "torch.cuda.stream": lambda stream: nullcontext(),
        "torch.cuda.current_stream": lambda device: SimpleNamespace(wait_event=told("waits")),
        "torch.Tensor.pin_memory": lambda tensor: calls.append("copied") or tensor,
        "torch.Tensor.record_stream": lambda tensor, stream: None,
    }
    with simulated_device(), ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(patch(name, function))
        model = stack_of(3)
        for name in names_of(3):
            model.get_submodule(name).register_forward_pre_hook(told("begins"))
            model.get_submodule(name).register_forward_hook(told("ends"))
        Onloading(model, names_of(3), DEVICE, 2**20)
        model(torch.zeros(1, 64).to(DEVICE))
    copied = ["copied", "recorded"]
    outside, first = [*copied, "waits"], ["begins", *copied, "waits", "ends"]
    assert calls == [*outside, *first, *copied, "begins", "waits", "ends", *copied, "begins", "waits", "ends"]
