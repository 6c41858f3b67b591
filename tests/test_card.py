"""The model card: whatever a model is called, its header says so, and the hub can read it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from lrsd.checkpoint.card import model_card
from lrsd.checkpoint.manifest import Manifest


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
