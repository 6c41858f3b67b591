"""Models that are no decoders: how they are calibrated and evaluated; which layers a user may choose."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest
import torch
from recipes import on
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    T5Config,
)

from lrsd.checkpoint.manifest import read_manifest
from lrsd.compress import compress, dry_run
from lrsd.data.sources import read_pairs
from lrsd.data.tokens import calibration_samples, evaluation_items, token_blocks
from lrsd.errors import InputError
from lrsd.evaluate import evaluate
from lrsd.intake.safetensors import shard_paths
from lrsd.model.layout import find_layout
from lrsd.model.load import load_model
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.work.streams import Stream

BERT = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 70, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def calibration(text_file: Path) -> Calibration:
    return Calibration(calib=str(text_file), samples=8, seqlen=32)


@pytest.fixture(scope="module")
def classifier(make_model) -> Path:
    return make_model(
        BertConfig(**BERT, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}),
        AutoModelForSequenceClassification,
    )


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_accuracy_counts_the_labels_that_the_model_gives(classifier: Path, tmp_path: Path, form: str) -> None:
    model, tokenizer = load_model(str(classifier)).model, load_model(str(classifier)).tokenizer
    texts = ["the import statement", "a class body", "for each name", "loops, and more"]
    with torch.inference_mode():
        given = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    labels = [("no", "yes")[label] for label in given[:3]] + [str(1 - given[3])]
    path = tmp_path / f"labelled.{form}"
    rows = zip(texts, labels, strict=True)
    if form == "csv":
        path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    else:
        path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows))
    result = evaluate(str(classifier), (), accuracy=str(path))
    assert result.accuracy is not None
    assert (result.accuracy.accuracy, result.accuracy.texts) == (0.75, 4)


def test_accuracy_of_two_texts_reads_both_as_the_tokenizer_joins_them(
    classifier: Path, tmp_path: Path
) -> None:
    loaded = load_model(str(classifier), dtype="float32")
    model, tokenizer = loaded.model, loaded.require_tokenizer()
    pairs = [("a class body", text) for text in ("a class", "the import statement", "loops, and more", "no")]

    def margins(texts: Sequence[tuple[str, ...]]) -> Tensor:
        found = [model(**tokenizer(*both, return_tensors="pt")).logits[0] for both in texts]
        return torch.stack([logits[1] - logits[0] for logits in found])

    with torch.inference_mode():
        # So that the head takes half of the pairs for "yes".
        model.classifier.bias[1] -= margins(pairs).sort().values[1:3].mean()
        given = margins(pairs).gt(0).int().tolist()
        assert sum(given) == 2
        for others in ([pair[:1] for pair in pairs], [pair[1:] for pair in pairs]):
            assert margins(others).gt(0).int().tolist() != given
    copytree(classifier, tmp_path / "even")
    model.save_pretrained(tmp_path / "even")
    classifier, path = tmp_path / "even", tmp_path / "pairs.jsonl"
    rows = [{"sentence1": a, "sentence2": b, "label": n} for (a, b), n in zip(pairs, given, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(str(classifier), (), accuracy=str(path), dtype="float32")
    assert result.accuracy is not None
    assert (result.accuracy.accuracy, result.accuracy.texts) == (1.0, 4)


def test_accuracy_names_what_it_cannot_read(classifier: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "labelled.csv"
    for content, said in (
        ("text,label\na,perhaps\n", "perhaps"),
        ("words\na\n", '"text" and "label"'),
        ("", "no rows"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=said):
            evaluate(str(classifier), (), accuracy=str(path))
    path.write_text("text,label\na,1\n")
    with pytest.raises(InputError, match="needs a classifier, LlamaForCausalLM is none"):
        evaluate(str(tiny_model_dir), (), accuracy=str(path))


def test_a_classifier_has_no_perplexity_and_says_what_to_ask(classifier: Path, text_file: Path) -> None:
    with pytest.raises(InputError, match="predicts no tokens; give --kl DENSE, or --accuracy"):
        evaluate(str(classifier), (str(text_file),))


def test_a_masked_model_is_evaluated_on_masked_tokens_only(make_model, text_file: Path) -> None:
    loaded = load_model(str(make_model(BertConfig(**BERT), AutoModelForMaskedLM)))
    items = evaluation_items(loaded, text_file.read_text(), 40, 3)
    assert [len(item.labels) for item in items] == [6, 6, 6]
    mask = loaded.require_tokenizer().mask_token_id
    for item in items:
        shown = item.samples.inputs["input_ids"][0]
        assert (shown == mask).nonzero().flatten().tolist() == item.rows.tolist()
        assert not (item.labels == mask).any()


def test_a_model_of_two_stacks_is_evaluated_on_what_follows(make_model, text_file: Path) -> None:
    config = T5Config(
        vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=5
    )
    loaded = load_model(str(make_model(config, AutoModelForSeq2SeqLM)))
    (item,) = evaluation_items(loaded, text_file.read_text(), 16, 1)
    inputs = item.samples.inputs
    assert inputs["decoder_input_ids"][0, 0] == 5
    assert torch.equal(inputs["decoder_input_ids"][0, 1:], item.labels[:-1])
    plain = loaded.require_tokenizer()(text_file.read_text(), verbose=False).input_ids
    assert [*inputs["input_ids"][0].tolist(), *item.labels.tolist()] == plain[:32]


@pytest.mark.slow
@pytest.mark.oldest
def test_pairs_calibrate_and_score_a_model_of_two_stacks(make_model, tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=5
    )
    base, path = make_model(config, AutoModelForSeq2SeqLM), tmp_path / "pairs.jsonl"
    pairs = [{"source": f"translate {n} sheep and their dogs", "target": f"{n} moutons"} for n in range(40)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    loaded = load_model(str(base))
    calibration = Calibration(calib=str(path), samples=8, seqlen=32)
    inputs = calibration_samples(loaded, "", calibration, Progress()).inputs
    sources, targets = inputs["input_ids"], inputs["decoder_input_ids"]
    assert sources.shape == (8, 32)
    assert 4 < targets.shape[1] < 20
    assert len(targets) == 8
    items = evaluation_items(loaded, read_pairs(str(path)), 64, 3)
    tokenizer = loaded.require_tokenizer()
    for item, pair in zip(items, pairs, strict=False):
        assert tokenizer.decode(item.samples.inputs["input_ids"][0]) == pair["source"]
        assert tokenizer.decode(item.labels) == pair["target"]
    manifest = compress(str(base), tmp_path / "out", on(Recipe.of(ratio=4), calibration))
    assert manifest.linear_bytes <= manifest.budget_bytes
    assert evaluate(str(tmp_path / "out"), (str(path),), windows=3).perplexity[0].windows == 3
    path.write_text(json.dumps(pairs[0]) + "\n" + json.dumps({"source": "alone"}) + "\n")
    with pytest.raises(InputError, match=r"pairs.jsonl:2: expected an object with texts"):
        calibration_samples(loaded, "", calibration, Progress())


def test_shared_blocks_are_refused_by_name(make_model, calibration: Calibration) -> None:
    base = make_model(AlbertConfig(**BERT, embedding_size=32), AutoModelForMaskedLM)
    with pytest.raises(InputError, match="AlbertForMaskedLM runs its blocks \\[2\\] times per pass"):
        dry_run(str(base), on(Recipe.of(ratio=2), calibration))


def test_self_calibration_needs_a_model_that_writes(classifier: Path) -> None:
    with pytest.raises(InputError, match="cannot write its own calibration text; give --calib FILE"):
        dry_run(str(classifier), on(Recipe.of(ratio=2), Calibration()))


def test_layers_are_chosen_by_pattern_and_size(
    tiny_model_dir: Path, calibration: Calibration, tmp_path: Path
) -> None:
    settings = Recipe.of(
        ratio=3, include=("*.mlp.*", "*.q_proj", "*.k_proj"), exclude=("*.0.mlp.up_proj",), min_weights=4096,
        shard_size="50KB",
    )  # fmt: skip
    compress(str(tiny_model_dir), tmp_path / "out", on(settings, calibration))
    manifest = read_manifest(tmp_path / "out")
    chosen = {name.removeprefix("model.layers.") for name in manifest.layers}
    assert chosen == {
        *(f"{block}.mlp.{kind}_proj" for block in (0, 1) for kind in ("gate", "up", "down")),
        "0.self_attn.q_proj", "1.self_attn.q_proj",
    } - {"0.mlp.up_proj"}  # fmt: skip
    reasons = {name.removeprefix("model.layers."): why for name, why in manifest.untouched.items()}
    assert reasons["0.mlp.up_proj"] == "--exclude"
    assert reasons["0.self_attn.v_proj"] == "not among --include"
    assert reasons["1.self_attn.k_proj"] == "fewer than --min-weights"
    assert manifest.dense_linear_bytes == sum(layer.dense_bytes for layer in manifest.layers.values())
    assert len(shard_paths(tmp_path / "out")) > 1


def test_a_pattern_that_matches_nothing_is_an_error(tiny_model_dir: Path, calibration: Calibration) -> None:
    with pytest.raises(InputError, match="may be compressed"):
        dry_run(str(tiny_model_dir), on(Recipe.of(ratio=3, include=("*.nothing",)), calibration))


def test_a_single_number_is_no_choice_and_still_has_a_distance(
    make_model, calibration: Calibration, text_file: Path, tmp_path: Path
) -> None:
    base = make_model(BertConfig(**BERT, num_labels=1), AutoModelForSequenceClassification)
    manifest = compress(str(base), tmp_path / "out", on(Recipe.of(ratio=6), calibration))
    assert min(layer.sensitivity for layer in manifest.layers.values()) > 0
    result = evaluate(
        str(tmp_path / "out"), (str(text_file),), seqlen=32, windows=2, dense=str(base), dtype="float32"
    )
    (found,) = result.divergence
    assert found.kl > 0
    assert found.measure == "half the relative squared error"


def test_a_whole_block_may_stay_dense(tiny_model_dir: Path, calibration: Calibration, tmp_path: Path) -> None:
    settings = Recipe.of(ratio=3, exclude=("*.layers.0.*",))
    manifest = compress(str(tiny_model_dir), tmp_path / "out", on(settings, calibration))
    assert all(".layers.1." in name for name in manifest.layers)
    assert manifest.linear_bytes <= manifest.budget_bytes


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("family", ["t5", "bert"])
def test_shared_embeddings_that_int8_cannot_serve_stay_as_they_are(
    make_model, text_file: Path, calibration: Calibration, tmp_path: Path, family: str
) -> None:
    """T5's stacks share theirs, BERT's tied head has a bias: the ratio is met by the linear weights."""
    if family == "t5":
        config = T5Config(
            vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=5
        )
        base = make_model(config, AutoModelForSeq2SeqLM)
    else:
        base = make_model(BertConfig(**BERT), AutoModelForMaskedLM)
    settings = Recipe.of(ratio=1.9, scope="checkpoint")
    manifest = compress(str(base), tmp_path / "out", on(settings, calibration))
    assert 1.9 <= manifest.checkpoint_ratio < 1.95
    result = evaluate(str(tmp_path / "out"), (str(text_file),), seqlen=32, windows=2, dense=str(base))
    assert result.divergence[0].kl < 0.02


def test_blocks_that_are_told_the_tokens_are_replayed_with_their_own(tokenizer, text_file: Path) -> None:
    """A block's other arguments may differ between batches of one shape: Gemma 3n gives it embeddings."""
    config = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    for block in model.transformer.h:
        block.forward = partial(_with_more, block.forward)
        block.register_forward_pre_hook(_tell_tokens(model), with_kwargs=True)
    tokens = token_blocks(tokenizer, text_file.read_text(), samples=6, seqlen=16, seed=0)
    batches = list(Samples({"input_ids": tokens}).split(2))
    with torch.inference_mode():
        layout = find_layout(model, batches[0])
        replay = Replay.start(model, layout, batches)
        stream = replay.inputs[0]
        for index in range(2):
            outputs = Stream()
            replay.pass_(index, stream, outputs)
            stream = outputs
        for samples, hidden in zip(batches, stream, strict=True):
            expected = model(**samples.inputs).logits
            torch.testing.assert_close(model.lm_head(model.transformer.ln_f(hidden)), expected)


def _with_more(forward, hidden_states, *args, more=0.0, **kwargs):
    return forward(hidden_states + more, *args, **kwargs)


def _tell_tokens(model):
    """Gives a block the mean embedding of the batch that the model reads."""
    read: list[torch.Tensor] = []
    model.transformer.wte.register_forward_hook(lambda m, args, output: read.append(output.mean((0, 1))))

    def tell(module, args, kwargs):
        return args, {"more": 100 * read[-1], **kwargs}

    return tell


def test_text_and_sound_are_not_confused(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "sound.safetensors"
    save_file({"input_features": torch.zeros(2, 4, 8)}, path)
    with pytest.raises(InputError, match="LlamaForCausalLM reads text; give that with --ppl"):
        evaluate(str(tiny_model_dir), (str(path),))


def test_pairs_are_no_text(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Their path was read in their place."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"source": "three sheep", "target": "trois moutons"}) + "\n")
    with pytest.raises(InputError, match=r"pairs.jsonl:1: expected .* got the fields source, target"):
        evaluate(str(tiny_model_dir), (str(path),), seqlen=8)


def test_speed_is_for_models_that_write(classifier: Path) -> None:
    with pytest.raises(InputError, match="--speed is for models that write token by token"):
        evaluate(str(classifier), (), with_speed=True)


def test_a_tokenizer_of_another_model_is_one_line(
    make_model, tiny_llama, text_file: Path, tmp_path: Path
) -> None:
    model = make_model(tiny_llama(vocab_size=200))
    text = Calibration(calib=str(text_file), samples=8, seqlen=32)
    with pytest.raises(
        InputError, match=r"the tokenizer makes token 2\d\d, the model's embedding has 200 rows"
    ):
        compress(str(model), tmp_path / "out", on(Recipe.of(ratio=2), text))
    with pytest.raises(InputError, match="give the model its own tokenizer"):
        evaluate(str(model), (str(text_file),), seqlen=32, windows=2)
    assert not list(tmp_path.iterdir())


def test_a_reward_model_without_padding_is_calibrated_without(
    make_model, tiny_llama, text_file: Path, tmp_path: Path
) -> None:
    """It refuses more than one sample, as it could not tell where each ends."""
    config = tiny_llama(num_labels=1)
    model = make_model(config, AutoModelForSequenceClassification)
    text = Calibration(calib=str(text_file), samples=8, seqlen=32)
    compress(str(model), tmp_path / "out", on(Recipe.of(ratio=1.05), text))
    loaded = [AutoModelForSequenceClassification.from_pretrained(path) for path in (model, tmp_path / "out")]
    assert [found.config.pad_token_id for found in loaded] == [None, None]
    with torch.inference_mode():
        dense, packed = (found(torch.arange(3, 40)[None]).logits.float() for found in loaded)
    torch.testing.assert_close(packed, dense, rtol=0.05, atol=0.02)
