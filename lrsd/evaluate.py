"""What was lost: perplexity, divergence from the dense model, speed."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from lrsd.data import read_text, tokenize
from lrsd.errors import InputError, NumericsError
from lrsd.model.load import LoadedModel, load_model
from lrsd.progress import Progress

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
    """Against the dense model on the same windows: mean KL(dense || model) in nats per token, and
    the fraction of tokens on which both put the same token first."""

    kl: float
    top1_agreement: float
    scored_tokens: int


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
    contents = {text: read_text(text, split="test", option="--ppl") for text in texts}
    loaded = load_model(source, dtype=dtype, device=device)
    context = loaded.context_length
    length = seqlen or min(_DEFAULT_SEQLEN, context or _DEFAULT_SEQLEN)
    if context is not None and length > context:
        raise InputError(f"the model reads at most {context} tokens; lower --seqlen from {length}")
    reference = load_model(dense, dtype=dtype, device=device) if dense is not None else None
    scores: list[Perplexity] = []
    distances: list[Divergence] = []
    for text, content in contents.items():
        blocks = evaluation_windows(tokenize(loaded.tokenizer, content), length, windows)
        progress.stage(f"perplexity {text}", len(blocks))
        scores.append(perplexity(loaded.model, blocks, text, lambda: progress.step("")))
        if reference is not None:
            progress.stage(f"divergence {text}", len(blocks))
            distances.append(divergence(loaded.model, reference.model, blocks, lambda: progress.step("")))
    return EvalResult(
        model=source,
        perplexity=tuple(scores),
        divergence=tuple(distances),
        speed=speed(loaded) if with_speed else None,
    )


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
    model: PreTrainedModel, windows: Tensor, text: str, step: Callable[[], None] = lambda: None
) -> Perplexity:
    """Token perplexity: every token but the first of a window is scored, given the window so far.

    Raises: NumericsError if any window's likelihood is not finite.
    """
    total = 0.0
    for index, window in enumerate(windows):
        logits = _logits(model, window)
        loss = float(cross_entropy(logits[:-1], window[1:].to(logits.device), reduction="sum").double())
        if not math.isfinite(loss):
            raise NumericsError(
                f"the model gives non-finite likelihoods in window {index + 1} of {len(windows)}"
            )
        total += loss
        step()
    scored = windows.shape[0] * (windows.shape[1] - 1)
    return Perplexity(
        perplexity=math.exp(total / scored),
        text=text,
        windows=windows.shape[0],
        seqlen=windows.shape[1],
        scored_tokens=scored,
        protocol="token perplexity, non-overlapping windows, all tokens but the first of a window scored",
    )


@torch.inference_mode()
def divergence(
    model: PreTrainedModel, dense: PreTrainedModel, windows: Tensor, step: Callable[[], None] = lambda: None
) -> Divergence:
    """KL and top-1 agreement with the dense model. Raises: InputError for different vocabularies."""
    total, agreeing = 0.0, 0
    for window in windows:
        logits, reference = _logits(model, window), _logits(dense, window)
        if logits.shape != reference.shape:
            raise InputError(
                f"the models have vocabularies of {logits.shape[-1]} and {reference.shape[-1]} tokens; "
                "--kl needs the model that was compressed"
            )
        total += float(
            kl_div(
                log_softmax(logits, -1), log_softmax(reference, -1), reduction="sum", log_target=True
            ).double()
        )
        agreeing += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        step()
    if not math.isfinite(total):
        raise NumericsError("the divergence is not finite: one of the models gives non-finite logits")
    tokens = windows.numel()
    return Divergence(kl=total / tokens, top1_agreement=agreeing / tokens, scored_tokens=tokens)


@torch.inference_mode()
def speed(loaded: LoadedModel) -> Speed:
    """Prefill and decode tokens per second at batch 1, best of three."""
    model = loaded.model
    vocabulary = model.config.get_text_config().vocab_size
    context = loaded.context_length or _PREFILL_TOKENS + _DECODE_TOKENS
    decoded = min(_DECODE_TOKENS, context // 2)
    prefilled = min(_PREFILL_TOKENS, context - decoded)
    prompt = torch.randint(vocabulary, (1, prefilled), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.device)
    prefill = decode = math.inf
    for _ in range(_SPEED_REPEATS):
        start = _now(model)
        state = model(prompt, use_cache=True)
        prefill = min(prefill, _now(model) - start)
        token, cache = state.logits[:, -1:].argmax(-1), state.past_key_values
        start = _now(model)
        for _ in range(decoded):
            state = model(token, past_key_values=cache, use_cache=True)
            token = state.logits[:, -1:].argmax(-1)
        decode = min(decode, _now(model) - start)
    return Speed(
        prefill=prefilled / prefill,
        decode=decoded / decode,
        device=str(model.device),
        threads=torch.get_num_threads(),
    )


def _logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    return model(window[None].to(model.device), use_cache=False).logits[0].float()


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
