"""What `lrsd eval` measures: one pass of each model, a few rows of logits at a time, a gate."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from lrsd_cli.main import main
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lrsd import evaluate as module
from lrsd.checkpoint.verify import verify
from lrsd.compress import compress
from lrsd.data.tokens import evaluation_items
from lrsd.evaluate import measure
from lrsd.model.load import load_model
from lrsd.numerics import divergence
from lrsd.recipe import Recipe


@pytest.fixture(scope="module")
def small(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "out"
    compress(str(tiny_model_dir), out, Recipe.of(ratio=4, calib=str(text_file), samples=8, seqlen=32))
    return out


@pytest.mark.parametrize("values", [300, 2**21], ids=["row by row", "at once"])
def test_both_measures_come_from_one_pass_of_each_model(
    small: Path, tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    monkeypatch.setattr(divergence, "DISTANCE_VALUES", values)
    loaded, dense = (load_model(str(path)) for path in (small, tiny_model_dir))
    items = evaluation_items(loaded, text_file.read_text(), 32, 3)
    passes = []
    run = module.run_model
    monkeypatch.setattr(
        module, "run_model", lambda model, samples: passes.append(model) or run(model, samples)
    )
    score, distance = measure(loaded, items, "text", dense)
    assert passes == [loaded.model, dense.model] * 3
    with torch.inference_mode():
        tokens = torch.cat([item.samples.inputs["input_ids"] for item in items])
        packed, original = (model.model(tokens).logits.float() for model in (loaded, dense))
    loss = cross_entropy(packed[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert score is not None
    assert score.perplexity == pytest.approx(float(loss.exp()), rel=1e-3)
    found, expected = (log_softmax(logits.flatten(0, 1), -1) for logits in (packed, original))
    assert distance is not None
    assert distance.kl == pytest.approx(
        float(kl_div(found, expected, reduction="batchmean", log_target=True)), rel=0.02
    )
    assert distance.top1_agreement == pytest.approx(
        float((found.argmax(-1) == expected.argmax(-1)).double().mean()), abs=0.03
    )


@pytest.mark.parametrize(("limit", "code"), [("0", 1), ("100", 0)])
def test_a_gate_for_batch_jobs(
    small: Path, tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], limit: str, code: int,
) -> None:  # fmt: skip
    words = ["eval", small, "--ppl", text_file, "--seqlen", 32, "--windows", 2, "--kl", tiny_model_dir]
    monkeypatch.setattr("sys.argv", ["lrsd", *map(str, words), "--fail-above", limit])
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code or 0) == code
    printed, said = capsys.readouterr()
    assert "divergence" in printed
    assert ("is above 0 (--fail-above)" in said) == bool(code)


def test_a_gate_needs_something_to_compare_with(small: Path) -> None:
    from lrsd_cli.main import commands

    found = CliRunner().invoke(commands, ["eval", str(small), "--fail-above", "1"])
    assert found.exit_code == 2
    assert "--fail-above needs --kl DENSE" in found.output


def test_figures_go_into_the_card_of_a_result_and_nowhere_else(
    small: Path, tiny_model_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = ["--ppl", str(text_file), "--kl", str(tiny_model_dir), "--seqlen", "32", "--windows", "2"]

    def run(model: Path) -> int:
        monkeypatch.setattr("sys.argv", ["lrsd", "eval", str(model), *options, "--card", "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert run(small) == 0
    printed = json.loads(capsys.readouterr().out)
    (index,) = ModelCard.load(small / "README.md").data.to_dict()["model-index"]
    found = {metric["type"]: metric["value"] for one in index["results"] for metric in one["metrics"]}
    assert found == {
        "perplexity": printed["perplexity"][0]["perplexity"], "kl": printed["divergence"][0]["kl"],
        "top-1 agreement": printed["divergence"][0]["top1_agreement"],
    }  # fmt: skip
    assert {one["dataset"]["name"] for one in index["results"]} == {text_file.name}
    verify(small)
    # The dense model's own card is not lrsd's to write into.
    (tiny_model_dir / "README.md").write_text("---\nlicense: mit\n---\n")
    try:
        assert run(tiny_model_dir) == 1
        assert "is no directory that lrsd compress wrote" in capsys.readouterr().err
        assert (tiny_model_dir / "README.md").read_text() == "---\nlicense: mit\n---\n"
    finally:
        (tiny_model_dir / "README.md").unlink()
