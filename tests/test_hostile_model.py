"""Models and activations that break naive compressors: they end within the budget, or it is said why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lrsd_cli.main import commands
from safetensors.torch import load_file, save_file

from lrsd.checkpoint.manifest import Manifest
from lrsd.checkpoint.reader import stored_bytes
from lrsd.compress import compress
from lrsd.errors import BudgetError, NumericsError, SolverError
from lrsd.evaluate import evaluate
from lrsd.model.layout import LinearSpec
from lrsd.report import summary_lines
from lrsd.settings import CalibrationSettings, CompressionSettings
from lrsd.steps import fit
from lrsd.steps import observe as survey

Change = Callable[[dict[str, torch.Tensor]], None]
MODES = {
    "codes": CompressionSettings(ratio=4),
    "codes, propagated": CompressionSettings(ratio=4, propagate=True),
    "16 bit": CompressionSettings(ratio=1.5, bits="16"),
    "fixed": CompressionSettings(ratio=3, coding="fixed"),
}


def changed(model: Path, place: Path, change: Change, **config: Any) -> Path:
    place.mkdir()
    for path in model.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    content = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(content | config))
    return place


def dead_channels(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][:, ::3] = 0
    tensors["model.layers.0.input_layernorm.weight"][1::3] = 0


def outlier_channels(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.input_layernorm.weight"][5] = 3e4
    tensors["model.layers.1.post_attention_layernorm.weight"][7] = 1e6
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e4


def nothing_in_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    tensors["model.layers.1.self_attn.q_proj.weight"].zero_()


def one_row(tensors: dict[str, torch.Tensor]) -> None:
    """Rank 1: all rows of a matrix, and all inputs of a layer."""
    tensors["model.layers.0.mlp.gate_proj.weight"][1:] = tensors["model.layers.0.mlp.gate_proj.weight"][:1]
    tensors["model.embed_tokens.weight"][1:] = tensors["model.embed_tokens.weight"][:1]


@pytest.mark.parametrize(
    "mode", ["codes, propagated", *(pytest.param(m, marks=pytest.mark.slow) for m in MODES if "," not in m)]
)
@pytest.mark.parametrize("change", [dead_channels, outlier_channels, nothing_in_a_layer, one_row])
def test_the_budget_holds_and_the_result_is_finite(
    mode: str, change: Change, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """On 16 tokens, of which the widest layer has 160 channels."""
    model = changed(tiny_model_dir, tmp_path / "model", change)
    calibration = CalibrationSettings(source=str(text_file), samples=2, seqlen=8)
    manifest = compress(str(model), tmp_path / "out", MODES[mode], calibration)
    assert stored_bytes(tmp_path / "out", manifest.layers) == manifest.linear_bytes <= manifest.budget_bytes
    assert all(0 <= layer.error < 2 for layer in manifest.layers.values())
    found = evaluate(str(tmp_path / "out"), (str(text_file),), seqlen=32, windows=2)
    assert found.perplexity[0].perplexity > 1


def test_activations_beyond_float16_are_named(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][:] = 6e4

    model = changed(tiny_model_dir, tmp_path / "model", overflow)
    calibration = CalibrationSettings(source=str(text_file), samples=2, seqlen=8)
    settings = CompressionSettings(ratio=4, dtype="float16")
    with pytest.raises(NumericsError, match=r"the input of model.layers.\d.* non-finite .* --dtype"):
        compress(str(model), tmp_path / "out", settings, calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_solution_beyond_float16_is_none(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Weights on a dead input: no output shows them, but their factor is larger than they are."""

    def on_a_dead_input(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.post_attention_layernorm.weight"][5] = 0
        tensors["model.layers.0.mlp.up_proj.weight"][:, 5] = 6e4

    model = changed(tiny_model_dir, tmp_path / "model", on_a_dead_input)
    settings = CompressionSettings(ratio=1.5, method="svd-llm", dtype="float16")
    with pytest.raises(BudgetError, match=r"^1 layers could not be solved .* model.layers.0.mlp.up_proj"):
        run(model, text_file, tmp_path / "out", settings)


@pytest.fixture
def unsolvable(monkeypatch: pytest.MonkeyPatch) -> str:
    """One layer whose curve has no solution, and two that only the fit cannot solve."""
    failed: list[None] = []
    read, solve = survey.read_weight, fit.solve_layer

    def no_curve(model: Any, spec: LinearSpec) -> torch.Tensor:
        W_OI = read(model, spec)
        return W_OI * torch.nan if spec.name.endswith("0.self_attn.v_proj") else W_OI

    def no_fit(W_OI: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if W_OI.shape == (64, 160) and len(failed) < 2:  # down_proj
            failed.append(None)
            raise SolverError("a reason of the solver's")
        return solve(W_OI, *arguments, **named)

    def no_spectrum(W_OI: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if bool(torch.isnan(W_OI).any()):
            raise SolverError("a reason of the survey's")
        return curve(W_OI, *arguments, **named)

    curve = survey.coded_curve
    monkeypatch.setattr(survey, "read_weight", no_curve)
    monkeypatch.setattr(survey, "coded_curve", no_spectrum)
    monkeypatch.setattr(fit, "solve_layer", no_fit)
    return "model.layers.0.self_attn.v_proj"


def run(model: Path, text: Path, output: Path, settings: CompressionSettings) -> Manifest:
    calibration = CalibrationSettings(source=str(text), samples=8, seqlen=32)
    return compress(str(model), output, settings, calibration)


@pytest.mark.parametrize("propagate", [True, False])
def test_a_layer_that_cannot_be_solved_stays_dense_within_the_budget(
    unsolvable: str, propagate: bool, make_model: Any, tiny_llama: Any, text_file: Path, tmp_path: Path
) -> None:
    model = make_model(tiny_llama(num_hidden_layers=4))
    settings = CompressionSettings(ratio=1.6, propagate=propagate)
    manifest = run(model, text_file, tmp_path / "out", settings)
    assert manifest.layers[unsolvable].status == "dense: a reason of the survey's"
    failed = [
        name for name, layer in manifest.layers.items() if layer.status == "dense: a reason of the solver's"
    ]
    assert failed == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert all(manifest.layers[name].rank is None for name in (unsolvable, *failed))
    assert stored_bytes(tmp_path / "out", manifest.layers) == manifest.linear_bytes <= manifest.budget_bytes
    assert f"left dense      {unsolvable} (a reason of the survey's)" in summary_lines(manifest)
    shown = CliRunner().invoke(commands, ["inspect", str(tmp_path / "out")]).output
    assert "dense: a reason of the solver's" in shown


@pytest.mark.usefixtures("unsolvable")
def test_where_others_cannot_make_up_for_it_the_budget_is_not_broken(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"down_proj.* stay dense|stay dense, .*down_proj"):
        run(tiny_model_dir, text_file, tmp_path / "out", CompressionSettings(ratio=3, bits="4"))
    assert list(tmp_path.iterdir()) == []
