"""Laws of the recovery: bytes stay, integers stay, gradients reach what is continuous and nothing else, no
loss on held-out samples rises, and an interruption changes nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from families import EXPERTS, TWO_STACKS
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    LlamaConfig,
    MixtralConfig,
)

from lrsd.checkpoint.manifest import CARD_NAME, REPORT_NAME, read_manifest
from lrsd.checkpoint.reader import StoredModel
from lrsd.checkpoint.verify import verify
from lrsd.compress import compress
from lrsd.errors import InputError, LrsdError, NumericsError, SettingsError
from lrsd.forms.packed import PackedLinear
from lrsd.model.load import load_model
from lrsd.recipe import Recipe
from lrsd.training import blocks as by_block
from lrsd.training.differentiable import Differentiable, store, trainable
from lrsd.training.recover import recover
from lrsd.training.settings import Recovery
from lrsd.work.journal import Journal, partial_directory

# One of each form.
RECIPES: dict[str, dict[str, Any]] = {
    "columns": {"bits": "16", "ratio": 1.6},
    "rows": {"bits": "16", "structure": "row", "ratio": 1.6},
    "two of four": {"bits": "16", "structure": "2:4", "ratio": 1.25},
    "entries": {"bits": "16", "structure": "unstructured", "allocation": "energy", "ratio": 1.6},
    "added bias": {"bits": "16", "mean_correction": True, "ratio": 1.6},
    "channels of entries and codes": {
        "method": "ssd",
        "structure": "row",
        "bits": "4",
        "group": 8,
        "ratio": 1.6,
    },
    "fixed codes": {"bits": "4", "group": 24, "ratio": 1.6},
    "symmetric codes": {"method": "integers", "ratio": 3},
    "trellis codes": {"rank": 3, "ratio": 3, "propagate": False},
    # At 3x the layers are left so little, beside embeddings of 8 bit, that some are zero, and stop gradients.
    "whole checkpoint": {"scope": "checkpoint", "ratio": 2.6},
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT = {"samples": 8, "seqlen": 32, "batch": 4}
SETTINGS: dict[str, Any] = {
    "samples": 32, "seqlen": 32, "batch": 4, "block_epochs": 3, "model_epochs": 3, "block_rate": 0.003,
    "model_rate": 0.003,
}  # fmt: skip

Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def llama(make_model: Any, tiny_llama: Callable[..., LlamaConfig]) -> Path:
    return make_model(tiny_llama(**SMALL))


@pytest.fixture(scope="module")
def compressed(
    llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Made]:
    """The tiny model, and what a recipe makes of it, once each."""
    made: dict[str, Path] = {}

    def of(name: str) -> Made:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("compressed") / "out"
            compress(str(llama), made[name], Recipe.of(calib=str(text_file), **TEXT, **RECIPES[name]))
        return llama, made[name]

    return of


def settings(text: Path, **changes: Any) -> Recovery:
    return Recovery(text=str(text), **SETTINGS | changes)


def shards(directory: Path) -> dict[str, Path]:
    return {path.name: path for path in directory.glob("*.safetensors")}


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in shards(directory).values() for name, t in load_file(path).items()}


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors that differ. Both have the same names, shapes, types and places in their files."""
    assert shards(before).keys() == shards(after).keys()
    for name, path in shards(before).items():
        size = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.read_bytes()[:size] == shards(after)[name].read_bytes()[:size]
        assert path.stat().st_size == shards(after)[name].stat().st_size
    old, new = tensors(before), tensors(after)
    return {name for name in old if not torch.equal(old[name], new[name])}


def continuous_names(directory: Path) -> set[str]:
    """By the specifications of the forms, and not by what the training asks."""
    names = set()
    for stored in StoredModel(directory).layers():
        for part, tensor in stored.tensors.items():
            if stored.packed is not None:
                if stored.packed.layer.tensors(stored.packed.shape)[part].dtype is None and tensor.numel():
                    names.add(f"{stored.name}.{part}")
            elif tensor.dim() == 1 and tensor.is_floating_point():
                names.add(f"{stored.name}.{part}")
    return names


# --- what changes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_only_values_of_continuous_tensors_change(
    name: str, compressed: Callable[[str], Made], text_file: Path, tmp_path: Path
) -> None:
    dense, before = compressed(name)
    (before / REPORT_NAME).write_text("on what it was before")
    manifest = recover(before, str(dense), tmp_path / "out", settings(text_file, stage="both"))
    assert not (tmp_path / "out" / REPORT_NAME).exists()
    allowed, differ = continuous_names(before), changed(before, tmp_path / "out")
    assert differ <= allowed
    assert {part.rpartition(".")[2] for part in allowed} == {part.rpartition(".")[2] for part in differ}
    assert not partial_directory(tmp_path / "out").exists()
    verify(tmp_path / "out")
    known = read_manifest(before)
    assert replace(manifest, recovery={}, files={}, seconds={}, memory={}) == replace(
        known, files={}, seconds={}, memory={}
    )
    assert "were then trained" in (tmp_path / "out" / CARD_NAME).read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_reach_what_is_continuous_and_nothing_else(
    name: str, compressed: Callable[[str], Made]
) -> None:
    _, directory = compressed(name)
    model = load_model(str(directory)).model.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    dense = {n: m.dense_weight() for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    ids = torch.arange(24)[None] * 7 % 290
    expected = model(ids).logits.float()
    with trainable(model) as masters:
        found = model(ids).logits
        # The stand-ins compute what the packed layers do, whose products are rounded to 16 bit.
        assert (found - expected).square().sum() < 1e-3 * expected.square().sum()
        for module_name, module in model.named_modules():
            if isinstance(module, Differentiable):
                x = torch.eye(module.in_features)
                bias = module(torch.zeros_like(x))
                assert torch.allclose((module(x) - bias).T, dense[module_name], atol=1e-5)
        found.log_softmax(-1)[..., 0].mean().backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert reached == set(masters) == continuous_names(directory)
        assert all(p.dtype == torch.float32 for p in masters.values())
        with torch.no_grad():
            for master in masters.values():
                master.add_(1.0)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for n, tensor in before.items():
        assert tensor.dtype == after[n].dtype
        assert torch.equal(tensor, after[n])
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- what it is good for ----------------------------------------------------------------------------


def test_masters_are_no_part_of_the_module_and_new_values_are_seen_at_once(
    compressed: Callable[[str], Made],
) -> None:
    """A gain that is float32 already is trained in a copy; what was decoded of old values is forgotten."""
    model = load_model(str(compressed("two of four")[1])).model
    block = model.get_submodule("model.layers.0")
    norm = block.get_submodule("input_layernorm")
    norm.weight.data = norm.weight.data.float()
    before = norm.weight.detach().clone()
    layers = [m for m in block.modules() if isinstance(m, PackedLinear)]
    packed = next(m for m in layers if any(t.name == "semi_structured" for t in m.layer.terms))
    packed.decoded()
    assert packed._decoded
    with trainable(block) as masters:
        for master in masters.values():
            master.data.add_(1)
        names = sorted(masters)
    assert torch.equal(norm.weight, before)
    store(block, {name: block.get_parameter(name).detach() + 1 for name in names})
    assert any(block.get_submodule(name.rpartition(".")[0]) is packed for name in names)
    assert not packed._decoded


@pytest.mark.parametrize("name", ["columns", "fixed codes", "trellis codes"])
def test_what_is_recovered_is_nearer_to_the_dense_model(
    name: str, compressed: Callable[[str], Made], text_file: Path, tmp_path: Path
) -> None:
    """By logits on other text, measured without anything of the training."""
    dense, before = compressed(name)
    recover(
        before, str(dense), tmp_path / "out",
        settings(text_file, stage="both", samples=48),
    )  # fmt: skip
    ids = torch.randint(3, 300, (4, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = load_model(str(dense)).model(ids).logits.float()
        errors = [
            float((load_model(str(path)).model(ids).logits.float() - wanted).square().sum())
            for path in (before, tmp_path / "out")
        ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("rate", [1e-3, 1.0])
def test_no_held_out_loss_rises(
    rate: float, compressed: Callable[[str], Made], text_file: Path, tmp_path: Path
) -> None:
    """At a rate that ruins everything all is kept as it was."""
    dense, before = compressed("columns")
    manifest = recover(
        before, str(dense), tmp_path / "out",
        settings(text_file, stage="both", block_rate=rate, model_rate=rate),
    )  # fmt: skip
    done = manifest.recovery
    for losses in [*done["blocks"].values(), done["kl"]]:
        assert min(losses) <= losses[0]
    differ = changed(before, tmp_path / "out")
    assert bool(differ) == (rate < 1)


def test_blocks_read_what_the_recovered_ones_before_them_give(
    compressed: Callable[[str], Made], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block's loss at the start is that of the written result with that block as it was."""
    dense, before = compressed("columns")
    done = recover(before, str(dense), tmp_path / "out", settings(text_file)).recovery
    plain, found = (load_model(str(path)).model for path in (before, tmp_path / "out"))
    first, second = (f"model.layers.{i}" for i in (0, 1))
    assert min(done["blocks"][first]) < done["blocks"][first][0]
    found.set_submodule(second, plain.get_submodule(second))
    samples = held_out_samples(dense, text_file)
    errors = []
    for model in (found, plain):
        errors.append(float(by_block.relative_error(leaving(model, second, samples), leaving(
            load_model(str(dense)).model, second, samples))))  # fmt: skip
    assert done["blocks"][second][0] == pytest.approx(errors[0], rel=0.02)
    assert abs(errors[0] - done["blocks"][second][0]) < abs(errors[1] - done["blocks"][second][0])


def held_out_samples(dense: Path, text: Path) -> Tensor:
    from lrsd.data.tokens import calibration_samples
    from lrsd.progress import Progress

    found = calibration_samples(load_model(str(dense)), "", settings(text).calibration, Progress())
    return found.inputs["input_ids"][-4:]


@torch.no_grad()
def leaving(model: Any, block: str, ids: Tensor) -> Tensor:
    kept: list[Any] = []
    handle = model.get_submodule(block).register_forward_hook(lambda m, a, output: kept.append(output))
    model(ids)
    handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


# --- interruptions ----------------------------------------------------------------------------------


def test_a_recovery_killed_at_any_journal_line_ends_byte_identical(
    compressed: Callable[[str], Made], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, before = compressed("columns")
    asked = settings(text_file, stage="both")
    monkeypatch.setattr("lrsd.training.whole.EVERY", 4)

    def run(output: Path) -> dict[str, bytes]:
        recover(before, str(dense), output, asked, resume=True)
        return {path.name: path.read_bytes() for path in output.iterdir() if path.name != "run.json"}

    expected = run(tmp_path / "whole")
    finish, stops = Journal.finish, 0

    def killed(journal: Journal, step: str, *more: Any, **named: Any) -> None:
        """Each session finishes one step, and is killed."""
        finish(journal, step, *more, **named)
        if step != "text":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", killed)
        while True:
            try:
                found = run(tmp_path / "pieces")
                break
            except KeyboardInterrupt:
                stops += 1
                assert stops < 50
    # Two blocks, five states of the model and the whole of it, what is written.
    assert stops == 9
    assert found == expected
    assert run(tmp_path / "pieces") == expected  # there is nothing left to do


def test_another_recovery_does_not_go_on_with_it(
    compressed: Callable[[str], Made], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, before = compressed("columns")

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lrsd.training.recover._write", stop)
        with pytest.raises(KeyboardInterrupt):
            recover(before, str(dense), tmp_path / "out", settings(text_file))
    with pytest.raises(InputError, match="add --resume"):
        recover(before, str(dense), tmp_path / "out", settings(text_file))
    with pytest.raises(InputError, match=r"recovery\.block_epochs was 3, is 4"):
        recover(before, str(dense), tmp_path / "out", settings(text_file, block_epochs=4), resume=True)


# --- families ---------------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[Any, Any]] = {
    "experts": (MixtralConfig, EXPERTS),
    "encoder-decoder": (BartConfig, TWO_STACKS | {"max_position_embeddings": 64, "init_std": 0.1}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_recovered(family: str, make_model: Any, text_file: Path, tmp_path: Path) -> None:
    kind, sizes = FAMILIES[family]
    dense = make_model(kind(**sizes), AutoModelForSeq2SeqLM if kind is BartConfig else AutoModelForCausalLM)
    recipe = Recipe.of(calib=str(text_file), **TEXT, **RECIPES["columns"])
    before = tmp_path / "before"
    compress(str(dense), before, recipe)
    done = recover(before, str(dense), tmp_path / "out", settings(text_file, stage="both"))
    assert any(min(losses) < losses[0] for losses in done.recovery["blocks"].values())
    assert len(done.recovery["blocks"]) == (4 if kind is BartConfig else 2)
    differ = changed(before, tmp_path / "out")
    assert differ
    assert differ <= continuous_names(before)


# --- refusals ---------------------------------------------------------------------------------------


def test_another_dense_model_is_refused(
    compressed: Callable[[str], Made], tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    _, before = compressed("columns")
    with pytest.raises(InputError, match=r"fingerprint .* expected .* give that model as --dense"):
        recover(before, str(tiny_model_dir), tmp_path / "out", settings(text_file))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_recovered_is_refused(
    compressed: Callable[[str], Made], text_file: Path, tmp_path: Path
) -> None:
    dense, before = compressed("columns")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("years of work")
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads((before / "lrsd.json").read_text())
    manifest["recipe"]["format"] = "compressed-tensors"
    (other / "lrsd.json").write_text(json.dumps(manifest))
    cases: list[tuple[Path, Path, str, Any]] = [
        (dense, tmp_path / "out", "holds no lrsd.json", text_file),
        (other, tmp_path / "out", "in format compressed-tensors; expected lrsd's own", text_file),
        (before, tmp_path / "there", "already exists and is not empty", text_file),
        (before, tmp_path / "out", "--text: no file", "no-such-text.txt"),
    ]
    for directory, output, said, text in cases:
        with pytest.raises(LrsdError, match=said) as error:
            recover(directory, str(dense), output, settings(text))
        assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "other"}


def test_a_damaged_checkpoint_is_refused(
    compressed: Callable[[str], Made], text_file: Path, tmp_path: Path
) -> None:
    dense, before = compressed("columns")
    copytree(before, tmp_path / "damaged")
    shard = next(iter(shards(tmp_path / "damaged").values()))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LrsdError, match="is not as lrsd wrote it"):
        recover(tmp_path / "damaged", str(dense), tmp_path / "out", settings(text_file))


def test_a_loss_that_is_not_finite_ends_it(
    compressed: Callable[[str], Made], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, before = compressed("columns")
    monkeypatch.setattr(by_block, "relative_error", lambda found, wanted: found.sum() * float("nan"))
    with pytest.raises(NumericsError, match=r"loss of model\.layers\.0 is nan"):
        recover(before, str(dense), tmp_path / "out", settings(text_file))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", ["0", "-1", "2", "nan", "fast"])
def test_impossible_rates_are_refused(rate: str) -> None:
    with pytest.raises(SettingsError):
        Recovery.of(block_rate=rate)
