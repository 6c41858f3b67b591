"""Laws that every kind of model keeps: a new one needs a tiny model in `MODELS`."""

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
    WhisperConfig,
)

from lrsd.data.sources import read_content
from lrsd.data.tokens import calibration_samples, evaluation_items
from lrsd.errors import InputError
from lrsd.evaluate import measure, speed
from lrsd.model.kinds import KINDS, kind_of
from lrsd.model.kinds.base import EvaluationItem, Kind
from lrsd.model.load import LoadedModel, load_model
from lrsd.model.samples import Samples, has_logits, logits_of, run_model
from lrsd.progress import Progress
from lrsd.settings import Calibration

LLAMA = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
BERT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 70, "pad_token_id": 1,
}  # fmt: skip
TWO_STACKS = {
    "vocab_size": 300, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 300, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 5,
}  # fmt: skip
WHISPER = {
    **TWO_STACKS, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 40,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
# A tiny model of every kind.
MODELS: dict[str, tuple[Callable[..., PretrainedConfig], dict[str, Any], Any]] = {
    "causal language model": (LlamaConfig, LLAMA, AutoModelForCausalLM),
    "masked language model": (BertConfig, BERT, AutoModelForMaskedLM),
    "sequence-to-sequence model": (T5Config, T5, AutoModelForSeq2SeqLM),
    "speech model": (WhisperConfig, WHISPER, AutoModelForSpeechSeq2Seq),
    "encoder": (BertConfig, BERT, AutoModelForSequenceClassification),
}
# Others that a kind might take for its own: transformers lists BART's encoder-decoder as a masked model too.
LOOKALIKES = {
    "bart": (BartConfig, TWO_STACKS, AutoModelForSeq2SeqLM, "sequence-to-sequence model"),
    "bart's decoder": (BartConfig, TWO_STACKS, AutoModelForCausalLM, "causal language model"),
    "bert": (BertConfig, {**BERT, "is_decoder": True}, AutoModelForCausalLM, "causal language model"),
    "whisper's decoder": (WhisperConfig, WHISPER, AutoModelForCausalLM, "causal language model"),
    "bare llama": (LlamaConfig, LLAMA, AutoModel, "encoder"),
    "bare bert": (BertConfig, BERT, AutoModel, "encoder"),
}  # fmt: skip
SAMPLES, SEQLEN, WINDOWS = 4, 12, 3
FORMATS = ("text", "pairs", "tensors")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A source of every format."""
    directory = tmp_path_factory.mktemp("sources")
    pairs, tensors = directory / "pairs.jsonl", directory / "features.safetensors"
    rows = [{"source": f"translate {n} sheep and their dogs", "target": f"{n} moutons"} for n in range(20)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file({"input_features": torch.randn(6, 16, 64, generator=torch.Generator().manual_seed(0))}, tensors)
    return {"text": str(text_file), "pairs": str(pairs), "tensors": str(tensors)}


@pytest.fixture(scope="module")
def model_of(make_model) -> Callable[[Kind], LoadedModel]:
    made: dict[str, LoadedModel] = {}

    def make(kind: Kind) -> LoadedModel:
        if kind.name not in made:
            config, settings, head = MODELS[kind.name]
            made[kind.name] = load_model(str(make_model(config(**settings), head)), dtype="float32")
        return made[kind.name]

    return make


def formats(kind: Kind) -> list[str]:
    """What a kind reads, as its attributes say."""
    return ["tensors"] if kind.tensors else ["text", *["pairs"] * kind.reads_pairs]


READ = [pytest.param(kind, form, id=f"{kind.name}, {form}") for kind in KINDS for form in formats(kind)]
EACH = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def calibrated(loaded: LoadedModel, source: str) -> Samples:
    calibration = Calibration(calib=source, samples=SAMPLES, seqlen=SEQLEN)
    with torch.inference_mode():
        return calibration_samples(loaded, "", calibration, Progress())


def evaluated_on(loaded: LoadedModel, source: str) -> list[EvaluationItem]:
    content = read_content(source, loaded.kind, split="test", option="--ppl")
    return evaluation_items(loaded, content, SEQLEN, WINDOWS)


def test_every_kind_has_a_name_and_a_tiny_model() -> None:
    assert [kind.name for kind in KINDS if kind.name not in MODELS] == []
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@EACH
def test_a_model_is_recognized_by_its_own_kind_and_the_generic_one_only(
    kind: Kind, model_of: Callable[[Kind], LoadedModel]
) -> None:
    model = model_of(kind).model
    assert kind_of(model) is kind
    assert {k.name for k in KINDS if k.recognizes(model)} == {kind.name, KINDS[-1].name}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_a_lookalike_is_recognized_by_no_other_kind(name: str) -> None:
    config, settings, head, expected = LOOKALIKES[name]
    with torch.device("meta"):
        model = head.from_config(config(**settings))
    assert {kind.name for kind in KINDS if kind.recognizes(model)} == {expected, KINDS[-1].name}


@EACH
@torch.inference_mode()
def test_the_example_runs(kind: Kind, model_of: Callable[[Kind], LoadedModel]) -> None:
    model = model_of(kind).model
    example = kind.example(model)
    assert len(example) == 2  # some heads take one sample at a time
    assert logits_of(run_model(model, example)).isfinite().all()


@pytest.mark.parametrize(("kind", "form"), READ)
@torch.inference_mode()
def test_calibration_samples_are_as_many_as_asked_for_and_run(
    kind: Kind, form: str, model_of: Callable[[Kind], LoadedModel], sources: dict[str, str]
) -> None:
    loaded = model_of(kind)
    samples = calibrated(loaded, sources[form])
    assert {len(value) for value in samples.inputs.values()} == {SAMPLES}
    assert samples.inputs.keys() == kind.example(loaded.model).inputs.keys()
    assert logits_of(run_model(loaded.model, samples)).isfinite().all()
    again = calibrated(loaded, sources[form])
    assert all(torch.equal(again.inputs[name], value) for name, value in samples.inputs.items())


@pytest.mark.parametrize(("kind", "form"), READ)
@torch.inference_mode()
def test_evaluation_items_hold_a_label_for_each_row_scored(
    kind: Kind, form: str, model_of: Callable[[Kind], LoadedModel], sources: dict[str, str]
) -> None:
    loaded = model_of(kind)
    items = evaluated_on(loaded, sources[form])
    assert len(items) == WINDOWS
    for item in items:
        logits = logits_of(run_model(loaded.model, item.samples))
        assert len(item.samples) == 1
        assert item.rows.shape == item.labels.shape
        assert len(item.rows.unique()) == len(item.rows)
        assert bool(len(item.rows)) == (kind.perplexity_protocol is not None)
        if len(item.rows):
            assert 0 <= int(item.rows.min()) <= int(item.rows.max()) < len(logits)
            assert 0 <= int(item.labels.min()) <= int(item.labels.max()) < logits.shape[-1]


@pytest.mark.parametrize(("kind", "form"), [p for p in READ if p.values[0].perplexity_protocol is not None])
def test_perplexity_counts_every_label(
    kind: Kind, form: str, model_of: Callable[[Kind], LoadedModel], sources: dict[str, str]
) -> None:
    loaded = model_of(kind)
    items = evaluated_on(loaded, sources[form])
    found, none = measure(loaded, items, form)
    assert none is None
    assert found is not None
    assert found.scored_tokens == sum(len(item.labels) for item in items)
    assert found.protocol == kind.perplexity_protocol
    assert 1 < found.perplexity < math.inf


@EACH
def test_other_formats_are_refused_by_name(
    kind: Kind, model_of: Callable[[Kind], LoadedModel], sources: dict[str, str]
) -> None:
    for form in FORMATS:
        if form not in formats(kind):
            for make in (calibrated, evaluated_on):
                with pytest.raises(InputError, match=Path(sources[form]).name):
                    make(model_of(kind), sources[form])


@EACH
def test_what_a_kind_cannot_do_is_refused(kind: Kind, model_of: Callable[[Kind], LoadedModel]) -> None:
    loaded = model_of(kind)
    if not kind.writes_calibration_text:
        with pytest.raises(InputError, match="cannot write its own calibration text"):
            calibrated(loaded, "self")
    if not kind.timed_by_token:
        with pytest.raises(InputError, match="write token by token"):
            speed(loaded)
    if kind.is_classifier(loaded.model):
        assert kind.perplexity_protocol is None
        assert has_logits(loaded.model)


def test_only_the_table_knows_the_kinds_by_name() -> None:
    """Elsewhere there is `Kind` and `kind_of`, so that a new kind changes no other file."""
    package = "lrsd.model.kinds"
    known = {f"{package}.{name}" for name in ("KINDS", "kind_of", "base.Kind", "base.EvaluationItem")}
    for path in (ROOT / "lrsd").rglob("*.py"):
        if path.parent.name != "kinds":
            found = {
                f"{node.module}.{alias.name}"
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package)
                for alias in node.names
            }
            assert found <= known, path
