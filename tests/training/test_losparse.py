"""LoSparse: what is trained, what is pruned, what is stored of it, and that a run that was stopped goes on to
the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    GPT2Config,
    Trainer,
)
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

import lrsd.training.trainer as training
from lrsd.checkpoint.manifest import read_manifest
from lrsd.checkpoint.reader import stored_bytes
from lrsd.compress import compress, dry_run
from lrsd.data.sources import label_number
from lrsd.errors import BudgetError, InputError, LrsdError, NumericsError, SettingsError
from lrsd.evaluate import classify
from lrsd.forms.base import Shape
from lrsd.forms.layer import parse_layer
from lrsd.forms.packed import PackedLinear
from lrsd.methods.losparse import Losparse
from lrsd.model.load import load_model
from lrsd.model.samples import logits_of
from lrsd.recipe import Recipe
from lrsd.training.pruning import (
    LowRankPlusSparse,
    Phases,
    Pruning,
    layer_bytes,
    ranks_within,
    row_costs,
    stored,
    truncated_svd,
)
from lrsd.training.tasks import IGNORED, collate, padding_token
from lrsd.training.trainer import _require_all

MakeModel = Callable[..., Path]
WORDS = {"animal": ("fox", "dog", "hen"), "tool": ("saw", "axe", "awl"), "tree": ("oak", "elm", "fir")}


@pytest.fixture(scope="module")
def bert_dir(make_model: MakeModel) -> Path:
    """A bare encoder, without a head for any task."""
    return make_model(
        BertConfig(
            vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, initializer_range=0.1, pad_token_id=0,
        ),
        AutoModel,
    )  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"text": f"number {number} is a {word}", "label": label}
        for number in range(6)
        for label, words in WORDS.items()
        for word in words
    ]
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def recipe(train: Path, **changes: Any) -> Recipe:
    options = {
        "ratio": 4, "train_steps": 8, "train_batch": 6, "learning_rate": 2e-3, "prune_every": 2,
        "device": "cpu", "seqlen": 32,
    }  # fmt: skip
    return Recipe.of(method="losparse", train=str(train), **options | changes)


# --- the layer, and what is pruned of it --------------------------------------------------------------------


def layer_of(rows: int = 6, columns: int = 5, rank: int = 2, seed: int = 0) -> LowRankPlusSparse:
    W_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return LowRankPlusSparse(W_OI, torch.arange(float(rows)), rank, sparse=True)


def test_a_layer_begins_as_the_dense_one_around_its_truncated_svd(generator: torch.Generator) -> None:
    W_OI, bias_O = torch.randn(7, 5, generator=generator), torch.randn(7, generator=generator)
    layer = LowRankPlusSparse(W_OI, bias_O, 3, sparse=True)
    x = torch.randn(4, 5, generator=generator)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, W_OI, bias_O))
    assert layer.S is not None
    lost = torch.linalg.svdvals(W_OI)[3:].square().sum()
    torch.testing.assert_close(layer.S.square().sum(), lost)
    U_OR, V_RI = truncated_svd(W_OI, 3)
    torch.testing.assert_close(U_OR.square().sum(0), V_RI.square().sum(1))  # singular values on both sides


def test_a_layer_that_no_bytes_are_left_for_gives_its_bias() -> None:
    layer = LowRankPlusSparse(torch.ones(3, 4), torch.arange(3.0), 0, sparse=False)
    assert torch.equal(layer(torch.ones(2, 4)), torch.arange(3.0).expand(2, 3))
    assert layer.weight.dtype == torch.float32
    assert not layer.dense().any()


def pruned_by(scores: Callable[[int], list[float]], phases: Phases, left: int) -> list[list[bool]]:
    """What is kept after each step of two layers of 4 and 2 rows whose importance is as given.

    Rows that were pruned are set again before every step, as training makes them grow."""
    layers = {"a": layer_of(4, 8, 0), "b": layer_of(2, 8, 0, seed=1)}
    method = Losparse(train="x", smoothing=0.0, prune_every=phases.every, importance="magnitude")
    pruning = Pruning(layers, left, method)
    kept = []
    for step in range(1, phases.steps + 1):
        values = iter(scores(step))
        with torch.no_grad():
            for layer in layers.values():
                assert layer.S is not None
                for row in layer.S:
                    row.fill_(next(values))
        pruning.before_step()
        pruning.after_step(step, phases)
        for layer in layers.values():
            assert layer.S is not None
            if phases.thresholds(step) or phases.fixes(step):
                assert torch.equal(layer.S.abs().sum(1) > 0, layer.kept)
        kept.append([*layers["a"].kept.tolist(), *layers["b"].kept.tolist()])
    return kept


def test_a_pruned_row_may_return_before_the_last_phase_and_not_after() -> None:
    """Row 0 is worth least until step 6, then most; rows 4 and 5 are worth least from step 11, in the last
    phase."""

    def scores(step: int) -> list[float]:
        row_0 = 0.1 if step <= 6 else 9.0
        return [row_0, 2, 3, 4, *((5, 6) if step <= 10 else (0.1, 0.1))]

    phases = Phases(14, 2, 4, 2)
    row = int(row_costs(Shape(4, 8), 0)[0])
    kept = pruned_by(scores, phases, 4 * row)
    assert kept[1] == [True] * 6  # warm-up
    assert not kept[5][0]  # gone at step 6
    assert kept[7][0]  # and back at step 8
    assert kept[9] == [True, False, False, True, True, True]
    assert kept[9:] == [kept[9]] * 5


def test_rows_of_the_last_phase_are_zero_after_every_step_and_trained_before_it() -> None:
    layer = layer_of(rank=0)
    layer.kept[1] = False
    layer.zero_pruned()
    assert layer.S is not None
    assert layer.S[1].count_nonzero() == 0
    layer(torch.ones(1, 5)).square().sum().backward()
    assert layer.S.grad is not None
    assert layer.S.grad[1].any()  # what is zero is trained on


def test_importance_is_averaged_over_windows_by_hand() -> None:
    """Two windows of two steps: the mean of |S dl/dS| in each, then 0.85 and 0.15."""
    layer = layer_of(2, 2, 0)
    pruning = Pruning({"a": layer}, 10**6, Losparse(train="x", prune_every=2))
    assert layer.S is not None
    gradients = [[[1.0, 1], [0, 0]], [[3.0, 3], [2, 2]], [[0.0, 0], [4, 4]], [[0.0, 0], [0, 0]]]
    with torch.no_grad():
        layer.S.copy_(torch.tensor([[1.0, -1], [2, 2]]))
    for step, gradient in enumerate(gradients, 1):
        layer.S.grad = torch.tensor(gradient)
        pruning.before_step()
        pruning.after_step(step, Phases(100, 50, 10, 2))
    first = torch.tensor([0.15 * 2, 0.15 * 2])
    torch.testing.assert_close(layer.importance, 0.85 * first + 0.15 * torch.tensor([0.0, 4]))
    assert not layer.window.any()


def test_importance_is_of_the_gradient_before_it_is_clipped() -> None:
    """Clipping would count a step with a large gradient less than one with a small one."""
    layer = layer_of(2, 2, 0)
    assert layer.S is not None
    with torch.no_grad():
        layer.S.fill_(1.0)
    layer.S.grad = torch.full((2, 2), 100.0)
    prunes = training._Prunes(Pruning({"a": layer}, 10**6, Losparse(train="x")))
    prunes.on_pre_optimizer_step(None, SimpleNamespace(global_step=0), None, model=layer)
    assert layer.window.tolist() == [100.0, 100.0]
    assert float(layer.S.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_distillation_is_the_papers_two_terms_by_hand() -> None:
    """alpha_out T^2 KL(teacher || student) where there is a label, alpha_layer times the sum of the mean
    squares over hidden states, padding left out."""
    method = Losparse(train="x", distill_output=0.5, distill_layers=3.0, temperature=2.0)
    mine, other = torch.tensor([[[1.0, 0], [5, 5]]]), torch.tensor([[[0.0, 3], [9, 0]]])
    inputs = {"labels": torch.tensor([[1, IGNORED]]), "attention_mask": torch.tensor([[1, 0]])}
    states = (torch.zeros(1, 2, 2), torch.ones(1, 2, 2)), (torch.full((1, 2, 2), 2.0), torch.ones(1, 2, 2))
    student, teacher = (
        ModelOutput(logits=logits, hidden_states=hidden)
        for logits, hidden in zip((mine, other), states, strict=True)
    )
    p, q = (torch.softmax(logits[0, 0].double() / 2, 0) for logits in (other, mine))
    kl = float((p * (p / q).log()).sum())
    found = float(training.distillation(method, student, teacher, inputs))
    assert found == pytest.approx(0.5 * 4 * kl + 3 * (4 + 0), rel=1e-5)


def test_padding_is_masked_and_passed_over_by_the_loss() -> None:
    items = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8]},
        {"input_ids": [9], "attention_mask": [1], "labels": [3, 4]},
    ]
    batch = {name: tensor.tolist() for name, tensor in collate(items, padding=2).items()}
    assert batch == {
        "input_ids": [[5, 6, 7], [9, 2, 2]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[8, IGNORED], [3, 4]],
    }
    classes = collate([{"input_ids": [1], "labels": 4}, {"input_ids": [2], "labels": 0}], padding=2)
    assert classes["labels"].tolist() == [4, 0]


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_stored_layer_is_the_trained_one_and_takes_the_bytes_counted(rank: int) -> None:
    """Kept rows of U V + S as they are, the others as low rank; whatever training did to the factors."""
    for rows in (0, 1, 4, 20):
        layer = layer_of(20, 24, rank)
        layer.kept[rows:] = False
        layer.zero_pruned()
        if layer.U is not None:
            with torch.no_grad():
                layer.U[:, 0] = layer.U[:, -1]  # of lower rank than it has columns
        fitted = stored("x", layer, torch.float32, transposed=False)
        size = sum(
            t.nbytes // 2 if t.is_floating_point() else t.nbytes
            for n, t in fitted.tensors.items()
            if n != "bias"
        )
        assert size == fitted.choice.nbytes <= layer_bytes(layer.shape, rank, rows)
        if fitted.entry is None:
            W_OI = fitted.tensors["weight"]
        else:
            packed = PackedLinear.holding(layer.shape, parse_layer("x", fitted.entry), fitted.tensors)
            W_OI = packed.dense_weight()
            x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(packed(x), layer(x).detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(W_OI.double(), layer.dense(), rtol=1e-5, atol=1e-5)
        assert (fitted.entry is None) == (layer_bytes(layer.shape, rank, rows) == layer.shape.dense_bytes)


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
def test_ranks_take_their_share_and_the_largest_that_fits(share: float) -> None:
    shapes = {"a": Shape(64, 32), "b": Shape(32, 160), "c": Shape(8, 8)}
    budget = sum(shape.dense_bytes for shape in shapes.values()) // 3
    ranks = ranks_within(shapes, budget, share)
    taken = sum(layer_bytes(shapes[name], rank, 0) for name, rank in ranks.items())
    assert taken <= share * budget + (budget if share == 1 else 0)
    assert taken <= budget
    for name, rank in ranks.items():
        allowed = share * budget * shapes[name].dense_bytes / sum(s.dense_bytes for s in shapes.values())
        assert layer_bytes(shapes[name], rank + 1, 0) > allowed
        if share == 1:
            assert (
                layer_bytes(shapes[name], rank + 1, 0) - layer_bytes(shapes[name], rank, 0) > budget - taken
            )


# --- the three kinds of task, end to end ------------------------------------------------------------


@pytest.fixture
def kept_models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Logits of the trained model, before anything is stored, on the first training item."""
    found: dict[str, Any] = {}
    original = training.train_model

    def train(model: Any, items: Any, method: Any, *args: Any, **options: Any) -> None:
        original(model, items, method, *args, **options)
        item = {key: torch.tensor([value]) for key, value in items[0].items()}
        found["logits"] = logits_of(model(**item)).detach()
        found["item"] = item

    monkeypatch.setattr("lrsd.training.losparse.train_model", train)
    return found


def check_result(out: Path, manifest: Any, trained: dict[str, Any]) -> Any:
    """Within the budget and one row below; and the trained model's logits, as far as 16 bit hold them."""
    assert manifest.linear_bytes <= manifest.budget_bytes
    largest = max(2 * layer.in_features + 4 for layer in manifest.layers.values())
    assert manifest.budget_bytes - manifest.linear_bytes < largest
    packed = {name: 0 for name, layer in manifest.layers.items() if layer.layer is not None}
    bytes_stored = stored_bytes(out, packed) + sum(
        layer.bytes for layer in manifest.layers.values() if layer.layer is None
    )
    loaded = load_model(str(out), device="cpu")
    biases = sum(
        module.bias.nbytes for module in loaded.model.modules()
        if isinstance(module, PackedLinear) and module.bias is not None
    )  # fmt: skip
    assert bytes_stored - biases == manifest.linear_bytes
    with torch.no_grad():
        found = logits_of(loaded.model(**trained["item"]))
    scale = float(trained["logits"].std())
    torch.testing.assert_close(found, trained["logits"], rtol=0, atol=0.05 * scale)
    assert read_manifest(out).recipe == manifest.recipe
    assert any(layer.layer and layer.layer.get("rows") for layer in manifest.layers.values())
    return loaded


def test_an_encoder_without_a_head_becomes_a_classifier(
    bert_dir: Path, labelled: Path, tmp_path: Path, kept_models: dict[str, Any]
) -> None:
    """With the labels of the file, and it learns them."""
    options = recipe(labelled, train_steps=60, train_batch=18, learning_rate=3e-3, prune_every=5, ratio=2.5)
    manifest = compress(str(bert_dir), tmp_path / "out", options)
    loaded = check_result(tmp_path / "out", manifest, kept_models)
    assert type(loaded.model).__name__ == "BertForSequenceClassification"
    assert loaded.model.config.id2label == dict(enumerate(sorted(WORDS)))
    assert loaded.model.classifier.weight.dtype == torch.bfloat16
    assert "classifier" in manifest.untouched
    assert classify(loaded, str(labelled)).accuracy > 0.9
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LoSparse" in card
    assert "60 steps on rows.jsonl" in card


def test_a_classifier_keeps_its_head_and_reads_two_texts(
    make_model: MakeModel, tmp_path: Path, kept_models: dict[str, Any]
) -> None:
    """From a CSV file of GLUE's columns; a dense model as teacher adds to the loss and nothing else."""
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.1, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    directory = make_model(config, AutoModelForSequenceClassification)
    path = tmp_path / "pairs.csv"
    rows = [f"one is {n},two is {n},{n % 2}" for n in range(20)]
    path.write_text("\n".join(["premise,hypothesis,label", *rows]), encoding="utf-8")
    options = recipe(path, distill_output=0.5, distill_layers=1.0, ratio=3)
    loaded = check_result(tmp_path / "out", compress(str(directory), tmp_path / "out", options), kept_models)
    assert set(kept_models["item"]) >= {"input_ids", "attention_mask", "labels"}
    assert loaded.model.config.num_labels == 2


def test_a_causal_model_trains_on_text(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, kept_models: dict[str, Any]
) -> None:
    options = recipe(text_file, distill_output=1.0, distill_layers=0.1)
    before = transformers_logging.get_verbosity()
    found = compress(str(tiny_model_dir), tmp_path / "out", options)
    loaded = check_result(tmp_path / "out", found, kept_models)
    assert loaded.model.config.use_cache  # Trainer's own settings are none of the model's
    assert transformers_logging.get_verbosity() == before


def test_conv1d_weights_are_stored_the_other_way_round(
    make_model: MakeModel, text_file: Path, tmp_path: Path, kept_models: dict[str, Any]
) -> None:
    """And are a Conv1D's again in a dense model."""
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.1)
    options = recipe(text_file, train_steps=4)
    manifest = compress(str(make_model(config)), tmp_path / "out", options)
    loaded = check_result(tmp_path / "out", manifest, kept_models)
    assert all(layer.layer is None or layer.layer["transposed"] for layer in manifest.layers.values())
    with torch.no_grad():
        found = logits_of(loaded.model.dequantize()(**kept_models["item"]))
    torch.testing.assert_close(found, kept_models["logits"], rtol=0, atol=0.05 * float(found.std()))


def test_an_encoder_decoder_trains_on_pairs(
    make_model: MakeModel, tmp_path: Path, kept_models: dict[str, Any]
) -> None:
    config = BartConfig(
        vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        init_std=0.1, pad_token_id=1, bos_token_id=0, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    rows = [{"document": f"a long text about {n}", "summary": f"about {n}"} for n in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = recipe(path, ratio=3, distill_output=1.0, distill_layers=1.0)
    directory = make_model(config, AutoModelForSeq2SeqLM)
    check_result(tmp_path / "out", compress(str(directory), tmp_path / "out", options), kept_models)


@pytest.mark.parametrize("share", [0, 1])
def test_baselines_are_settings(bert_dir: Path, labelled: Path, tmp_path: Path, share: float) -> None:
    """Rows by magnitude without low rank, and low rank without rows."""
    options = recipe(labelled, rank_share=share, importance="magnitude", train_steps=5)
    manifest = compress(str(bert_dir), tmp_path / "out", options)
    kinds = {layer.stored_as.split()[-1 if share == 0 else 0] for layer in manifest.layers.values()}
    assert kinds <= ({"rows", "nothing"} if share == 0 else {"rank"})
    assert manifest.linear_bytes <= manifest.budget_bytes
    assert manifest.linear_bytes > 0.9 * manifest.budget_bytes


# --- stopped, and gone on with ---------------------------------------------------------------------


def written(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("run.json", "README.md")
    }


@pytest.mark.parametrize("step", [3, 11])
def test_killed_and_resumed_equals_uninterrupted(
    bert_dir: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """To the byte, from a checkpoint in the middle of a window and of an epoch, and from one after rows were
    fixed; with dropout."""
    options = recipe(labelled, train_steps=12, prune_every=4)
    compress(str(bert_dir), tmp_path / "whole", options)
    original, steps = Trainer.training_step, []

    def dies(self: Any, *args: Any, **more: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) > step:
            raise KeyboardInterrupt
        return original(self, *args, **more)

    monkeypatch.setattr(Trainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt) as stop:
        compress(str(bert_dir), tmp_path / "out", options)
    assert "--resume goes on" in stop.value.__notes__[0]
    monkeypatch.setattr(Trainer, "training_step", original)
    torch.randn(7)  # the generators of the process are somewhere else by then
    begun: list[int] = []

    def tells(self: Any, *args: Any, **more: Any) -> Any:
        begun.append(self.state.global_step)
        return original(self, *args, **more)

    monkeypatch.setattr(Trainer, "training_step", tells)
    compress(str(bert_dir), tmp_path / "out", options, resume=True)
    assert begun[0] == step - 1  # the last checkpoint, and not the start
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_with(
    bert_dir: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while one is written: the one before it counts."""
    options = recipe(labelled, train_steps=6)
    compress(str(bert_dir), tmp_path / "whole", options)

    original = training._Saves.on_save

    def dies(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt
        original(self, args, state, control, **more)

    monkeypatch.setattr(training._Saves, "on_save", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(str(bert_dir), tmp_path / "out", options)
    monkeypatch.setattr(training._Saves, "on_save", original)
    whole = tmp_path / "out.partial" / "training" / "checkpoint-4" / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:100])
    compress(str(bert_dir), tmp_path / "out", options, resume=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    bert_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.randn(3)
        compress(str(bert_dir), tmp_path / name, recipe(labelled, train_steps=3, seed=seed))
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert written(tmp_path / "a")["model.safetensors"] != written(tmp_path / "c")["model.safetensors"]


def test_the_generators_of_the_process_are_left_as_they_were(
    bert_dir: Path, labelled: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    compress(str(bert_dir), tmp_path / "out", recipe(labelled, train_steps=2))
    assert torch.equal(torch.randn(3), expected)


# --- what is refused ---------------------------------------------------------------------------------


def rows_file(tmp_path: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


HOSTILE: list[tuple[list[Any], dict[str, Any], str]] = [
    ([], {}, "holds no rows; expected a text and its label in each"),
    ([{"text": "a", "label": 1}, {"text": "b"}], {}, ":2: expected texts in text and a label in label"),
    ([{"text": "a"}], {}, ":1: expected a label in label, labels, class, category, got the columns text"),
    ([{"words": "a", "label": 0}], {}, "name them with --text-columns"),
    ([{"text": "a", "label": 0}], {"label_column": "kind"}, ":1: expected a label in kind"),
    ([{"text": "a", "label": "x"}] * 3, {}, "every row has the label 'x'"),
    ([{"text": " ", "label": "x"}, {"text": "b", "label": "y"}], {}, ":1: expected texts"),
    ([{"text": 3, "label": "x"}, {"text": "b", "label": "y"}], {}, ":1: expected texts"),
    ([{"text": "a", "label": 0}, {"text": "b", "label": 10**9}], {}, "labels of at most 1000 classes"),
    (["a text"], {}, ":1: expected columns with a text and its label"),
    ([{"text": "a", "label": n} for n in (0, 1)], {"distill_output": 1.0}, "no head for this task yet"),
    ([{"text": "a", "label": 0}], {"task": "text"}, "--task text is not what a BertModel does"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_rows_that_cannot_be_learned_from_are_one_line(
    bert_dir: Path, tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    path = rows_file(tmp_path, rows)
    with pytest.raises(LrsdError) as refusal:
        compress(str(bert_dir), tmp_path / "out", recipe(path, **options))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_label_that_a_classifier_does_not_have_is_one_line(make_model: MakeModel, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    directory = make_model(config, AutoModelForSequenceClassification)
    path = rows_file(tmp_path, [{"text": "a", "label": 0}, {"text": "b", "label": 2}])
    with pytest.raises(InputError, match=r"rows.jsonl:2: label '2' is none of LABEL_0, LABEL_1 or of 0 to 1"):
        compress(str(directory), tmp_path / "out", recipe(path))


@pytest.mark.parametrize(
    ("label", "number"), [("-1", 0), ("0", 1), ("1", 2), ("7", 7), ("x", None), ("-2", None)]
)
def test_a_label_is_a_name_before_it_is_a_number(label: str, number: int | None) -> None:
    assert label_number(label, {"-1": 0, "0": 1, "1": 2}) == number


def test_sequences_are_padded_by_the_token_that_the_model_knows(tiny_model_dir: Path) -> None:
    """By which a decoder that classifies finds the last one; else by the tokenizer's."""
    loaded = load_model(str(tiny_model_dir))
    own = loaded.require_tokenizer()
    loaded.model.config.pad_token_id = None
    assert padding_token(loaded) == (own.eos_token_id if own.pad_token_id is None else own.pad_token_id)
    loaded.model.config.pad_token_id = 5
    assert padding_token(loaded) == 5


def test_a_head_of_many_labels_at_once_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=2, pad_token_id=0, problem_type="multi_label_classification",
    )  # fmt: skip
    directory = make_model(config, AutoModelForSequenceClassification)
    path = rows_file(tmp_path, [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    with pytest.raises(InputError, match="multi_label_classification, expected one label of several"):
        compress(str(directory), tmp_path / "out", recipe(path))


def test_a_process_that_trainer_takes_for_one_alone_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would train for itself. On one device Trainer would spread a batch over all that it sees."""
    alone = SimpleNamespace(world_size=1, n_gpu=1, _n_gpu=1)
    two = SimpleNamespace(world=SimpleNamespace(size=2))
    with pytest.raises(
        InputError, match="2 processes were started, of which Trainer knows 1; set LOCAL_RANK"
    ):
        _require_all(cast(Any, alone), cast(Any, two))
    many = SimpleNamespace(world_size=1, n_gpu=4, _n_gpu=4)
    _require_all(cast(Any, many), None)
    assert many._n_gpu == 1


def test_a_text_too_short_or_missing_is_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a b", encoding="utf-8")
    for train, message in ((short, "one item needs 32"), (tmp_path / "none.txt", "no file")):
        with pytest.raises(InputError, match=message):
            compress(str(tiny_model_dir), tmp_path / "out", recipe(train))
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": None}, "give a file to train on with --train"),
        ({"calib": "c4"}, "leave out --calib"),
        ({"allocation": "kl"}, "leave out --allocation"),
        ({"propagate": True}, "leave out --propagate"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_settings_of_a_calibration_are_refused(
    bert_dir: Path, labelled: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    asked = Recipe.of(method="losparse", ratio=4, **{"train": str(labelled)} | options)
    with pytest.raises(SettingsError, match=message):
        compress(str(bert_dir), tmp_path / "out", asked)
    with pytest.raises(SettingsError, match="no plan to show"):
        dry_run(str(bert_dir), asked)


WRONG: list[dict[str, Any]] = [
    {"learning_rate": 0}, {"learning_rate": "fast"}, {"learning_rate": "nan"}, {"rank_share": 1.5},
    {"rank_share": -0.1}, {"prune_warmup": 0.5, "prune_final": 0.5}, {"smoothing": 1}, {"temperature": 0},
    {"epochs": 0}, {"train_batch": 0}, {"prune_every": 0}, {"distill_output": -1}, {"text_columns": "a,b,c"},
    {"text_columns": "a,"}, {"task": "guess"}, {"importance": "luck"},
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_an_impossible_setting_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Recipe.of(method="losparse", ratio=2, train="x", **options)


def test_a_loss_that_is_not_finite_ends_in_one_line(bert_dir: Path, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"the loss is (nan|inf) at step \d+; lower --learning-rate"):
        compress(str(bert_dir), tmp_path / "out", recipe(labelled, learning_rate=1e30))
    assert list(tmp_path.iterdir()) == []


def test_layers_that_no_gradient_reaches_end_in_one_line(
    bert_dir: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LowRankPlusSparse.forward
    monkeypatch.setattr(LowRankPlusSparse, "forward", lambda self, x: forward(self, x).detach())
    with pytest.raises(InputError, match="no gradient reaches any of the layers"):
        compress(str(bert_dir), tmp_path / "out", recipe(labelled))
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_hold_nothing_are_refused(bert_dir: Path, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="neither a rank nor a row"):
        compress(str(bert_dir), tmp_path / "out", recipe(labelled, ratio=2000))
    assert list(tmp_path.iterdir()) == []


def test_without_accelerate_it_says_what_to_install(
    bert_dir: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs accelerate: pip install 'lrsd\[train\]'"):
        compress(str(bert_dir), tmp_path / "out", recipe(labelled))
