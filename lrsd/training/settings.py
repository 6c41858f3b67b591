"""Settings of the recovery: the options of `lrsd recover`."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from lrsd.errors import SettingsError
from lrsd.settings import Calibration, check_options, option

Stage = Literal["blocks", "model", "both"]

# Largest step of a tensor relative to its size; beyond that nothing of it would be left.
_LARGEST_RATE = 1.0


def _number(text: str) -> float:
    """Raises: SettingsError."""
    try:
        return float(text)
    except ValueError as error:
        raise SettingsError(f"expected a number like 0.0005, got {text!r:.40}") from error


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What is distilled from the dense model, on what text, for how long.

    text: a source, or several (a text where it is one, a tuple of them else, whichever was given).
    """

    text: str | tuple[str, ...] = option(
        "self",
        "Text to train on, as --calib of lrsd compress: self, wikitext, c4, ptb, a file, a hub data set; "
        "repeatable, for a mixture of equal shares.",
        metavar="SOURCE",
    )
    samples: int = option(128, "Samples; an eighth of them is held out.", least=2)
    seqlen: int = option(512, "Tokens per sample.", least=8)
    seed: int = option(0, "Seed of the text and of the order of the samples.", least=0)
    batch: int = option(2, "Samples per step.", least=1)
    stage: Stage = option(
        "blocks",
        "What is compared with the dense model: each block's output, one block at a time (blocks), the "
        "logits, all blocks at once (model), or one after the other (both).",
    )
    block_epochs: int = option(2, "Passes over the samples of each block.", least=1)
    model_epochs: int = option(2, "Passes over the samples of the whole model.", least=1)
    block_rate: float = option(
        0.0005, "Largest step of a block's tensor, relative to its size.", metavar="R", parse=_number
    )
    model_rate: float = option(
        0.0002, "The same where the whole model is trained.", metavar="R", parse=_number
    )
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: an accelerator that has float64, else cpu.")

    def __post_init__(self) -> None:
        """Raises: SettingsError."""
        check_options(self)
        object.__setattr__(self, "text", self.calibration.calib)
        for name in ("block_rate", "model_rate"):
            rate = getattr(self, name)
            if not (math.isfinite(rate) and 0 < rate <= _LARGEST_RATE):
                raise SettingsError(
                    f"{name.replace('_', '-')} must be above 0 and at most {_LARGEST_RATE:g}, got {rate:g}; "
                    "try 0.0005"
                )

    @staticmethod
    def of(**options: Any) -> "Recovery":
        """From options by name; texts are parsed as the command line does. Raises: SettingsError."""
        parsers = {found.name: found.metadata["parse"] for found in fields(Recovery)}
        if unknown := sorted(set(options) - set(parsers)):
            raise SettingsError(f"unknown setting {unknown[0]!r}; available: {', '.join(parsers)}")
        return Recovery(**{
            name: parsers[name](value) if parsers[name] and isinstance(value, str) else value
            for name, value in options.items()
        })  # fmt: skip

    @property
    def calibration(self) -> Calibration:
        """The text and its size as a compression has them."""
        return Calibration(
            calib=self.text, samples=self.samples, seqlen=self.seqlen, seed=self.seed, batch=self.batch
        )
