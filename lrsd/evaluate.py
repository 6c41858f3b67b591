"""What was lost: perplexity, divergence from the dense model, speed."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrsd.data.sources import read_features, read_labelled, read_pairs, read_text
from lrsd.data.tokens import behind_start, enclosed, example, paired, speech_samples, tokenize
from lrsd.errors import InputError, NumericsError
from lrsd.model.cache import cached_pass
from lrsd.model.load import LoadedModel, load_model
from lrsd.model.samples import Samples, answer, chooses, distance, has_logits, run_model, try_running
from lrsd.model.types import Model, Tokenizer
from lrsd.progress import Progress
from lrsd.settings import Calibration

# Window of the published WikiText-2 perplexities.
_DEFAULT_SEQLEN = 2048
# Share of tokens that a masked language model is asked for.
_MASKED = 0.15
_LEAST_MASKED = 8
# Characters by which a path is told from a text.
_LONGEST_PATH = 4096
_PROTOCOLS = {
    "causal": "token perplexity, non-overlapping windows, all tokens but the first of a window scored",
    "masked": "masked-token perplexity, non-overlapping windows, 15 % of the tokens masked at once",
    "seq2seq": "token perplexity of targets given their sources, or of what follows a window given that",
}
_NONE = torch.zeros(0, dtype=torch.int64)
# Lengths of the speed measurement: long enough to hide start-up, short enough for a laptop.
_PREFILL_TOKENS = 512
_DECODE_TOKENS = 64
_SPEED_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp of the mean negative log-likelihood per scored token; protocol says how it was taken."""

    perplexity: float
    text: str
    windows: int
    seqlen: int
    scored_tokens: int
    protocol: str


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Against the dense model on the same windows: the mean of `measure` over the rows of its answer, which
    is KL(dense || model) where there is a head, and the fraction of rows on which both put the same entry
    first.
    """

    kl: float
    measure: str
    top1_agreement: float
    scored_tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of labelled texts that a classifier labels as they are."""

    accuracy: float
    text: str
    texts: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of one sequence: reading a prompt, and generating behind it. Best of repeats."""

    prefill: float
    decode: float
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Everything one `lrsd eval` measured."""

    model: str
    perplexity: tuple[Perplexity, ...]
    divergence: tuple[Divergence, ...]
    accuracy: Accuracy | None
    speed: Speed | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    source: str,
    texts: Sequence[str],
    *,
    seqlen: int | None = None,
    windows: int | None = None,
    dense: str | None = None,
    accuracy: str | None = None,
    with_speed: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> EvalResult:
    """Measure the model at `source` on every text, against the model at `dense` where one is given.

    Raises: InputError for a model or text that cannot be read, NumericsError for non-finite output.
    """
    progress = progress or Progress()
    if dense is not None and not texts:
        raise InputError("--kl needs a text: add --ppl wikitext or --ppl FILE")
    # Texts first: a wrong name should not cost the loading of a model.
    read_later = [text for text in texts if Path(text).suffix == ".safetensors" or read_pairs(text)]
    contents = {t: t if t in read_later else read_text(t, split="test", option="--ppl") for t in texts}
    loaded = load_model(source, dtype=dtype, device=device)
    try_running(loaded.model, example(loaded))
    context = loaded.context_length
    length = seqlen or min(_DEFAULT_SEQLEN, context or _DEFAULT_SEQLEN)
    if context is not None and length > context and loaded.kind != "speech":
        raise InputError(f"the model reads at most {context} tokens; lower --seqlen from {length}")
    predicts = loaded.kind in _PROTOCOLS
    if not predicts and dense is None and accuracy is None and not with_speed:
        raise InputError(
            f"{type(loaded.model).__name__} predicts no tokens; give --kl DENSE, or --accuracy FILE for a "
            "classifier"
        )
    reference = load_model(dense, dtype=dtype, device=device) if dense is not None else None
    scores: list[Perplexity] = []
    distances: list[Divergence] = []
    for text, content in contents.items():
        asked = questions(loaded, content, length, windows)
        if predicts:
            progress.stage(f"perplexity {text}", len(asked))
            scores.append(perplexity(loaded, asked, text, lambda: progress.step("")))
        if reference is not None:
            progress.stage(f"divergence {text}", len(asked))
            distances.append(
                divergence(loaded.model, reference.model, asked, text, lambda: progress.step(""))
            )
    return EvalResult(
        model=source,
        perplexity=tuple(scores),
        divergence=tuple(distances),
        accuracy=classify(loaded, accuracy) if accuracy is not None else None,
        speed=speed(loaded) if with_speed else None,
    )


@dataclass(frozen=True)
class Question:
    """One sample, and the rows of the model's answer to it that have a right token."""

    samples: Samples
    rows: Tensor
    labels: Tensor


def questions(loaded: LoadedModel, content: str, seqlen: int, windows: int | None) -> list[Question]:
    """The first `windows` non-overlapping windows of a text, as this kind of model is asked about them.

    content: the text, or the path of pairs, or of the features for a model that hears.
    """
    is_path = Path(content[:_LONGEST_PATH]).suffix == ".safetensors"
    if is_path != (loaded.kind == "speech"):
        reads = "a safetensors file of input_features" if loaded.kind == "speech" else "text"
        raise InputError(f"{type(loaded.model).__name__} reads {reads}; give that with --ppl")
    if loaded.kind == "speech":
        features = read_features(content, "--ppl")[:windows]
        settings = Calibration(calib=content, samples=max(2, len(features)), seqlen=max(8, seqlen))
        heard = speech_samples(loaded.model, settings)
        return [Question(sample, _NONE, _NONE) for sample in heard[: len(features)].split(1)]
    tokenizer = loaded.require_tokenizer()
    if loaded.kind == "seq2seq" and (pairs := read_pairs(content)):
        return [_paired(loaded, pair, seqlen) for pair in pairs[:windows]]
    length = 2 * seqlen if loaded.kind == "seq2seq" else seqlen
    found = evaluation_windows(tokenize(tokenizer, content), length, windows)
    everything = torch.arange(seqlen)
    if loaded.kind == "causal":
        return [Question(Samples({"input_ids": w[None]}), everything[:-1], w[1:]) for w in found]
    if loaded.kind == "seq2seq":
        asked = paired(loaded.model, found).split(1)
        return [Question(s, everything, w[seqlen:]) for s, w in zip(asked, found, strict=True)]
    blocks = enclosed(tokenizer, found)
    if loaded.kind == "masked":
        return [_masked(tokenizer, block, index) for index, block in enumerate(blocks)]
    return [Question(Samples({"input_ids": block[None]}), _NONE, _NONE) for block in blocks]


def _paired(loaded: LoadedModel, pair: tuple[str, str], seqlen: int) -> Question:
    """A source, and its target to be written; both at most `seqlen` tokens long."""
    tokenizer = loaded.require_tokenizer()
    source, target = (torch.tensor([tokenizer(text).input_ids[:seqlen]]) for text in pair)
    inputs = {"input_ids": source, "decoder_input_ids": behind_start(loaded.model, target)}
    return Question(Samples(inputs), torch.arange(target.shape[1]), target[0])


def _masked(tokenizer: Tokenizer, block: Tensor, seed: int) -> Question:
    """A window with 15 % of its tokens masked, the same ones whenever it is asked."""
    if tokenizer.mask_token_id is None:
        raise InputError("the tokenizer has no mask token; a masked language model needs one")
    if len(block) < _LEAST_MASKED:
        raise InputError(f"a masked language model needs windows of {_LEAST_MASKED} tokens; raise --seqlen")
    order = torch.randperm(len(block) - 2, generator=torch.Generator().manual_seed(seed))
    rows = (1 + order[: max(1, int(_MASKED * len(block)))]).sort().values
    hidden = block.clone()
    hidden[rows] = tokenizer.mask_token_id
    return Question(Samples({"input_ids": hidden[None]}), rows, block[rows])


def evaluation_windows(tokens: Tensor, seqlen: int, windows: int | None) -> Tensor:
    """The first `windows` non-overlapping windows of `seqlen` tokens (all whole ones if None).

    Raises: InputError if the text is shorter than what was asked for.
    """
    whole = tokens.numel() // seqlen
    wanted = windows if windows is not None else max(whole, 1)
    if whole < wanted:
        raise InputError(
            f"evaluation text has {tokens.numel()} tokens, {wanted} windows of {seqlen} need "
            f"{wanted * seqlen}; lower --windows or --seqlen"
        )
    return tokens[: wanted * seqlen].view(wanted, seqlen)


@torch.inference_mode()
def perplexity(
    loaded: LoadedModel, asked: Sequence[Question], text: str, step: Callable[[], None] = lambda: None
) -> Perplexity:
    """Token perplexity: exp of the mean negative log-likelihood of the questions' tokens.

    Raises: NumericsError if any window's likelihood is not finite.
    """
    total, scored = 0.0, 0
    for index, question in enumerate(asked):
        logits = answer(run_model(loaded.model, question.samples))[question.rows.to(loaded.model.device)]
        loss = float(cross_entropy(logits, question.labels.to(logits.device), reduction="sum").double())
        if not math.isfinite(loss):
            raise NumericsError(
                f"the model gives non-finite likelihoods in window {index + 1} of {len(asked)}"
            )
        total += loss
        scored += len(question.labels)
        step()
    return Perplexity(
        perplexity=math.exp(total / scored),
        text=text,
        windows=len(asked),
        seqlen=asked[0].samples.positions,
        scored_tokens=scored,
        protocol=_PROTOCOLS[loaded.kind],
    )


@torch.inference_mode()
def divergence(
    model: Model,
    dense: Model,
    asked: Sequence[Question],
    text: str,
    step: Callable[[], None] = lambda: None,
) -> Divergence:
    """KL and top-1 agreement with the dense model, over every row of its answers.

    Raises: InputError for different vocabularies.
    """
    total, agreeing, rows = 0.0, 0, 0
    for question in asked:
        found, reference = (answer(run_model(m, question.samples)) for m in (model, dense))
        if found.shape != reference.shape:
            raise InputError(
                f"the models have vocabularies of {found.shape[-1]} and {reference.shape[-1]} tokens; "
                "--kl needs the model that was compressed"
            )
        total += distance(dense, reference, found) * len(reference)
        agreeing += int((found.argmax(-1) == reference.argmax(-1)).sum())
        rows += len(reference)
        step()
    if not math.isfinite(total):
        raise NumericsError("the divergence is not finite: one of the models gives non-finite logits")
    return Divergence(
        kl=total / rows,
        measure="KL, nats" if chooses(dense, reference) else "half the relative squared error",
        top1_agreement=agreeing / rows,
        scored_tokens=rows,
        text=text,
    )


@torch.inference_mode()
def classify(loaded: LoadedModel, source: str) -> Accuracy:
    """Share of a file's texts that a classifier gives the label they have.

    Args: source: JSONL with "text" and "label", or CSV with these columns; a label is a number or a name.
    Raises: InputError for a model that is no classifier, or a row that has no such label.
    """
    names = getattr(loaded.model.config, "label2id", None) or {}
    classes = int(loaded.model.config.num_labels or 0)
    if loaded.kind != "encoder" or not has_logits(loaded.model):
        raise InputError(f"--accuracy needs a classifier, {type(loaded.model).__name__} is none")
    right = 0
    rows = read_labelled(source)
    for number, (text, label) in enumerate(rows, 1):
        wanted = int(label) if label.isdecimal() else names.get(label)
        if wanted is None or wanted >= classes:
            raise InputError(
                f"--accuracy: row {number} of {source}: label {label!r} is none of {', '.join(names)} or of "
                f"0 to {classes - 1}"
            )
        tokenizer = loaded.require_tokenizer()
        ids = tokenizer(text, truncation=True, max_length=loaded.context_length).input_ids
        found = answer(run_model(loaded.model, Samples({"input_ids": torch.tensor([ids])})))
        right += int(found[0].argmax()) == wanted
    return Accuracy(accuracy=right / len(rows), text=source, texts=len(rows))


@torch.inference_mode()
def speed(loaded: LoadedModel) -> Speed:
    """Prefill and decode tokens per second at batch 1, best of three.

    Raises: InputError for a model that does not write text token by token.
    """
    if loaded.kind != "causal":
        raise InputError(
            f"--speed is for models that write token by token, not {type(loaded.model).__name__}"
        )
    model = loaded.model
    vocabulary = model.config.get_text_config().vocab_size
    context = loaded.context_length or _PREFILL_TOKENS + _DECODE_TOKENS
    decoded = min(_DECODE_TOKENS, context // 2)
    prefilled = min(_PREFILL_TOKENS, context - decoded)
    prompt = torch.randint(vocabulary, (1, prefilled), generator=torch.Generator().manual_seed(0))
    prefill = decode = math.inf
    for _ in range(_SPEED_REPEATS):
        start = _now(model)
        logits, cache = cached_pass(model, prompt, None)
        prefill = min(prefill, _now(model) - start)
        start = _now(model)
        for _ in range(decoded):
            logits, cache = cached_pass(model, logits[:, -1:].argmax(-1), cache)
        decode = min(decode, _now(model) - start)
    return Speed(
        prefill=prefilled / prefill,
        decode=decoded / decode,
        device=str(model.device),
        threads=torch.get_num_threads(),
    )


def _now(model: Model) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
