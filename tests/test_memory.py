"""Memory: what is predicted covers what is held, and what is freed goes back to the system."""

import gc
import json
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import SOLVING, random_layer
from recipes import on
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrsd.compress import compress, dry_run
from lrsd.errors import InputError, SettingsError
from lrsd.methods import METHODS
from lrsd.methods.base import LayerProblem
from lrsd.model.layout import find_layout
from lrsd.model.load import load_model
from lrsd.model.samples import Samples
from lrsd.numerics.metric import Metric
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration, parse_size
from lrsd.steps.estimate import (
    ResourceEstimate,
    Speed,
    TimeEstimate,
    estimate_resources,
    estimate_time,
)
from lrsd.work.process import current_rss, peak_rss, release_freed
from lrsd.work.residency import MappedFiles, Residence


def test_freed_blocks_go_back_to_the_system() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux says how much memory is held now")
    pieces = [torch.ones(2**18) for _ in range(64)]  # 64 MB in pieces that the C library keeps
    held = current_rss()
    assert held >= 64 * 2**20
    assert peak_rss() > 0.9 * held
    last = pieces.pop()
    del pieces
    release_freed()
    assert current_rss() < held - 48 * 2**20
    assert last.sum() == 2**18


def test_weights_mapped_from_files_are_released_and_read_again(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("only Linux maps files so")
    tensors = {name: torch.randn(2**22) for name in ("read", "changed")}  # 16 MB each
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / name)
    mapped = {name: load_file(tmp_path / name)[name] for name in tensors}
    mapped["changed"] += 1
    files = MappedFiles()
    assert mapped["read"] in files
    assert mapped["changed"] not in files
    assert tensors["read"] not in files
    assert mapped["read"].sum() == tensors["read"].sum()
    held = current_rss()
    MappedFiles.release(files.pages([*mapped.values(), *tensors.values()]))
    assert current_rss() < held - 14 * 2**20
    assert torch.equal(mapped["read"], tensors["read"])
    assert torch.equal(mapped["changed"], tensors["changed"] + 1)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "lrsd" else pytest.mark.slow) for name in SOLVING]
)
def test_what_a_layer_is_solved_with_goes_with_it(method: str, generator: torch.Generator) -> None:
    """Without a garbage collection: matrices are few objects of many bytes, which never set one off."""
    layer = random_layer(generator, 48, 64)
    rule = METHODS[method]()
    gc.collect()
    gc.disable()
    try:
        problem = LayerProblem(layer.W_OI, Metric(layer.gram), torch.bfloat16, 1900.0)
        metric = problem.metric
        choice = rule.offer(problem).choice(0)
        rule.probe(problem, rule.offer(problem))
        rule.solve(problem, choice)
        rule.solve(problem.single(), choice, quick=True)
        held = [weakref.ref(o) for o in (problem, metric, metric.single, metric.gram, metric.factor.upper_II)]
        del problem, metric
        assert [reference() for reference in held] == [None] * len(held)
    finally:
        gc.enable()


def needs(model_dir: Path, count: int = 8, limit: int = 2**40, **changes: Any) -> ResourceEstimate:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    samples = Samples({"input_ids": torch.zeros(count, 32, dtype=torch.int64)})
    layout = find_layout(model, samples)
    settings = Recipe.of(ratio=4, batch=1, **changes)
    residence = Residence(model, limit)
    return estimate_resources(model, layout, samples, settings, residence, budget=10**6)


def test_another_format_takes_the_disk_of_a_second_checkpoint(tiny_model_dir: Path) -> None:
    own, other = (
        needs(tiny_model_dir, method="integers", format=name).disk for name in ("lrsd", "compressed-tensors")
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    layout = find_layout(model, Samples({"input_ids": torch.zeros(1, 8, dtype=torch.int64)}))
    dense = sum(spec.shape.dense_bytes for spec in layout.linears.values())
    assert other - own == 10**6 + sum(p.nbytes for p in model.parameters()) - dense


def test_samples_take_disk_not_memory(tiny_model_dir: Path) -> None:
    for propagate, streams in ((False, 3), (True, 6)):
        few, many = (needs(tiny_model_dir, count, propagate=propagate) for count in (8, 9))
        inputs = (64 + 64 + 64 + 160) if propagate else 0
        assert many.disk - few.disk == 2 * 32 * (streams * 64 + inputs)
        assert many.memory == pytest.approx(few.memory, rel=0.01)


def test_what_propagation_holds_is_that_of_one_layer_and_grows_with_its_width(
    make_model: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the width is twice the weights and four times the moments; other blocks wait on disk."""
    monkeypatch.setattr(Residence, "at_rest", lambda self: 2**40)  # beyond this process's peak so far
    held = {}
    for name, changes in (("", {}), ("deep", {"num_hidden_layers": 4}), ("wide", {"intermediate_size": 320})):
        model = make_model(tiny_llama(**changes))
        plain, propagated = (needs(model, propagate=propagate).memory for propagate in (False, True))
        held[name] = propagated - plain
    assert 0 < held[""] == held["deep"]
    assert 2 * held[""] < held["wide"] < 4 * held[""]


@pytest.mark.parametrize("method", ["gptq", "svd-llm", "sparsegpt", "lrsd"])
def test_propagation_is_counted_for_the_methods_that_propagate_or_where_it_is_asked_for(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """gptq and svd-llm calibrate on the dense model's activations, unless they are told otherwise."""
    monkeypatch.setattr(Residence, "at_rest", lambda self: 2**40)  # beyond this process's peak so far
    left, without, propagated = (
        needs(tiny_model_dir, method=method, propagate=asked) for asked in (None, False, True)
    )
    assert propagated.memory > without.memory
    assert propagated.disk > without.disk
    assert left == (propagated if method == "lrsd" else without)


@pytest.mark.parametrize("rounds", [True, False])
def test_the_time_estimated_grows_with_the_text_and_with_propagation(
    tiny_model_dir: Path, rounds: bool
) -> None:
    """Passes of a minute each per eight samples; products and roundings take next to nothing."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    layout = find_layout(model, Samples({"input_ids": torch.zeros(1, 8, dtype=torch.int64)}))
    recipe = Recipe.of(ratio=4, bits="auto" if rounds else "16", allocation="kl")

    def estimated(samples: int) -> TimeEstimate:
        text = Samples({"input_ids": torch.zeros(samples, 8, dtype=torch.int64)})
        return estimate_time(model, layout, text, recipe, Speed(1e-12, 1e-12, 1e-12), 60 * samples / 8)

    short, long = estimated(16), estimated(32)
    assert short.total(propagate=False) == pytest.approx(120, rel=0.05)
    assert long.total(propagate=False) == pytest.approx(240, rel=0.05)
    assert short.total(propagate=True) == pytest.approx(480, rel=0.05)
    followed = 16 if rounds else 32
    assert long.total(propagate=True) == pytest.approx(240 + 3 * 60 * followed / 8, rel=0.05)
    # Of a calibration pass that took twice as long as estimated, so will the rest.
    for propagate in (False, True):
        rest = short.total(propagate=propagate) - short.observe
        assert short.remaining(2 * short.observe, propagate=propagate) == pytest.approx(2 * rest)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True), ({"propagate": False}, False), slow({"bits": "16"}, True),
        slow({"bits": "16", "propagate": False}, False), slow({"method": "gptq"}, False),
        slow({"method": "gptq", "propagate": True}, True), slow({"method": "svd-llm"}, False),
    ],
)  # fmt: skip
def test_the_time_that_is_told_counts_propagation_where_it_is_to_be_expected(
    tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, options: Any, expected: bool
) -> None:
    """An hour of each, so that what is counted can be read off."""
    hours = TimeEstimate(observe=3600, fit=3600, propagate=3600)
    monkeypatch.setattr("lrsd.steps.prepare.estimate_time", lambda *arguments, **named: hours)
    said: list[str] = []

    class Notes(Progress):
        def note(self, text: str) -> None:
            said.append(text)

    calibration = Calibration(calib=str(text_file), samples=2, seqlen=8)
    recipe = Recipe.of(ratio=1.5, allocation="uniform", **options)
    dry_run(str(tiny_model_dir), on(recipe, calibration), Notes())
    assert f" {180 if expected else 120} min" in said[-1]


def test_what_does_not_fit_is_refused_before_any_work(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=32)
    settings = Recipe.of(ratio=4)

    def run(**changes: Any) -> None:
        compress(str(tiny_model_dir), tmp_path / "work" / "out", on(settings, calibration), **changes)

    monkeypatch.setattr(
        "lrsd.steps.prepare.observe_model", lambda *arguments, **named: pytest.fail("work was begun")
    )
    with pytest.raises(InputError, match=r"of memory, 0\.10 GB are allowed; lower"):
        run(memory=10**8)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**4))
        with pytest.raises(InputError, match=r"of disk, .* has 0\.00 GB"):
            run()
    assert list((tmp_path / "work").iterdir()) == []


def test_weights_to_be_converted_must_fit_before_they_are_read(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    load_model(str(tiny_model_dir), memory=1)  # bfloat16 stays in its files
    copytree(tiny_model_dir, tmp_path / "wide")
    model.float().save_pretrained(tmp_path / "wide")
    nbytes = 2 * sum(parameter.numel() for parameter in model.parameters())
    load_model(str(tmp_path / "wide"), memory=nbytes)
    monkeypatch.setattr(type(model), "from_pretrained", lambda *args, **kw: pytest.fail("it was read"))
    with pytest.raises(InputError, match=r"is converted to bfloat16 in memory, .* or allow more"):
        load_model(str(tmp_path / "wide"), memory=nbytes - 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells no more")
def test_a_peak_is_that_of_this_process_not_of_the_one_that_started_it() -> None:
    held = torch.ones(2**28)  # 1 GB
    program = "from lrsd.work.process import peak_rss; print(peak_rss())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < held.nbytes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives mapped files back")
def test_paged_weights_give_the_same_bytes_with_less_memory(
    make_model: Any, tiny_llama: Any, text_file: Path, tmp_path: Path
) -> None:
    """In processes of their own, whose peaks can be compared: of 300 MB of weights few are compressed."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12}
    model = make_model(tiny_llama(**sizes))
    options = ["--samples", "4", "--seqlen", "16", "--shard-size", "50MB"]
    options += ["--include", "*.layers.[05].*q_proj"]
    command = [sys.executable, "-m", "lrsd_cli.main", "compress", str(model), "--ratio", "4x", "--json"]
    command += ["--calib", str(text_file), *options, "--allocation", "uniform"]
    found = {}
    for name, more in (("whole", []), ("paged", ["--memory", "850MB"])):
        done = subprocess.run([*command, "-o", str(tmp_path / name), *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)["memory"]
        assert ("weights are paged" in done.stderr) == (name == "paged")
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "paged" / shard.name).read_bytes()
    assert found["paged"]["peak"] < found["whole"]["peak"] - 150 * 10**6
    assert found["paged"]["peak"] == pytest.approx(found["paged"]["predicted"], rel=0.15)


def test_the_manifest_reports_both(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=32)
    settings = Recipe.of(ratio=4, propagate=False)
    memory = compress(str(tiny_model_dir), tmp_path / "out", on(settings, calibration)).memory
    assert 2**27 < memory["predicted"] < 2**33
    assert memory["peak"] == pytest.approx(memory["predicted"], rel=0.15)


@pytest.mark.parametrize(("text", "size"), [("4GiB", 2**32), ("500MB", 5 * 10**8), ("1.5G", 3 * 2**29)])
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "GiB", "-1GB", "0GB", "1XB", "1e3GB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="4GiB"):
        parse_size(text)
