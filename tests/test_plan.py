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
from lrsd.steps.plan import better_plan


@torch.inference_mode()
@pytest.mark.slow
def test_what_is_compared_is_what_would_be_lost(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lrsd.steps.plan, "_TRUSTED_KL", dict.fromkeys((False, True), 0.0))
    calibration = Calibration(calib=str(text_file), samples=16, seqlen=32)
    settings = {"ratio": 3, "bits": "16", "alternations": 1, "propagate": False}
    prepared = dry_run(str(tiny_model_dir), on(Recipe.of(**settings), calibration))
    compared = prepared.plan.compared
    assert prepared.plan.name == min(compared, key=compared.__getitem__)
    source = prepared.source
    samples = calibration_samples(source.loaded, source.fingerprint, calibration, Progress())
    fitted, held_out = samples[:14], samples[14:]
    dense = load_model(str(tiny_model_dir)).model
    reference, after = (logits_of(run_model(model, held_out)) for model in (dense, source.loaded.model))
    torch.testing.assert_close(after, reference, rtol=0, atol=0)
    lost = {}
    for name, text in (("fitted", fitted), ("all", samples)):
        monkeypatch.setattr("lrsd.steps.prepare.calibration_samples", lambda *arguments, text=text: text)
        uniform = Recipe.of(**settings, allocation="uniform")
        compress(str(tiny_model_dir), tmp_path / name, on(uniform, calibration))
        found = logits_of(run_model(load_model(str(tmp_path / name)).model, held_out))
        lost[name] = distance(dense, reference, found)
    assert compared["uniform"] == pytest.approx(lost["fitted"], rel=0.05)
    assert compared["uniform"] != pytest.approx(lost["all"], rel=0.1), "what was held out is not fitted to"


@pytest.mark.parametrize(("uniform", "better"), [(2.2568, "kl"), (2.2, "kl"), (2.1, "uniform")])
def test_equal_shares_are_taken_where_they_are_clearly_better(uniform: float, better: str) -> None:
    assert better_plan({"kl": 2.2609, "uniform": uniform}) == better
