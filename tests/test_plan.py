"""Plans compared on held-out text: by what the compressed model would lose, with the model left as it was."""

from pathlib import Path

import pytest
import torch
from recipes import on

import lrsd.steps.plan
from lrsd.compress import compress, dry_run
from lrsd.data.tokens import calibration_samples
from lrsd.model.load import load_model
from lrsd.model.samples import distance, logits_of, run_model
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps.observe import HELD_OUT


@torch.inference_mode()
@pytest.mark.slow
def test_what_is_compared_is_what_would_be_lost(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lrsd.steps.plan, "_TRUSTED_KL", 0.0)
    calibration = Calibration(calib=str(text_file), samples=16, seqlen=32)
    settings = {"ratio": 3, "bits": "16", "alternations": 1, "propagate": False}
    prepared = dry_run(str(tiny_model_dir), on(Recipe.of(**settings), calibration))
    compared = prepared.plan.compared
    assert prepared.plan.name == min(compared, key=compared.__getitem__)
    uniform = Recipe.of(**settings, allocation="uniform")
    compress(str(tiny_model_dir), tmp_path / "out", on(uniform, calibration))
    dense, packed = (load_model(str(path)).model for path in (tiny_model_dir, tmp_path / "out"))
    source = prepared.source
    samples = calibration_samples(source.loaded, source.fingerprint, calibration, Progress())
    held_out = samples[-len(samples) // HELD_OUT :]
    reference, found, after = (
        logits_of(run_model(model, held_out)) for model in (dense, packed, source.loaded.model)
    )
    assert compared["uniform"] == pytest.approx(distance(dense, reference, found), rel=0.05)
    torch.testing.assert_close(after, reference, rtol=0, atol=0)
