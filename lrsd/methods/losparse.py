"""LoSparse: low rank plus sparse rows, both trained on the task."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lrsd.errors import SettingsError
from lrsd.methods.base import Method
from lrsd.settings import check_options, option

Task = Literal["auto", "text", "classify", "pairs"]
Importance = Literal["gradient", "magnitude"]


def _number(text: str) -> float:
    """Raises: SettingsError for a text that is no finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SettingsError(f"expected a number like 0.5 or 5e-5, got {text!r:.40}")
    return value


@dataclass(frozen=True, kw_only=True)
class Losparse(Method):
    """W = U V + S, from the truncated SVD of W; U, V and S are trained on a task with the rest of the model,
    and rows of S that matter least to the loss, |S dl/dS|, go one after the other. Needs gradients.

    Source: Li et al., "LoSparse: Structured Compression of Large Language Models based on Low-Rank and
    Sparse Approximation", ICML 2023, algorithm 1.
    """

    trains: ClassVar[bool] = True

    train: str | None = option(
        None,
        "File to train on: text, or rows (JSON, CSV, Parquet) of texts, of texts with labels, or of pairs of "
        "texts.",
        metavar="FILE",
        shown="none; it must be given",
    )
    task: Task = option(
        "auto",
        "What is learned: the next token (text), the label of a text or of two (classify), or a target text "
        "(pairs); auto: what the model does, encoders classify.",
    )
    text_columns: str | None = option(
        None,
        "Column of the text, the source of pairs, or two like premise,hypothesis.",
        metavar="NAME",
        shown="the common names",
    )
    label_column: str | None = option(None, "Column of the label.", metavar="NAME", shown="label")
    target_column: str | None = option(
        None, "Column of the text to write.", metavar="NAME", shown="the common names"
    )
    epochs: int = option(3, "Passes over the training file.", least=1)
    train_steps: int = option(0, "Optimizer steps instead of epochs; 0: epochs.", least=0)
    train_batch: int = option(32, "Training items per optimizer step, of each process.", least=1)
    learning_rate: float = option(5e-5, "Of AdamW, falling linearly to zero.", metavar="X", parse=_number)
    rank_share: float = option(
        0.5,
        "Share of the bytes that is low rank: 0 prunes rows only, 1 trains a truncated SVD only.",
        metavar="X",
        parse=_number,
    )
    importance: Importance = option(
        "gradient", "What a row's entries count: |S dl/dS| (gradient) or |S| (magnitude)."
    )
    prune_warmup: float = option(
        0.1, "Share of the steps before the first row goes.", metavar="X", parse=_number
    )
    prune_final: float = option(
        0.3, "Share of the steps at the end in which the rows are fixed.", metavar="X", parse=_number
    )
    prune_every: int = option(10, "Steps from one threshold to the next.", least=1)
    smoothing: float = option(
        0.85, "Weight of earlier windows in the moving average of importance.", metavar="X", parse=_number
    )
    distill_output: float = option(
        0.0, "Weight of the divergence from the dense model's output in the loss.", metavar="X", parse=_number
    )
    distill_layers: float = option(
        0.0, "Weight of the distance from the dense model's hidden states.", metavar="X", parse=_number
    )
    temperature: float = option(2.0, "Of both outputs in that divergence.", metavar="X", parse=_number)

    def __post_init__(self) -> None:
        check_options(self)
        within: dict[str, tuple[bool, str]] = {
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "rank_share": (0 <= self.rank_share <= 1, "from 0 to 1"),
            "prune_warmup": (0 <= self.prune_warmup < 1, "from 0 to below 1"),
            "prune_final": (0 <= self.prune_final < 1, "from 0 to below 1"),
            "smoothing": (0 <= self.smoothing < 1, "from 0 to below 1"),
            "distill_output": (self.distill_output >= 0, "0 or above"),
            "distill_layers": (self.distill_layers >= 0, "0 or above"),
            "temperature": (self.temperature > 0, "above 0"),
        }
        for name, (holds, what) in within.items():
            if not holds:
                value: Any = getattr(self, name)
                raise SettingsError(f"{name.replace('_', '-')} must be {what}, got {value}")
        if self.prune_warmup + self.prune_final >= 1:
            raise SettingsError(
                f"prune-warmup {self.prune_warmup} and prune-final {self.prune_final} leave no steps in "
                "between; lower one of them"
            )
        if self.text_columns is not None and not (all(self.columns) and len(self.columns) < 3):
            raise SettingsError(
                f"text-columns must be a name, or two like a,b, got {self.text_columns!r:.60}"
            )

    @property
    def distills(self) -> bool:
        """Whether the dense model is needed beside the one that is trained."""
        return self.distill_output > 0 or self.distill_layers > 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of text that were asked for; none: those that are known."""
        return tuple(map(str.strip, self.text_columns.split(","))) if self.text_columns is not None else ()
