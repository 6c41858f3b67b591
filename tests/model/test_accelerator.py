"""Compression on an accelerator: the CPU's bytes, and no more launches, waits and copies than are known.

On a machine without one it is simulated (`tests/simulated.py`). A real one adds up in another order: there
two runs are compared with each other, and their errors with the CPU's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blocks import random_blocks
from gguf_files import write_llama
from golden import digest
from layers import random_layer
from recipes import on
from simulated import DEVICE, Phases, Simulation, reckoning_alike, simulated_device
from test_families import FAMILIES, calibration_for
from test_more_families import FAMILIES as MORE
from test_more_families import config_of
from torch import Tensor
from transformers import LlamaConfig

from lrsd.checkpoint.manifest import Manifest
from lrsd.compress import compress
from lrsd.data.self_text import self_calibration
from lrsd.errors import InputError
from lrsd.evaluate import evaluate
from lrsd.forms.ggml import BLOCK_TYPES, packed_blocks
from lrsd.forms.symmetric import Symmetric
from lrsd.model.load import load_model, resolve_device
from lrsd.numerics.blocks import round_to_blocks
from lrsd.numerics.lowrank import cholesky
from lrsd.numerics.metric import Metric
from lrsd.numerics.pruning import largest, prune, refit_entries
from lrsd.numerics.rounding import round_entropy_coded, round_groupwise
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps import estimate

REAL = torch.cuda.is_available()
# Some layers of each block, for what takes a loop over columns.
SOME = {"include": ("*.up_proj", "*.down_proj")}
FOR_ENGINES = {"method": "integers", "widths": "4", "format": "compressed-tensors"}
MODES: dict[str, dict[str, Any]] = {
    "entropy coded": {"ratio": 4},
    "without propagation": {"ratio": 4, "propagate": False, "rank": 3, "grid": "plain", **SOME},
    "weighed tokens": {"ratio": 4, "token_weights": True, "mean_correction": True, **SOME},
    "whole checkpoint": {"ratio": 2, "scope": "checkpoint"},
    "16 bit": {"ratio": 1.6, "bits": "16"},
    "columns": {"ratio": 1.6, "bits": "16", "structure": "column", "allocation": "kl"},
    "rows": {"ratio": 1.6, "bits": "16", "structure": "row", "allocation": "uniform"},
    "unstructured": {"ratio": 1.6, "bits": "16", "structure": "unstructured", **SOME},
    "blocks": {"ratio": 1.6, "bits": "16", "structure": "block", "block_size": 4, **SOME},
    "2:4": {"ratio": 1.6, "bits": "16", "structure": "2:4", **SOME},
    "fixed widths": {"ratio": 3, "bits": "4", **SOME},
    "gptq": {"ratio": 3, "method": "gptq", **SOME},
    "integers": {"ratio": 3, **FOR_ENGINES, "sweeps": 1, **SOME},
    "sparsegpt": {"ratio": 1.6, "method": "sparsegpt", **SOME},
    "ssd": {"ratio": 1.6, "method": "ssd"},
    "triple compression": {"ratio": 2, "method": "ssd", "bits": "4", "factor_bits": "8", **SOME},
    "wanda": {"ratio": 1.6, "method": "wanda", **SOME},
    "svd": {"ratio": 1.6, "method": "svd"},
    "asvd": {"ratio": 1.6, "method": "asvd"},
    "svd-llm": {"ratio": 1.6, "method": "svd-llm"},
    "column pruning": {"ratio": 1.6, "method": "columns"},
}
# Between reading the model and writing the result.
WORKING = ("observe", "compress")
# In the fast loop, with those of the families: experts, and transposed weights.
QUICK_MODES, QUICK_FAMILIES = {"entropy coded", "16 bit"}, {"mixtral", "gpt2"}
# Families whose blocks do nothing that those of another one here do not: run on a real device, and on the
# simulated one where they are asked for (`pytest --every-family`).
ALIKE = {
    "mistral", "qwen2", "qwen3", "granite", "smollm3", "olmo2", "starcoder2", "phi", "gemma2", "roberta",
    "qwen3-moe", "olmoe", "glm4-moe", "deepseek-v2", "zamba", "qwen3.5-text", "gemma4", "gemma3-vl",
    "mistral3", "qwen2.5-vl", "qwen3-vl",
}  # fmt: skip
# Where more than 4,096 numbers are worked on by the host between reading the model and writing the result.
HOST_WORK = {
    "numerics/rounding.py:_round_paths": "a path through a trellis is chosen row by row, by a compiled loop",
    "numerics/ans.py:_inputs": "entropy-coded bytes are written one after the other, by a compiled loop",
    "numerics/rounding.py:gaussian_table": "a table, made once in a process",
    "numerics/rounding.py:_density": "the same table",
    "work/records.py:read_record": "the text of a record, which is JSON",
    "forms/ggml.py:Ggml.dense": "llama.cpp's blocks are opened by its own package",
}
# By mode and phase: kernels launched and waits per layer of the tiny model, bytes to the device and to the
# host per weight; at least a seventh more than was counted, as releases of torch and transformers differ.
# Entropy-coded weights are rounded four times while a layer is observed, and go to the host and back each
# time. SSD tries 35 pairs of a rank and a share of S. Codes of fixed width take 9 launches for each of 64 or
# 160 columns and each of the roundings.
# Sums of another kind of processor round otherwise, and other layers are fitted again: codes as on AVX2.
BOUNDS: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "entropy coded": {"observe": (1600, 71, 23, 43), "compress": (370, 41, 14, 20)},
    "16 bit": {"observe": (860, 75, 1, 6), "compress": (750, 73, 11, 4)},
    "fixed widths": {"observe": (7790, 46, 1, 7), "compress": (2050, 31, 7, 1)},
    "integers": {"observe": (5330, 43, 1, 7), "compress": (3790, 28, 7, 1)},
    "sparsegpt": {"observe": (1020, 18, 1, 7), "compress": (760, 20, 7, 2)},
    "ssd": {"observe": (3300, 780, 7, 17), "compress": (620, 70, 7, 4)},
}


def accelerator(*, counts_kernels: bool = True) -> AbstractContextManager[Simulation | None]:
    return nullcontext() if REAL else simulated_device(counts_kernels=counts_kernels)


def marked(names: Any, quick: set[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed of a simulated accelerator is taken by what does not take seconds."""
    monkeypatch.setitem(estimate._SIDES, False, 64)


@pytest.fixture(scope="module")
def bases(make_model: Any, tiny_llama: Callable[..., LlamaConfig]) -> Callable[[str], Path]:
    @cache
    def make(name: str) -> Path:
        if name in FAMILIES:
            family = FAMILIES[name]
            return make_model(getattr(transformers, family.config)(**family.settings), family.head)
        return make_model(config_of(name), MORE[name][2]) if name in MORE else make_model(tiny_llama())

    return make


@pytest.fixture
def text(text_file: Path) -> Calibration:
    return Calibration(calib=str(text_file), samples=3, seqlen=16)


def on_cpu(base: Path, output: Path, recipe: Recipe) -> Manifest:
    with reckoning_alike():
        return compress(str(base), output, recipe)


def require_alike(
    base: Path, recipe: dict[str, Any], text: Calibration, manifest: Manifest, output: Path
) -> None:
    """A result of an accelerator is what a CPU makes of the same; to the byte, if it was simulated."""
    other = output.with_name("cpu")
    expected = on_cpu(base, other, on(Recipe.of(**recipe, device="cpu"), text))
    assert {name: layer.layer for name, layer in manifest.layers.items()}.keys() == expected.layers.keys()
    if not REAL:
        assert manifest.environment["device"] == "cuda simulated"
        assert digest(output) == digest(other)
        return
    again = output.with_name("again")
    compress(str(base), again, on(Recipe.of(**recipe, device="cuda"), text))
    assert digest(output) == digest(again)
    assert manifest.linear_bytes == pytest.approx(expected.linear_bytes, rel=0.02)
    errors, others = (sum(layer.error for layer in m.layers.values()) for m in (manifest, expected))
    assert errors == pytest.approx(others, rel=0.1, abs=1e-4)


def require_bounded(
    device: Simulation, manifest: Manifest, bounds: dict[str, tuple[float, float, float, float]]
) -> None:
    assert {where for when, where in device.host_work if when in WORKING} <= HOST_WORK.keys()
    layers, weights = len(manifest.layers), manifest.dense_linear_bytes / 2
    for phase in WORKING:
        found = (
            device.launches[phase] / layers, device.syncs[phase] / layers,
            device.to_device[phase] / weights, device.to_host[phase] / weights,
        )  # fmt: skip
        for count, bound in zip(found, bounds.get(phase, found), strict=True):
            assert count <= bound, (phase, found)


@pytest.mark.parametrize("mode", marked(MODES, QUICK_MODES))
def test_a_mode_gives_what_a_cpu_gives_within_its_bounds(
    bases: Callable[[str], Path], text: Calibration, tmp_path: Path, mode: str
) -> None:
    base, recipe = bases("llama"), MODES[mode]
    with accelerator() as device:
        phases = Phases(device) if device else Progress()
        manifest = compress(str(base), tmp_path / "out", on(Recipe.of(**recipe, device="cuda"), text), phases)
    if device:
        require_bounded(device, manifest, BOUNDS.get(mode, {}))
    require_alike(base, recipe, text, manifest, tmp_path / "out")


@pytest.mark.parametrize("name", marked([*FAMILIES, *MORE], QUICK_FAMILIES))
def test_a_family_runs(
    bases: Callable[[str], Path], text: Calibration, text_file: Path, tmp_path: Path, name: str,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if name in ALIKE and not REAL and not request.config.getoption("--every-family"):
        pytest.skip("as another family")
    if name == "whisper":
        text = calibration_for(FAMILIES[name], text_file, tmp_path)
    base, recipe = bases(name), {"ratio": 1.6, "bits": "16", "structure": "none"}
    with accelerator(counts_kernels=False):
        manifest = compress(str(base), tmp_path / "out", on(Recipe.of(**recipe, device="cuda"), text))
    assert 0 < manifest.linear_bytes <= manifest.budget_bytes
    if name in QUICK_FAMILIES:
        require_alike(base, recipe, text, manifest, tmp_path / "out")


@pytest.mark.slow
def test_a_gguf_file_becomes_one(
    tiny_llama: Callable[..., LlamaConfig], tokenizer: Any, text: Calibration, tmp_path: Path
) -> None:
    config = tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    source = write_llama(tmp_path / "tiny.gguf", config, tokenizer)
    types = "IQ4_XS,Q3_K,Q8_0"
    recipe = {"ratio": 2.2, "method": "gguf", "format": "gguf", "types": types, "sweeps": 0}
    with accelerator() as device:
        phases, output = Phases(device) if device else Progress(), tmp_path / "out.gguf"
        manifest = compress(str(source), output, on(Recipe.of(**recipe, device="cuda"), text), phases)
    expected = on_cpu(source, tmp_path / "cpu.gguf", on(Recipe.of(**recipe, device="cpu"), text))
    assert expected.budget_bytes == manifest.budget_bytes >= manifest.linear_bytes
    if device:
        assert manifest.files == expected.files
        assert {where for when, where in device.host_work if when in WORKING} <= HOST_WORK.keys()


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_are_packed_where_their_codes_are(generator: torch.Generator, kind: str) -> None:
    codes = random_blocks(kind, generator)
    with simulated_device() as device:
        moved = {f.name: getattr(codes, f.name).to("cuda") for f in fields(codes) if f.name != "grid"}
        before = device.syncs.total()
        blocks = packed_blocks(kind, replace(codes, **moved))
        assert (blocks.device, device.syncs.total()) == (DEVICE, before)
        assert torch.equal(blocks.cpu(), packed_blocks(kind, codes))


class Stop(Progress):
    """Ctrl-C once the first block is compressed."""

    def stage(self, name: str, steps: int) -> None:
        self._name = name

    def step(self, what: str) -> None:
        if self._name == "compress":
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on(
    bases: Callable[[str], Path], text: Calibration, tmp_path: Path
) -> None:
    base, recipe, output = bases("llama"), {"ratio": 4}, tmp_path / "out"
    with accelerator():
        asked = on(Recipe.of(**recipe, device="cuda"), text)
        with pytest.raises(KeyboardInterrupt):
            compress(str(base), output, asked, Stop())
        manifest = compress(str(base), output, asked, resume=True)
    require_alike(base, recipe, text, manifest, output)


@pytest.mark.slow
def test_text_of_the_model_itself_and_a_measurement(
    bases: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = str(bases("tiny"))
    found: list[Tensor] = []
    results = []
    for place in ("cpu", "cuda"):
        with reckoning_alike(), accelerator():
            loaded = load_model(base, device=place)
            drawn = self_calibration(
                loaded.model, loaded.require_tokenizer(), place, 0, Progress(), samples=2, seqlen=12, seed=0
            )  # fmt: skip
            found.append(drawn)
            results.append(
                evaluate(
                    base, (str(text_file),), seqlen=24, windows=2, dense=base, with_speed=True, device=place
                )
            )
    assert found[1].device.type == "cpu"
    assert REAL or torch.equal(*found)
    cpu, other = (result.perplexity[0].perplexity for result in results)
    assert other == pytest.approx(cpu, rel=0.01)
    assert results[1].speed is not None
    assert results[1].speed.device == "cuda:0"


# Launches per column of each rounding; of coordinate descent, per sweep.
ROUNDINGS: dict[str, tuple[float, Callable[[Tensor, Metric], Any]]] = {
    "entropy coded": (0, lambda W, m: round_entropy_coded(W, m.factor, 0.1, 64)),
    "group-wise": (9.2, lambda W, m: round_groupwise(W, m.factor, 4, 32)),
    "around zero": (
        9.2, lambda W, m: round_to_blocks(W, m.factor, m.damped, Symmetric(4, 32).grid, sweeps=0),
    ),
    "around zero, descent": (
        9.2 + 14.4, lambda W, m: round_to_blocks(W, m.factor, m.damped, Symmetric(4, 32).grid, sweeps=1),
    ),
    "levels of a table": (
        9.2, lambda W, m: round_to_blocks(W, m.factor, m.damped, BLOCK_TYPES["IQ4_NL"].grid, sweeps=0),
    ),
    "two tiers of scales": (
        9.2 + 15, lambda W, m: round_to_blocks(W, m.factor, m.damped, BLOCK_TYPES["Q4_K"].grid, sweeps=1),
    ),
    "pruning": (4.2, lambda W, m: prune(W, m.factor, largest(24 * 64, m.width))),
    "entries refitted": (3.3, lambda W, m: refit_entries(W, W, W > 0, m.damped, sweeps=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDINGS)
def test_launches_per_column(generator: torch.Generator, name: str) -> None:
    bound, solve = ROUNDINGS[name]
    launches, waits = [], []
    for columns in (256, 512):
        layer = random_layer(generator, 48, columns)
        with simulated_device() as device:
            metric = Metric(layer.gram.to("cuda"), damps_by_channel=True)
            metric.factor.on_host, metric.damped  # noqa: B018 - shared by all layers of a group
            W_OI, before = layer.W_OI.to("cuda"), (device.launches.total(), device.syncs.total())
            solve(W_OI, metric)
            launches.append(device.launches.total() - before[0])
            waits.append(device.syncs.total() - before[1])
    assert bound - 1 <= (launches[1] - launches[0]) / 256 <= bound
    assert waits[0] == waits[1] <= 6


def test_a_factor_that_is_not_finite_is_none() -> None:
    """Whatever the library says: those of accelerators may find nothing wrong with NaN."""
    spoilt = torch.eye(5).double()
    for value in (torch.nan, torch.inf, -1.0):
        for place in [(0, 0), (4, 4), (3, 1)]:
            matrix = spoilt.clone()
            matrix[place] = value
            if place[0] != place[1] and value == -1.0:
                continue
            assert cholesky(matrix) is None
    torch.testing.assert_close(cholesky(4 * spoilt), 2 * spoilt)


def test_a_device_that_is_not_there_is_refused() -> None:
    with simulated_device():
        assert resolve_device("auto") == resolve_device("cuda:0") == DEVICE
        with pytest.raises(InputError, match="'cuda:1' is not available: CUDA error: invalid device ordinal"):
            resolve_device("cuda:1")
