"""Settings: keyword-only, frozen, validated at birth, written into the manifest."""

import math
import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from lrsd.errors import SettingsError

Method = Literal["lrsd", "ssd", "svd-llm", "asvd", "svd", "gptq", "columns"]
Structure = Literal["auto", "column", "row", "unstructured", "none"]
Allocation = Literal["auto", "kl", "uniform", "energy"]
Bits = Literal["auto", "16", "8", "6", "5", "4", "3", "2"]
Coding = Literal["entropy", "fixed"]
Scope = Literal["linear", "checkpoint"]
Dtype = Literal["auto", "bfloat16", "float16"]


# Tokens to calibrate on at most: thousands of times what is of use.
_MOST_TOKENS = 2**30


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """The text whose activations the fit is made on.

    source: "self" (text sampled from the model), "wikitext", "c4", a hub data set, or a local text
    or JSONL file; samples: token blocks, each `seqlen` long.
    """

    source: str = "self"
    samples: int = 128
    seqlen: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("samples", self.samples, 2)
        _at_least("seqlen", self.seqlen, 8)
        if self.samples * self.seqlen > _MOST_TOKENS:
            raise SettingsError(
                f"{self.samples:,} samples of {self.seqlen:,} tokens are more than {_MOST_TOKENS:,} in all"
            )
        _at_least("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise SettingsError(f"seed must be below 2^63, got {self.seed}")


@dataclass(frozen=True)
class Selection:
    """Which linears to compress: names that match any of `include` (all if empty) and none of `exclude`
    (shell patterns on the module name), with at least `min_weights` weights."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_weights: int = 0

    def reason_against(self, name: str, weights: int) -> str | None:
        """Why a linear layer stays dense; None if it does not."""
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "not among --include"
        if any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return "--exclude"
        return "fewer than --min-weights" if weights < self.min_weights else None


@dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    """What is fitted and within which bytes.

    ratio: 16-bit bytes before / after. scope: of the linear weights, or of the whole checkpoint, whose
    embeddings and head are then stored in 8 bit. method: "lrsd", or a published method
    as a preset of the same solver. structure: which channels S may keep. allocation: how bytes are
    shared among layers; "auto" is kl for lrsd, checked on held-out text, one energy threshold
    for ssd, equal shares for the others. bits: width of the codes that S may use; 16: none, low rank and
    kept channels only. coding: of the codes, where bits is auto: entropy coded, or of a fixed width that
    is chosen per layer; any other width is fixed. group: columns per scale and zero at a fixed width.
    rank: one rank for every layer instead. propagate: fit behind the compressed prefix; None: lrsd
    does where the loss is not small anyway. alternations: rounds between S and L (1: none).
    include, exclude, min_weights: which linear layers, see `Selection`; shard_size: of the files written.
    batch: samples per forward pass.
    """

    ratio: float
    scope: Scope = "linear"
    method: Method = "lrsd"
    structure: Structure = "auto"
    allocation: Allocation = "auto"
    bits: Bits = "auto"
    coding: Coding = "entropy"
    group: int = 64
    rank: int | None = None
    propagate: bool | None = None
    mean_correction: bool = False
    alternations: int = 5
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_weights: int = 0
    shard_size: str = "5GB"
    dtype: Dtype = "auto"
    device: str = "auto"
    batch: int = 8

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ratio) and self.ratio > 1):
            raise SettingsError(f"ratio must be above 1x, got {self.ratio:g}x; try 1.25x or 80%")
        for name, allowed in (
            ("method", Method), ("structure", Structure), ("allocation", Allocation), ("dtype", Dtype),
            ("bits", Bits), ("coding", Coding), ("scope", Scope),
        ):  # fmt: skip
            _one_of(name, getattr(self, name), get_args(allowed))
        _at_least("alternations", self.alternations, 1)
        _at_least("batch", self.batch, 1)
        _at_least("group", self.group, 1)
        _at_least("min-weights", self.min_weights, 0)
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", self.shard_size):
            raise SettingsError(f"shard-size must look like 5GB or 500MB, got {self.shard_size!r}")
        if self.method in ("ssd", "svd-llm", "asvd", "svd", "columns") and self.bits not in ("auto", "16"):
            raise SettingsError(f"method {self.method} is a 16-bit method; leave out --bits {self.bits}")
        if self.method == "gptq" and self.bits == "16":
            raise SettingsError("method gptq rounds to 2 to 8 bit; leave out --bits 16")
        if self.entropy_coded and self.structure not in ("auto", "none"):
            raise SettingsError(
                f"structure {self.structure} keeps channels at 16 bit, of no use to entropy-coded weights; "
                "add --bits 16, or --coding fixed"
            )
        if self.rank is not None:
            _at_least("rank", self.rank, 0 if self.entropy_coded else 1)

    @property
    def selection(self) -> Selection:
        return Selection(self.include, self.exclude, self.min_weights)

    @property
    def code_widths(self) -> tuple[int, ...]:
        """Fixed widths that the codes may have; empty where they are entropy coded, or none."""
        if self.bits not in ("auto", "16"):
            return (int(self.bits),)
        fixed = self.method == "gptq" or (self.method == "lrsd" and self.coding == "fixed")
        return (2, 3, 4, 5, 6, 8) if fixed and self.bits == "auto" else ()

    @property
    def entropy_coded(self) -> bool:
        return self.method == "lrsd" and self.bits == "auto" and self.coding == "entropy"

    @property
    def allocates_by(self) -> Allocation:
        if self.allocation != "auto" or self.method == "lrsd":
            return self.allocation
        return "energy" if self.method == "ssd" else "uniform"


def plain(settings: CompressionSettings) -> dict[str, Any]:
    """The settings as JSON reads them back."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()}


def recipe(settings: CompressionSettings, calibration: CalibrationSettings) -> dict[str, Any]:
    """All settings under the names of the command line's options, as `--recipe` reads them."""
    options = plain(settings) | asdict(calibration)
    options["calib"] = options.pop("source")
    options["ratio"] = f"{settings.ratio!r}x"
    options["rank"] = "auto" if settings.rank is None else settings.rank
    return options


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


def parse_size(text: str) -> int:
    """ "4GiB", "500MB" or "2G" in bytes; GB are 10^9, GiB and G 2^30. Raises: SettingsError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT])(i?B)?\s*", text, re.ASCII)
    if not match or float(match[1]) == 0:
        raise SettingsError(f"a size must look like 4GiB, 500MB or 2G, got {text!r}")
    base = 1000 if match[3] == "B" else 1024
    size = float(match[1]) * base ** ("KMGT".index(match[2]) + 1)
    if not math.isfinite(size):
        raise SettingsError(f"a size must look like 4GiB, 500MB or 2G, got {text[:20]}...")
    return int(size)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise SettingsError(f"{name} must be at least {least}, got {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
