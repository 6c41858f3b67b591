"""Recipes: every option by one name, checked where it is given, written as it is read."""

import json
from dataclasses import fields
from typing import Any

import pytest

from lrsd.errors import SettingsError
from lrsd.methods import METHODS
from lrsd.recipe import GROUPS, Recipe
from lrsd.settings import Budget, Run

# Another value than the default, for every option; by method where they differ.
OTHER: dict[str, Any] = {
    "row_weights": False, "token_weights": True, "grid": "plain",
    "ratio": 3.7, "scope": "checkpoint", "allocation": "uniform",
    "include": ("*.mlp.*", "*.up"), "exclude": ("lm_head",), "min_weights": 12,
    "calib": "c4", "samples": 9, "seqlen": 33, "seed": 4, "batch": 2, "propagate": True,
    "device": "cpu", "device_memory": "20GiB", "dtype": "float16", "shard_size": "500MB",
    "bits": "4", "coding": "fixed", "group": 32, "structure": "column", "mean_correction": True,
    "alternations": 2, "block": 64, "widths": "4,8", "groups": "64", "format": "compressed-tensors",
    "types": "Q4_0,Q8_0", "sweeps": 1, "block_size": 32, "threshold": False, "energy": 0.75,
    "factor_bits": "8",
    "train": "a.jsonl", "task": "classify", "text_columns": "a,b", "label_column": "c", "target_column": "d",
    "epochs": 2, "train_steps": 9, "train_batch": 4, "learning_rate": 1e-3, "rank_share": 0.25,
    "importance": "magnitude", "prune_warmup": 0.2, "prune_final": 0.4, "prune_every": 3, "smoothing": 0.5,
    "distill_output": 0.5, "distill_layers": 2.0, "temperature": 3.0,
}  # fmt: skip
every_method = pytest.mark.parametrize("method", METHODS)


def options_of(method: str) -> dict[str, Any]:
    """Its name, default by default."""
    kinds = [*GROUPS.values(), METHODS[method]]
    return {found.name: found.default for kind in kinds for found in fields(kind)}


@every_method
def test_a_recipe_is_read_as_it_was_written(method: str) -> None:
    """With all defaults, each option changed alone, and all that go together; through JSON too."""
    names = set(options_of(method)) & set(OTHER)
    if method != "integers":
        names -= {"format"}  # it holds nothing else
    changes = [{}, *({name: OTHER[name]} for name in sorted(names - {"ratio"})), {n: OTHER[n] for n in names}]
    for changed in changes:
        if method == "lrsd" and changed.keys() == {"structure"}:
            changed = changed | {"bits": "16"}  # entropy-coded weights keep no columns
        if method == "ssd" and "allocation" in changed:
            changed = changed | {"allocation": "energy"}  # it knows no other
        if {"format", "scope"} <= changed.keys():
            changed = changed | {"scope": "linear"}  # engines read no embeddings of 8 bit
        recipe = Recipe.of(**{"method": method, "ratio": 1.6} | changed)
        again = Recipe.of(**json.loads(json.dumps(recipe.to_dict())))
        assert again == recipe
        assert again.to_dict() == recipe.to_dict()
        assert recipe.method_name == method
        assert type(recipe.method) is METHODS[method]
        written = recipe.to_dict()
        assert written.keys() == {"method", *options_of(method)}
        for name, value in changed.items():
            expected = list(value) if isinstance(value, tuple) else value
            assert written[name] == (f"{value!r}x" if name == "ratio" else expected)


def test_calibration_texts_are_one_option_written_as_they_are_read() -> None:
    """One as a text, whichever way it is given; several as a list."""
    for one in ("c4", ("c4",), ["c4"]):
        assert Recipe.of(ratio=2, calib=one) == Recipe.of(ratio=2, calib="c4")
        assert Recipe.of(ratio=2, calib=one).to_dict()["calib"] == "c4"
    several = Recipe.of(ratio=2, calib=["c4", "self", "a.txt"])
    assert several.to_dict()["calib"] == ["c4", "self", "a.txt"]
    assert Recipe.of(**json.loads(json.dumps(several.to_dict()))) == several
    assert several != Recipe.of(ratio=2, calib=["self", "c4", "a.txt"])


@pytest.mark.parametrize("samples", [3, 4, 5, 128])
def test_shares_are_equal_and_the_first_sources_have_what_is_left_over(samples: int) -> None:
    shares = Recipe.of(ratio=2, calib=("a", "b", "c"), samples=samples).calibration.shares
    assert list(shares) == ["a", "b", "c"]
    assert sum(shares.values()) == samples
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert max(shares.values()) - min(shares.values()) <= 1


def test_every_option_has_another_value_in_this_test() -> None:
    for method in METHODS:
        assert set(options_of(method)) - {"rank", "size"} <= set(OTHER)
    assert Recipe.of(ratio=2, rank="17", bits="16").method.to_dict()["rank"] == 17
    assert Recipe.of(**Recipe.of(ratio=2, rank="energy").to_dict()).method.to_dict()["rank"] == "energy"


def test_a_format_brings_its_method_and_takes_no_other() -> None:
    assert Recipe.of(ratio=2, format="compressed-tensors").method_name == "integers"
    with pytest.raises(SettingsError, match="holds what --method integers makes, not gptq"):
        Recipe.of(ratio=2, format="compressed-tensors", method="gptq")
    with pytest.raises(SettingsError, match="holds what --method integers makes, not lrsd"):
        Recipe(budget=Budget(ratio=2), run=Run(format="compressed-tensors"))
    with pytest.raises(SettingsError, match="keeps embeddings and head at 16 bit"):
        Recipe.of(ratio=2, format="compressed-tensors", scope="checkpoint")


@pytest.mark.parametrize("widths", ["", "1", "4,9", "4;8", "four", "٤", "4.0"])
def test_widths_are_numbers_from_2_to_8(widths: str) -> None:
    with pytest.raises(SettingsError, match="widths must be numbers among 2, 3, 4, 5, 6, 7, 8, such as 2"):
        Recipe.of(ratio=2, method="integers", widths=widths)


def test_no_option_has_two_owners() -> None:
    for method in METHODS:
        kinds = [*GROUPS.values(), METHODS[method]]
        names = [found.name for kind in kinds for found in fields(kind)]
        assert len(names) == len(set(names))
        assert "method" not in names


def lacking() -> list[tuple[str, str]]:
    every = {name: {f.name for f in fields(kind)} for name, kind in METHODS.items()}
    return [
        (method, option)
        for method, own in every.items()
        for option in sorted(set().union(*every.values()) - own)
    ]


@pytest.mark.parametrize(("method", "option"), lacking())
def test_an_option_that_the_method_lacks_names_those_that_have_it(method: str, option: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        Recipe.of(method=method, ratio=2, **{option: 1})
    text = str(refusal.value)
    assert text.startswith(f"method {method} has no {option.replace('_', '-')}; ")
    having = {name for name, kind in METHODS.items() if option in {f.name for f in fields(kind)}}
    assert set(text.partition("--method ")[2].split(" or ")) == having


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("ratios", "ratio"), ("seq_len", "seqlen"), ("sample", "samples"), ("min_weight", "min_weights"),
        ("strukture", "structure"), ("mean_corection", "mean_correction"), ("propagat", "propagate"),
    ],
)  # fmt: skip
def test_a_near_miss_is_asked_about(wrong: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=f"unknown setting '{wrong}'; did you mean '{meant}'"):
        Recipe.of(**{"ratio": 2, wrong: 1})


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(SettingsError) as refusal:
        Recipe.of(ratio=2, zzz=1)
    assert "did you mean" not in str(refusal.value)
    assert all(name in str(refusal.value) for name in options_of("lrsd"))


def test_an_unknown_method_lists_all() -> None:
    with pytest.raises(SettingsError) as refusal:
        Recipe.of(method="magic", ratio=2)
    assert all(name in str(refusal.value) for name in METHODS)


WRONG: list[dict[str, Any]] = [
    {"ratio": 1}, {"ratio": 0.5}, {"ratio": float("nan")}, {"ratio": float("inf")}, {"ratio": "1x"},
    {"ratio": "120%"}, {"ratio": "four"}, {"scope": "all"}, {"allocation": "best"}, {"samples": 1},
    {"seqlen": 7}, {"seed": -1}, {"seed": 2**63}, {"batch": 0}, {"samples": 2**20, "seqlen": 2**20},
    {"dtype": "float32"}, {"shard_size": "5"}, {"shard_size": "0GB"}, {"min_weights": -1}, {"bits": "7"},
    {"device_memory": "much"},
    {"coding": "huffman"}, {"group": 0}, {"structure": "diagonal"}, {"rank": "many"}, {"rank": -1},
    {"rank": "-1"}, {"rank": 0, "bits": "16"}, {"alternations": 0}, {"structure": "row"},
    {"structure": "row", "bits": "4"}, {"rank": 3, "bits": "4"}, {"method": "gptq", "bits": "16"},
    {"method": "gptq", "structure": "row"}, {"method": "sparsegpt", "block": 0},
    {"method": "ssd", "alternations": 0}, {"method": "ssd", "energy": -0.1}, {"method": "ssd", "energy": "x"},
    {"method": "ssd", "allocation": "kl"}, {"method": "ssd", "factor_bits": "5"}, {"block_size": 1},
    {"structure": "row,row", "bits": "16"}, {"structure": "row,none", "bits": "16"},
    {"calib": ()}, {"calib": [3]}, {"calib": None}, {"calib": ("a", "b", "a")},
    {"calib": ("a", "b", "c"), "samples": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_an_impossible_value_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Recipe.of(**{"ratio": 2.0} | options)


def test_a_ratio_is_required() -> None:
    with pytest.raises(SettingsError, match="give either --ratio, like 4x, or --size"):
        Recipe.of()


@pytest.mark.parametrize(("text", "value"), [("4x", 4), ("1.25", 1.25), ("80%", 1.25), (" 2 X", 2), (3, 3)])
def test_a_ratio_in_any_of_its_forms(text: Any, value: float) -> None:
    assert Recipe.of(ratio=text).budget == Budget(ratio=value)


@pytest.mark.parametrize("kind", [*GROUPS.values(), *METHODS.values()], ids=[*GROUPS, *METHODS])
def test_every_field_says_what_it_does(kind: type) -> None:
    """In a sentence, for the command line and the README."""
    for found in fields(kind):
        assert len(found.metadata["help"]) > 10, found.name
        assert found.metadata["help"].endswith("."), found.name
