"""The bytes asked for are the bytes written, for every kind of codes and ratio."""

from dataclasses import replace
from pathlib import Path

import pytest
from recipes import on

from lrsd.checkpoint.reader import stored_bytes
from lrsd.compress import compress
from lrsd.errors import BudgetError
from lrsd.forms.base import Shape
from lrsd.numerics.allocate import Codes, LayerCurve, LayerPlan
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps.fit import Purse


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(calib=str(text_file), samples=8, seqlen=32)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("ratio", [1.1, 4, *(pytest.param(r, marks=SLOW) for r in (1.5, 3, 16 / 3, 8))])
def test_entropy_coded_layers_land_on_the_budget(
    tiny_model_dir: Path, calibration: Calibration, tmp_path: Path, ratio: float
) -> None:
    settings = Recipe.of(ratio=ratio, allocation="kl", propagate=False)
    manifest = compress(str(tiny_model_dir), tmp_path / "out", on(settings, calibration))
    assert manifest.linear_bytes <= manifest.budget_bytes == int(manifest.dense_linear_bytes / ratio)
    assert manifest.linear_bytes >= 0.995 * manifest.budget_bytes
    assert stored_bytes(tmp_path / "out", manifest.layers) == manifest.linear_bytes
    assert {layer.coding for layer in manifest.layers.values()} <= {"entropy", None}


@pytest.mark.parametrize("bits", ["3", "8", *(pytest.param(b, marks=SLOW) for b in "2456")])
def test_a_width_is_kept_to_and_kept_columns_use_what_is_left(
    tiny_model_dir: Path, calibration: Calibration, tmp_path: Path, bits: str
) -> None:
    """16 / (bits + 1) leaves room for the scales of groups of 32, not for another bit."""
    settings = Recipe.of(ratio=16 / (int(bits) + 1), bits=bits, group=32, propagate=False)
    manifest = compress(str(tiny_model_dir), tmp_path / "out", on(settings, calibration))
    assert manifest.linear_bytes <= manifest.budget_bytes
    assert stored_bytes(tmp_path / "out", manifest.layers) == manifest.linear_bytes
    assert {layer.code_bits for layer in manifest.layers.values()} <= {int(bits), None}
    assert sum(layer.code_bits == int(bits) for layer in manifest.layers.values()) >= 12


@pytest.mark.slow
def test_mixed_widths_beat_one_width_at_the_same_bytes(
    tiny_model_dir: Path, calibration: Calibration, tmp_path: Path
) -> None:
    uniform = Recipe.of(ratio=3.5, bits="4", allocation="uniform", structure="none", propagate=False)
    losses = {}
    for name, settings in (
        ("one", uniform),
        ("mixed", replace(uniform, bits="auto", coding="fixed", allocation="kl")),
    ):
        manifest = compress(str(tiny_model_dir), tmp_path / name, on(settings, calibration))
        losses[name] = sum(layer.error * layer.sensitivity for layer in manifest.layers.values())
        widths = {layer.code_bits for layer in manifest.layers.values()}
        assert len(widths) > 1 if name == "mixed" else widths == {4}
    sensitivity = {name: layer.sensitivity for name, layer in manifest.layers.items()}
    one = compress(str(tiny_model_dir), tmp_path / "again", on(uniform, calibration))
    assert losses["mixed"] < sum(layer.error * sensitivity[name] for name, layer in one.layers.items())


def test_a_width_that_cannot_fit_is_refused_with_the_ratio_that_can(
    tiny_model_dir: Path, calibration: Calibration, tmp_path: Path
) -> None:
    settings = Recipe.of(ratio=4, bits="4", propagate=False)
    with pytest.raises(BudgetError, match=r"try a ratio below 3\.[5-9]"):
        compress(str(tiny_model_dir), tmp_path / "out", on(settings, calibration))
    assert not (tmp_path / "out").exists()


def test_what_a_layer_takes_too_much_is_shared_by_those_to_come() -> None:
    shape = Shape(64, 100)
    plans = {name: LayerPlan(0, codes=Codes(2000, step=1.0)) for name in ("first", "second", "third")}
    curves = {name: LayerCurve(shape, ()) for name in plans}
    purse = Purse(plans, curves, 6000)
    assert purse.plan("first").codes.step == 1.0
    purse.pay("first", 2000 + 160)
    # 160 bytes over 12,800 weights: a tenth of a bit each.
    assert purse.plan("second").codes.step == pytest.approx(2**0.1)
    assert purse.limit("second") is None
    purse.pay("second", 1900)
    assert purse.limit("third") == 6000 - 2160 - 1900


@pytest.mark.slow
def test_propagation_is_spent_where_the_loss_is_not_small_anyway(
    tiny_model_dir: Path, calibration: Calibration, tmp_path: Path
) -> None:
    ways = {
        "small loss": ({"ratio": 1.5}, False),
        "asked for": ({"ratio": 1.5, "propagate": True}, True),
        "16 bit": ({"ratio": 1.5, "bits": "16"}, True),
        "peer": ({"ratio": 1.5, "method": "svd-llm"}, False),
    }
    for name, (changes, expected) in ways.items():
        settings = Recipe.of(**changes)
        manifest = compress(str(tiny_model_dir), tmp_path / name, on(settings, calibration))
        assert manifest.propagated == expected, name
        if name == "small loss":
            assert manifest.expected_kl < 0.1
            assert manifest.allocation == {}
