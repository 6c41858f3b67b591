"""Memory: what is predicted covers what is held, and what is freed goes back to the system."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrsd.compress import compress
from lrsd.config import CalibrationSettings, CompressionSettings
from lrsd.memory import current_rss, peak_rss, predicted_peak, release_freed
from lrsd.model.layout import find_layout
from lrsd.model.samples import Samples


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


def test_prediction_grows_by_the_cache_and_the_weights_that_it_counts(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    samples = Samples({"input_ids": torch.zeros(9, 32, dtype=torch.int64)})
    layout = find_layout(model, samples)
    huge = 2**40  # above the peak of the tests before this one

    def predicted(count: int, *, propagate: bool) -> int:
        return predicted_peak(model, layout, samples[:count], 1, propagate=propagate, loaded=huge) - huge

    hidden_state = 2 * 32 * 64  # bfloat16, 32 tokens, width 64
    assert predicted(9, propagate=False) - predicted(8, propagate=False) == 3 * hidden_state
    inputs = 2 * 32 * (64 + 64 + 64 + 160)
    assert predicted(9, propagate=True) - predicted(8, propagate=True) == 4 * hidden_state + inputs


def test_the_manifest_reports_both(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    calibration = CalibrationSettings(source=str(text_file), samples=4, seqlen=32)
    settings = CompressionSettings(ratio=4, propagate=False)
    memory = compress(str(tiny_model_dir), tmp_path / "out", settings, calibration).memory
    assert 2**27 < memory["predicted"] < 2**33
    assert memory["peak"] == pytest.approx(memory["predicted"], rel=0.15)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no scratch directory is left
