"""Settings: small frozen classes, validated at birth. Their fields are the options of the command line, the
keys of a recipe and the rows of the README's table, each with its help beside it.

A method's own settings are in its file, see `lrsd.methods`.
"""

import math
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args, get_origin

from lrsd.errors import SettingsError

Allocation = Literal["auto", "kl", "uniform", "energy"]
Scope = Literal["linear", "checkpoint"]
Dtype = Literal["auto", "bfloat16", "float16"]
Format = Literal["lrsd", "compressed-tensors", "gguf"]

# Tokens to calibrate on at most: thousands of times what is of use.
_MOST_TOKENS = 2**30


def option(
    default: Any,
    help: str,  # noqa: A002 - what click calls it
    *,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    least: int | None = None,
    shown: str | None = None,
) -> Any:
    """A field that is an option. parse: text to value, where that is more than its type; least: of a number;
    shown: the default, in words."""
    about = {"help": help, "metavar": metavar, "parse": parse, "least": least, "shown": shown}
    return field(default=default, metadata=about)


def is_repeatable(found: Field[Any]) -> bool:
    """Whether an option may be given several times: its values are a tuple, or one of them alone."""
    return tuple in (get_origin(kind) for kind in (found.type, *get_args(found.type)))


def check_options(settings: Any) -> None:
    """Raises: SettingsError for a value outside its field's choices or range."""
    for found in fields(settings):
        value, name = getattr(settings, found.name), found.name.replace("_", "-")
        if get_origin(found.type) is Literal and value not in get_args(found.type):
            raise SettingsError(f"{name} must be one of {', '.join(get_args(found.type))}, got {value!r:.40}")
        least = found.metadata.get("least")
        if least is not None and isinstance(value, int) and value < least:
            raise SettingsError(f"{name} must be at least {least}, got {value}")


def parse_ratio(text: str) -> float:
    """ "1.25x", "1.25" or "80%" (kept) as a ratio above 1.

    Raises: SettingsError with the accepted forms.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(x|X|%)?\s*", text)
    if not match or float(match[1]) == 0:
        raise SettingsError(f"ratio must look like 1.25x, 1.25 or 80%, got {text!r}")
    value = 100 / float(match[1]) if match[2] == "%" else float(match[1])
    if value <= 1:
        raise SettingsError(f"ratio must be above 1x (less than 100% kept), got {text!r}; try 1.25x or 80%")
    return value


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many bytes, and how layers share them."""

    ratio: float = option(
        math.nan,
        "16-bit bytes before / after: 4x, 1.25, or 80% kept.",
        metavar="R",
        parse=parse_ratio,
        shown="this or --size",
    )
    size: str | None = option(
        None,
        "Size of the result instead, e.g. 1.5GiB: of all weights, with --format gguf of the file.",
        metavar="SIZE",
        shown="none",
    )
    scope: Scope = option(
        "linear",
        "What --ratio is of: the linear weights, or the whole checkpoint, embeddings and head then being "
        "stored in 8 bit (gguf: in the type that pays).",
        shown="linear; with --size or --format gguf checkpoint",
    )
    allocation: Allocation = option(
        "auto",
        "How layers share the bytes: by their effect on the output (kl), equally (uniform), or by one energy "
        "threshold (energy); auto: kl, checked against equal shares on held-out text (baselines: their own "
        "rule).",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if (self.size is None) == math.isnan(self.ratio):
            raise SettingsError("give either --ratio, like 4x, or --size, like 1.5GiB")
        if self.size is None and not (math.isfinite(self.ratio) and self.ratio > 1):
            raise SettingsError(f"ratio must be above 1x, got {self.ratio:g}x; try 1.25x or 80%")
        if self.size is not None:
            parse_size(self.size)
            if self.scope == "linear":
                raise SettingsError(
                    "size is of the whole checkpoint, not of scope linear; leave out one of the two"
                )

    def whole(self, dense: int) -> int:
        """Bytes asked for of all weights, where these take `dense` bytes at 16 bit."""
        return int(dense / self.ratio) if self.size is None else parse_size(self.size)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which linears to compress: names that match any of `include` (all if empty) and none of `exclude`
    (shell patterns on the module name), with at least `min_weights` weights."""

    include: tuple[str, ...] = option(
        (),
        "Compress only linear layers whose name matches, e.g. '*.mlp.*'; repeatable.",
        metavar="PATTERN",
        shown="all",
    )
    exclude: tuple[str, ...] = option(
        (), "Leave matching linear layers dense; repeatable.", metavar="PATTERN", shown="none"
    )
    min_weights: int = option(0, "Leave linear layers of fewer weights dense.", least=0)

    def __post_init__(self) -> None:
        check_options(self)

    def reason_against(self, name: str, weights: int) -> str | None:
        """Why a linear layer stays dense; None if it does not."""
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "not among --include"
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return "--exclude"
        return "fewer than --min-weights" if weights < self.min_weights else None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text whose activations the fit is made on, and in which model.

    calib: a source, or several (a text where it is one, a tuple of them else, whichever was given).
    """

    calib: str | tuple[str, ...] = option(
        "self",
        "Calibration text: self (sampled from the model), wikitext, c4, ptb, a file of text or of rows "
        "(JSON, CSV, Parquet), or a hub data set; repeatable, for a mixture of equal shares.",
        metavar="SOURCE",
    )
    samples: int = option(128, "Calibration samples.", least=2)
    seqlen: int = option(
        512, "Tokens per calibration sample; method losparse: of a training item at most.", least=8
    )
    seed: int = option(0, "Seed of the calibration text, or of the training.", least=0)
    batch: int = option(8, "Calibration samples per forward pass.", least=1)
    propagate: bool | None = option(
        None,
        "Calibrate each layer on the compressed model's activations (error-propagating calibration).",
        shown="method lrsd does, unless the expected loss is tiny",
    )

    def __post_init__(self) -> None:
        sources = tuple(self.calib) if isinstance(self.calib, tuple | list) else (self.calib,)
        _check_sources(sources)
        object.__setattr__(self, "calib", sources[0] if len(sources) == 1 else sources)
        check_options(self)
        if self.samples < len(sources):
            raise SettingsError(
                f"samples must be at least {len(sources)}, one of each calib source, got {self.samples}"
            )
        if self.samples * self.seqlen > _MOST_TOKENS:
            raise SettingsError(
                f"{self.samples:,} samples of {self.seqlen:,} tokens are more than {_MOST_TOKENS:,} in all"
            )
        if self.seed >= 2**63:
            raise SettingsError(f"seed must be below 2^63, got {self.seed}")

    @property
    def shares(self) -> dict[str, int]:
        """Samples of each source: equally many, what is left over going to the first ones."""
        sources = (self.calib,) if isinstance(self.calib, str) else self.calib
        share, rest = divmod(self.samples, len(sources))
        return {source: share + (number < rest) for number, source in enumerate(sources)}


def _check_sources(sources: tuple[Any, ...]) -> None:
    if not sources or not all(isinstance(source, str) for source in sources):
        raise SettingsError(f"calib must be a source of text, or several, got {list(sources)!r:.80}")
    for number, source in enumerate(sources):
        if source in sources[:number]:
            raise SettingsError(f"calib has {source!r:.80} twice; give each source once, shares are equal")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where it runs, and what is written."""

    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: an accelerator that has float64, else cpu.")
    device_memory: str | None = option(
        None,
        "Memory of an accelerator that this may take, e.g. 20GiB; blocks that do not fit wait on the host.",
        metavar="SIZE",
        shown="what is free on it",
    )
    format: Format = option(
        "lrsd",
        "What is written: lrsd's own format; compressed-tensors, which vLLM, SGLang and transformers load "
        "without lrsd, by --method integers; or gguf for llama.cpp, made of a GGUF file by --method gguf.",
    )
    dtype: Dtype = option("auto", "16-bit type of what is stored.")
    shard_size: str = option("5GB", "Largest file of the checkpoint.", metavar="SIZE")

    def __post_init__(self) -> None:
        check_options(self)
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", self.shard_size):
            raise SettingsError(f"shard-size must look like 5GB or 500MB, got {self.shard_size!r}")
        if self.device_memory is not None:
            parse_size(self.device_memory)


def parse_size(text: str) -> int:
    """ "4GiB", "500MB", "2G" or "700B" in bytes; GB are 10^9, GiB and G 2^30. Raises: SettingsError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(?:([KMGT])(i?B)?|B)\s*", text, re.ASCII)
    if not match or float(match[1]) == 0:
        raise SettingsError(f"a size must look like 4GiB, 500MB or 2G, got {text!r}")
    base = 1000 if match[3] == "B" else 1024
    size = float(match[1]) * base ** ("BKMGT".index(match[2] or "B"))
    if not math.isfinite(size):
        raise SettingsError(f"a size must look like 4GiB, 500MB or 2G, got {text[:20]}...")
    return int(size)
