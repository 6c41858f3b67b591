"""Calibration text: what samples are cut from it, how they begin, and how several texts are mixed."""

import json
from copy import deepcopy
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lrsd.data.sources import mixture_identity
from lrsd.data.tokens import (
    beginning_token,
    calibration_samples,
    evaluation_items,
    interleaved,
    token_blocks,
    tokenize,
)
from lrsd.errors import InputError
from lrsd.model.kinds import KINDS
from lrsd.model.kinds.base import Kind
from lrsd.model.kinds.causal import Causal
from lrsd.model.load import load_model
from lrsd.progress import Progress
from lrsd.settings import Calibration
from lrsd.steps.observe import HELD_OUT


class Notes(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Positions:
    """A tokenizer for which every character is a token, whose id is its position in the text."""

    bos_token_id: int | None = None

    def __call__(self, text: str, **options: Any) -> Any:
        return SimpleNamespace(input_ids=list(range(len(text))))


@pytest.mark.parametrize("tokens", [64, 71, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_no_token_of_a_text_is_in_two_samples(tokens: int, seed: int) -> None:
    """As many samples as asked for where the text has them, all there are where it has fewer."""
    for samples in (1, 2, 8, 9, 500):
        blocks = token_blocks(Positions(), "x" * tokens, samples=samples, seqlen=8, seed=seed)  # type: ignore[arg-type]
        assert len(blocks) == min(samples, tokens // 8)
        assert blocks.unique().numel() == blocks.numel()
        assert torch.equal(blocks, blocks[:, :1] + torch.arange(8)), "stretches of the text"


def test_samples_are_from_all_over_the_text_and_others_with_another_seed() -> None:
    found = [token_blocks(Positions(), "x" * 8000, samples=16, seqlen=8, seed=n)[:, 0] for n in range(3)]  # type: ignore[arg-type]
    for starts in found:
        assert int(starts.min()) < 2000
        assert int(starts.max()) > 6000
    assert not torch.equal(found[0].sort().values, found[1].sort().values)
    assert not torch.equal(found[1], found[1].sort().values), "held-out samples are not the text's end"


def test_a_text_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(InputError, match="has 7 tokens, one sample needs 8; give a longer text"):
        token_blocks(Positions(), "x" * 7, samples=2, seqlen=8, seed=0)  # type: ignore[arg-type]


def unloaded(tokenizer: Any, kind: Kind | None = None) -> Any:
    """What is read of a model, a decoder by default, while its samples are made: it is never run."""
    embedding = torch.nn.Embedding(100_000, 1)
    model = SimpleNamespace(
        config=SimpleNamespace(decoder_start_token_id=5), get_input_embeddings=lambda: embedding
    )
    return SimpleNamespace(
        kind=kind or Causal(),
        model=model,
        context_length=None,
        tokenizer=tokenizer,
        require_tokenizer=lambda: tokenizer,
    )


def calibrated(calibration: Calibration, tokenizer: Any, notes: Notes | None = None) -> Tensor:
    """The tokens of a decoder's samples."""
    samples = calibration_samples(unloaded(tokenizer), "", calibration, notes or Notes())
    return samples.inputs["input_ids"]


def test_a_short_text_gives_fewer_samples_and_says_so(tmp_path: Path) -> None:
    path, notes = tmp_path / "short.txt", Notes()
    path.write_text("x" * 47)
    found = calibrated(Calibration(calib=str(path), samples=9, seqlen=8), Positions(), notes)
    assert found.unique().numel() == 5 * 8
    (line,) = notes.said
    assert f"{path} has 5 samples of 8 tokens that do not overlap, 9 were asked for" in line
    path.write_text("x" * 72)
    calibrated(Calibration(calib=str(path), samples=9, seqlen=8), Positions(), notes)
    assert len(notes.said) == 1


def test_a_text_of_one_sample_is_refused_since_none_could_be_held_out(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 15)
    with pytest.raises(InputError, match=r"short.txt has tokens for one sample of 8; a second one .* longer"):
        calibrated(Calibration(calib=str(path), samples=9, seqlen=8), Positions())


BOS = 0


@pytest.fixture(scope="module")
def adding(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, which knows a BOS and does not add it, as one that does."""
    changed = deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return changed


def test_the_tokenizer_says_whether_texts_begin_with_bos(
    tokenizer: PreTrainedTokenizerFast, adding: PreTrainedTokenizerFast
) -> None:
    assert tokenizer.bos_token_id == adding.bos_token_id == BOS
    assert (beginning_token(tokenizer), beginning_token(adding)) == (None, BOS)
    without = deepcopy(adding)
    without.bos_token = None
    assert beginning_token(without) is None


def test_samples_begin_with_bos_where_the_tokenizer_adds_it_and_only_there(
    tokenizer: PreTrainedTokenizerFast, adding: PreTrainedTokenizerFast, text_file: Path
) -> None:
    text = text_file.read_text()
    calibration = Calibration(calib=str(text_file), samples=6, seqlen=16)
    plain, begun = (calibrated(calibration, found) for found in (tokenizer, adding))
    assert plain.shape == begun.shape == (6, 16)
    assert torch.equal(plain, token_blocks(tokenizer, text, samples=6, seqlen=16, seed=0))
    assert not (plain == BOS).any()
    assert (begun[:, 0] == BOS).all()
    # What follows is text without a gap, 15 tokens of it.
    assert torch.equal(begun[:, 1:], token_blocks(tokenizer, text, samples=6, seqlen=15, seed=0))


@torch.inference_mode()
def test_text_that_the_model_writes_begins_with_bos_likewise(
    tiny_model_dir: Path, adding: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of text of one model may be kept side by side."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = copytree(tiny_model_dir, tmp_path / "model")
    adding.save_pretrained(other)
    calibration = Calibration(samples=5, seqlen=12)
    plain, begun = (
        calibration_samples(load_model(str(path)), "same", calibration, Progress()).inputs["input_ids"]
        for path in (tiny_model_dir, other)
    )
    assert plain.shape == begun.shape == (5, 12)
    assert not (plain == BOS).any()
    assert (begun[:, 0] == BOS).all()
    assert not (begun[:, 1:] == BOS).any()
    assert torch.equal(begun[:, 1], plain[:, 0]), "a random token of its own"
    assert not torch.equal(begun[:, 2:], plain[:, 1:-1]), "read after BOS"


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.tensors], ids=lambda kind: kind.name)
def test_other_kinds_and_evaluation_keep_their_own_beginnings(
    kind: Kind, tokenizer: PreTrainedTokenizerFast, adding: PreTrainedTokenizerFast, text_file: Path
) -> None:
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=16)
    plain, begun = (
        (
            calibration_samples(unloaded(found, kind), "", calibration, Progress()),
            [item.samples for item in evaluation_items(unloaded(found, kind), text_file.read_text(), 16, 3)],
        )
        for found in (tokenizer, adding)
    )
    pairs = [*zip(plain[1], begun[1], strict=True)]
    if not isinstance(kind, Causal):
        pairs.append((plain[0], begun[0]))
    for one, other in pairs:
        assert all(torch.equal(one.inputs[name], value) for name, value in other.inputs.items())
    if isinstance(kind, Causal):
        windows = torch.cat([samples.inputs["input_ids"] for samples in begun[1]])
        assert torch.equal(windows.flatten(), tokenize(tokenizer, text_file.read_text())[:48])


def pieces(text_file: Path, directory: Path, count: int) -> list[str]:
    """The text cut into files; as many tokens in each, about."""
    text = text_file.read_text()
    length = len(text) // count
    paths = [directory / f"{number}.txt" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(text[number * length : (number + 1) * length])
    return [str(path) for path in paths]


@pytest.mark.parametrize("lengths", [(5,), (4, 4), (5, 4, 4), (9, 3), (2, 30, 11), (1, 1, 1), (1, 40, 1, 7)])
def test_a_mixture_has_every_row_once_and_ends_with_one_of_each_part(lengths: tuple[int, ...]) -> None:
    parts = [torch.arange(length)[:, None] + 100 * number for number, length in enumerate(lengths)]
    mixed = interleaved(parts).flatten()
    assert torch.equal(mixed.sort().values, torch.cat(parts).flatten().sort().values)
    for number in range(len(lengths)):
        assert mixed[mixed // 100 == number].tolist() == parts[number].flatten().tolist(), "in its order"
        assert (mixed[-len(lengths) :] // 100 == number).sum() == 1
    if len(set(lengths)) == 1:
        assert (mixed // 100).tolist() == [*range(len(lengths))] * lengths[0]


@pytest.mark.parametrize("count", [2, 3])
def test_a_mixture_is_each_text_as_it_is_alone_and_each_is_held_out(
    count: int, tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    sources, notes = pieces(text_file, tmp_path, count), Notes()
    calibration = Calibration(calib=tuple(sources), samples=25, seqlen=16)
    mixed = calibrated(calibration, tokenizer, notes)
    assert mixed.shape == (25, 16)
    rest, held_out = mixed[: -(25 // HELD_OUT)].tolist(), mixed[-(25 // HELD_OUT) :].tolist()
    for source, share in calibration.shares.items():
        alone = calibrated(Calibration(calib=source, samples=share, seqlen=16), tokenizer)
        own = alone.tolist()
        assert [row for row in mixed.tolist() if row in own] == own
        assert any(row in own for row in held_out)
        assert any(row in own for row in rest)
        assert f"{share} samples of {source}" in notes.said[-1]


def test_one_source_gives_the_same_whichever_way_it_is_given(
    tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    one, listed = (
        Calibration(calib=calib, samples=5, seqlen=16) for calib in (str(text_file), (str(text_file),))
    )
    assert one == listed
    assert torch.equal(calibrated(one, tokenizer), calibrated(listed, tokenizer))


def test_a_short_part_of_a_mixture_gives_what_it_has_and_is_held_out_too(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    short, notes = tmp_path / "short.txt", Notes()
    short.write_text(text_file.read_text()[:40])
    calibration = Calibration(calib=(str(short), str(text_file)), samples=32, seqlen=16)
    mixed = calibrated(calibration, tokenizer, notes)
    own = token_blocks(tokenizer, short.read_text(), samples=16, seqlen=16, seed=0).tolist()
    assert 1 <= len(own) <= 3
    assert len(mixed) == 16 + len(own)
    assert any(row in own for row in mixed[-(len(mixed) // HELD_OUT) :].tolist())
    assert f"{short} has {len(own)} samples" in notes.said[0]


@torch.inference_mode()
def test_what_the_model_writes_goes_into_a_mixture(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = load_model(str(tiny_model_dir))
    mixed, read, written = (
        calibration_samples(loaded, "same", Calibration(calib=calib, samples=n, seqlen=12), Progress())
        for calib, n in ((("self", str(text_file)), 5), (str(text_file), 2), ("self", 3))
    )
    assert torch.equal(mixed.inputs["input_ids"][[1, 4]], read.inputs["input_ids"])
    assert torch.equal(mixed.inputs["input_ids"][[0, 2, 3]], written.inputs["input_ids"])


def test_mixtures_that_do_not_go_together_are_refused(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"source": "two sheep", "target": "deux moutons"}) + "\n")
    for kind in KINDS:
        loaded = unloaded(tokenizer, kind)

        def mixed(*sources: object, loaded: Any = loaded) -> None:
            calibration = Calibration(calib=tuple(map(str, sources)), samples=4, seqlen=8)
            calibration_samples(loaded, "", calibration, Progress())

        if kind.tensors:
            with pytest.raises(InputError, match="reads one safetensors file, got 2 sources; give one"):
                mixed("a.safetensors", "b.safetensors")
        elif kind.reads_pairs:
            for sources in ((pairs, text_file), (text_file, pairs)):
                with pytest.raises(InputError, match=r"pairs.jsonl holds pairs of texts.*give it alone"):
                    mixed(*sources)
        if not kind.writes_calibration_text:
            with pytest.raises(InputError, match="cannot write its own calibration text"):
                mixed(text_file, "self")


def test_a_mixture_is_told_from_others_by_every_text_and_their_order(tmp_path: Path) -> None:
    one, other, copy = (tmp_path / name for name in ("one.txt", "other.txt", "copy.txt"))
    for path, text in ((one, "a"), (other, "b"), (copy, "a")):
        path.write_text(text)
    found = [mixture_identity([*map(str, paths)]) for paths in ((one, other), (other, one), (one,), (other,))]
    found.append(mixture_identity([str(one), "self"]))
    assert len(set(found)) == len(found)
    assert mixture_identity([str(copy)]) == found[2], "by what they hold"
    other.write_text("c")
    assert mixture_identity([str(one), str(other)]) != found[0]
    with pytest.raises(InputError, match=r"one.txt and .*copy.txt hold the same; give each text once"):
        mixture_identity([str(one), str(other), str(copy)])
