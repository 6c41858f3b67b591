"""The model card: whatever a model is called, its header says so, and the hub can read it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lrsd.checkpoint.card import CardMetric, add_metrics, model_card
from lrsd.checkpoint.manifest import Manifest
from lrsd.errors import CheckpointError


@pytest.fixture
def manifest() -> Manifest:
    empty: dict[str, Any] = {"str": "", "int": 1, "float": 4.0, "bool": False, "float | None": None}
    known = {f.name: empty.get(getattr(f.type, "__name__", str(f.type)), {}) for f in fields(Manifest)}
    return Manifest(**known | {"recipe": {"samples": 8, "seqlen": 32, "calib": "self"}})


def test_every_calibration_text_is_named(manifest: Manifest) -> None:
    for calib, named in (("c4", "(c4)"), (["a.txt", "self"], "(a.txt, self)")):
        recipe = manifest.recipe | {"calib": calib}
        assert f"tokens of calibration text {named}." in model_card(replace(manifest, recipe=recipe))


@pytest.mark.parametrize("name", ["SmolLM2-135M", 'odd: "name" # x', "123", "true", "modèle", "- a", "--- "])
def test_the_header_is_read_as_it_was_meant(manifest: Manifest, tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text(model_card(replace(manifest, base_model=name)), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name) == (name, "transformers")
    assert data.tags == ["lrsd", "low-rank", "sparse", "compressed"]


def base_card(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "README.base.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_licence_language_and_task_are_those_of_the_original(manifest: Manifest, tmp_path: Path) -> None:
    header = "license: other\nlicense_name: mine\nlanguage: [en, fr]\npipeline_tag: text-generation"
    base = base_card(tmp_path, f"---\n{header}\nbase_model: older\ntags: [secret]\n---\n# A model\n")
    (tmp_path / "README.md").write_text(model_card(manifest, base), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name, data.language) == ("other", "mine", ["en", "fr"])
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == manifest.base_model
    assert "secret" not in data.tags


@pytest.mark.parametrize("header", ["license: [mit", "- a list", "license: {a: 1}\nlanguage: 5", "\x00"])
def test_a_card_that_cannot_be_read_costs_its_licence_and_nothing_else(
    manifest: Manifest, tmp_path: Path, header: str
) -> None:
    text = model_card(manifest, base_card(tmp_path, f"---\n{header}\n---\n"))
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license is None
    assert ("cannot be read" in text) == (header != "license: {a: 1}\nlanguage: 5")


def test_figures_go_into_the_card_in_the_place_of_earlier_ones(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(model_card(manifest), encoding="utf-8")
    with pytest.raises(CheckpointError, match="no directory that lrsd compress wrote"):
        add_metrics(tmp_path, [CardMetric("wikitext", "perplexity", 1.0)])
    (tmp_path / "lrsd.json").write_text("{}")
    add_metrics(
        tmp_path, [CardMetric("wikitext", "perplexity", 30.0), CardMetric("/tmp/manual", "perplexity", 9.0)]
    )
    add_metrics(
        tmp_path, [CardMetric("wikitext", "perplexity", 26.5, "windows"), CardMetric("wikitext", "kl", 0.03)]
    )
    card = ModelCard.load(tmp_path / "README.md")
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found == {
        ("manual", "perplexity"): 9.0,
        ("wikitext", "perplexity"): 26.5,
        ("wikitext", "kl"): 0.03,
    }
    assert "compressed 4x by lrsd" in card.text
    (tmp_path / "README.md").write_text("---\nbase_model: [\n---\n")
    with pytest.raises(CheckpointError, match="no model card that can be added to"):
        add_metrics(tmp_path, [CardMetric("wikitext", "perplexity", 1.0)])
