"""Evaluation: perplexity, KL from the dense model, tasks, accuracy, speed."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lrsd.checkpoint.card import CardMetric
from lrsd.data.sources import (
    Content,
    Document,
    join_documents,
    label_number,
    read_content,
    read_documents,
    read_labelled,
    read_pairs,
)
from lrsd.data.tokens import evaluation_items, require_context
from lrsd.errors import InputError, NumericsError
from lrsd.model.cache import cached_pass
from lrsd.model.kinds.base import EvaluationItem
from lrsd.model.load import LoadedModel, load_model
from lrsd.model.samples import (
    Samples,
    distance,
    is_categorical,
    logits_of,
    outputs_of,
    run_model,
    try_running,
)
from lrsd.model.types import Model
from lrsd.numerics.divergence import rows_at_once
from lrsd.progress import Progress
from lrsd.runtimes.lm_eval import TaskScore, open_tasks, run_tasks, task_scores

# Window of the published WikiText-2 perplexities.
_DEFAULT_SEQLEN = 2048
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
    """Against the dense model on the same windows: the mean of `measure` over the rows of its logits, which
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
    """Tokens per second of one sequence: reading a prompt, and generating after it. Best of repeats."""

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
    tasks: tuple[TaskScore, ...] = ()

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
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch: int = 8,
    trust_tasks: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> EvalResult:
    """Measure the model at `source` on every text, against the model at `dense` where one is given, and on
    tasks of lm-evaluation-harness, see `open_tasks`.

    Args: limit: items of each task; batch: requests of a task at once; others as of `lrsd eval`.
    Raises: InputError for a model or text that cannot be read, NumericsError for non-finite output.
    """
    progress = progress or Progress()
    if dense is not None and not texts:
        raise InputError("--kl needs a text: add --ppl wikitext or --ppl FILE")
    # Texts first: a wrong name should not cost the loading of a model.
    documents = {
        text: read_documents(text, split="test", option="--ppl")
        for text in texts
        if not _holds_tensors(text) and not read_pairs(text, "--ppl")
    }
    opened = open_tasks(tasks, trusted=trust_tasks) if tasks else None
    loaded = load_model(source, dtype=dtype, device=device)
    kind = loaded.kind
    try_running(loaded.model, kind.example(loaded.model))
    context = loaded.context_length
    length = seqlen or min(_DEFAULT_SEQLEN, context or _DEFAULT_SEQLEN)
    require_context(loaded, length)
    predicts = kind.perplexity_protocol is not None
    if not predicts and dense is None and accuracy is None and not with_speed and not tasks:
        raise InputError(
            f"{type(loaded.model).__name__} predicts no tokens; give --kl DENSE, or --accuracy FILE for a "
            "classifier"
        )
    reference = load_model(dense, dtype=dtype, device=device) if dense is not None else None
    scores: list[Perplexity] = []
    distances: list[Divergence] = []
    for text in dict.fromkeys(texts):
        items = evaluation_items(loaded, _opened(loaded, text, documents), length, windows)
        if not predicts and reference is None:
            continue
        progress.stage(f"evaluate on {text}", len(items))
        score, found = measure(loaded, items, text, reference, lambda: progress.step(""))
        scores += [score] if score is not None else []
        distances += [found] if found is not None else []
    answered: tuple[TaskScore, ...] = ()
    if opened is not None:
        progress.stage("tasks", 1)
        answered = task_scores(run_tasks(loaded, opened, limit=limit, batch=batch))
        progress.step(", ".join(tasks))
    return EvalResult(
        model=source,
        perplexity=tuple(scores),
        divergence=tuple(distances),
        accuracy=classify(loaded, accuracy) if accuracy is not None else None,
        speed=speed(loaded) if with_speed else None,
        tasks=answered,
    )


def card_metrics(result: EvalResult) -> list[CardMetric]:
    """What was measured as a model card has it, but for speed, which is the machine's."""
    found = [CardMetric(one.text, "perplexity", one.perplexity, one.protocol) for one in result.perplexity]
    found += [CardMetric(one.text, "kl", one.kl, one.measure) for one in result.divergence]
    found += [CardMetric(one.text, "top-1 agreement", one.top1_agreement) for one in result.divergence]
    if result.accuracy is not None:
        found.append(CardMetric(result.accuracy.text, "accuracy", result.accuracy.accuracy))
    found += [CardMetric(one.task, one.metric, one.score, f"{one.items} items") for one in result.tasks]
    return found


def _holds_tensors(text: str) -> bool:
    return Path(text).suffix == ".safetensors"


def _opened(loaded: LoadedModel, text: str, documents: Mapping[str, Sequence[Document]]) -> Content:
    """documents: what has been read already.

    Raises: InputError for a format that this kind of model does not read.
    """
    kind = loaded.kind
    if _holds_tensors(text) != bool(kind.tensors):
        raise InputError(f"{type(loaded.model).__name__} reads {kind.reads}; give that with --ppl")
    if text in documents:
        return join_documents(documents[text], loaded.tokenizer)
    return read_content(text, kind, split="test", option="--ppl", tokenizer=loaded.tokenizer)


@torch.inference_mode()
def measure(
    loaded: LoadedModel,
    items: Sequence[EvaluationItem],
    text: str,
    reference: LoadedModel | None = None,
    step: Callable[[], None] = lambda: None,
) -> tuple[Perplexity | None, Divergence | None]:
    """Perplexity of a model that predicts tokens, exp of the mean negative log-likelihood of its labels; and
    KL and top-1 agreement with the dense model, over every row of its logits. One pass of each model.

    Raises: InputError for different vocabularies, NumericsError for output that is not finite.
    """
    model, protocol = loaded.model, loaded.kind.perplexity_protocol
    loss = distance_sum = 0.0
    scored = agreeing = compared = 0
    for index, item in enumerate(items):
        found = outputs_of(run_model(model, item.samples))
        if protocol is not None:
            loss += _loss(found, item)
            scored += len(item.labels)
            if not math.isfinite(loss):
                raise NumericsError(
                    f"the model gives non-finite likelihoods in window {index + 1} of {len(items)}"
                )
        if reference is not None:
            dense = outputs_of(run_model(reference.model, item.samples))
            if found.shape != dense.shape:
                raise InputError(
                    f"the models have vocabularies of {found.shape[-1]} and {dense.shape[-1]} tokens; "
                    "--kl needs the model that was compressed"
                )
            distance_sum += distance(reference.model, dense, found) * len(dense)
            agreeing += int((found.argmax(-1) == dense.argmax(-1)).sum())
            compared += len(dense)
        step()
    if not math.isfinite(distance_sum):
        raise NumericsError("the divergence is not finite: one of the models gives non-finite logits")
    score = divergence = None
    if protocol is not None:
        score = Perplexity(
            perplexity=math.exp(loss / scored),
            text=text,
            windows=len(items),
            seqlen=items[0].samples.positions,
            scored_tokens=scored,
            protocol=protocol,
        )
    if reference is not None:
        categorical = is_categorical(reference.model, dense)
        divergence = Divergence(
            kl=distance_sum / compared,
            measure="KL, nats" if categorical else "half the relative squared error",
            top1_agreement=agreeing / compared,
            scored_tokens=compared,
            text=text,
        )
    return score, divergence


def _loss(logits: Tensor, item: EvaluationItem) -> float:
    """Negative log-likelihood of an item's labels, a few rows at a time."""
    rows, labels = (part.to(logits.device).split(rows_at_once(logits)) for part in (item.rows, item.labels))
    return sum(
        float(cross_entropy(logits[some].float(), right, reduction="sum").double())
        for some, right in zip(rows, labels, strict=True)
    )


@torch.inference_mode()
def classify(loaded: LoadedModel, source: str) -> Accuracy:
    """Share of a file's texts, or pairs of texts, that a classifier gives the label they have.

    Args: source: JSONL with "text" and "label", or CSV with these columns, see `read_labelled`; a label is a
        number or a name.
    Raises: InputError for a model that is no classifier, or a row that has no such label.
    """
    names = getattr(loaded.model.config, "label2id", None) or {}
    classes = int(loaded.model.config.num_labels or 0)
    if not loaded.kind.is_classifier(loaded.model):
        raise InputError(f"--accuracy needs a classifier, {type(loaded.model).__name__} is none")
    right = 0
    rows = read_labelled(source)
    for texts, label, place in rows:
        wanted = label_number(label, names)
        if wanted is None or wanted >= classes:
            raise InputError(
                f"--accuracy: {place}: label {label!r} is none of {', '.join(names)} or of 0 to {classes - 1}"
            )
        tokenizer = loaded.require_tokenizer()
        encoded = tokenizer(*texts, truncation=True, max_length=loaded.context_length, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        found = logits_of(run_model(loaded.model, Samples(inputs)))
        right += int(found[0].argmax()) == wanted
    return Accuracy(accuracy=right / len(rows), text=source, texts=len(rows))


@torch.inference_mode()
def speed(loaded: LoadedModel) -> Speed:
    """Prefill and decode tokens per second at batch 1, best of three.

    Raises: InputError for a model that does not write text token by token.
    """
    if not loaded.kind.timed_by_token:
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
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
