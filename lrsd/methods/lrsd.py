"""The method of this program: low rank + kept channels at 16 bit, or integer codes on top of them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from lrsd.errors import SettingsError
from lrsd.methods import coded, low_rank_sparse
from lrsd.methods.base import LayerProblem, Method, Probe, Solution
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import Moments
from lrsd.settings import Allocation, check_options, option

Bits = Literal["auto", "16", "8", "6", "5", "4", "3", "2"]
Coding = Literal["entropy", "fixed"]
# Ranks offered on top of entropy-coded weights. On SmolLM2-135M a byte spent on rank there pays in the first
# block's query projection only.
_CODED_RANKS = (0, 4, 16)


def structures_of(text: str) -> tuple[str, ...]:
    """Kinds of S, "auto" being those that save multiply-adds anywhere. Raises: SettingsError."""
    if text in ("auto", "none"):
        return low_rank_sparse.EVERYWHERE if text == "auto" else ()
    kinds = tuple(kind.strip() for kind in text.split(","))
    known = low_rank_sparse.STRUCTURES
    if not set(kinds) <= set(known) or len(set(kinds)) < len(kinds):
        raise SettingsError(f"structure must be auto, none, or some of {','.join(known)}, got {text!r:.40}")
    return kinds


def parse_rank(text: str) -> int | str:
    """ "auto", "energy" or a whole number. Raises: SettingsError."""
    if text in ("auto", "energy"):
        return text
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise SettingsError(f"rank must be auto, energy or a whole number, got {text!r:.40}")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Lrsd(Method):
    """W ~ L + S fitted to the outputs: min tr((W - L - S) G (W - L - S)^T), G = E[x x^T].

    At 16 bit S keeps input channels (columns), output channels (rows) or entries, exact for the chosen set,
    the choice and L alternating (see `numerics.structured`). Else S rounds the columns to integers with error
    feedback, entropy coded or of a fixed width (see `numerics.rounding`), rounding and L alternating.
    """

    default_allocation: ClassVar[Allocation] = "auto"
    propagates: ClassVar[bool] = True

    bits: Bits = option(
        "auto",
        "auto: as many per layer as pay; 16: no rounding, low rank and kept channels only; others: codes of "
        "this width, and 16-bit columns.",
    )
    coding: Coding = option(
        "entropy",
        "How --bits auto stores codes: entropy coded (best quality per byte), or at a fixed width per layer "
        "that kernels can read in place.",
    )
    group: int = option(64, "Columns per scale and zero of group-wise codes.", least=1)
    structure: str = option(
        "auto",
        "What S keeps on top of the low rank: input channels (column), output channels (row), square blocks "
        "(block), two of every four columns of a row (2:4), single entries (unstructured), or none; of "
        "several, such as column,row, per layer what loses least; auto: column,row.",
        metavar="auto|none|KIND,...",
    )
    block_size: int = option(16, "Side of the blocks that S may keep: 16 or 32.", least=2)
    rank: int | str = option(
        "auto",
        "auto: by --allocation; energy: one energy threshold; N: this rank everywhere.",
        metavar="auto|energy|N",
        parse=parse_rank,
    )
    grid: Literal["trellis", "plain"] = option(
        "trellis",
        "What entropy-coded columns are rounded to: paths through a trellis of 64 states (dependent "
        "quantization), or a plain grid.",
    )
    row_weights: bool = option(
        True, "Weigh output channels by what they do to their block's output, from its derivative."
    )
    token_weights: bool = option(
        False, "Weigh calibration tokens likewise; on SmolLM2-135M that lost more than it won."
    )
    mean_correction: bool = option(False, "Buy a bias that restores each layer's mean output.")
    alternations: int = option(5, "Rounds of choosing S and fitting L; 1 is none.", least=1)

    def __post_init__(self) -> None:
        check_options(self)
        structures_of(self.structure)
        if self.rank not in ("auto", "energy") and not isinstance(self.rank, int):
            raise SettingsError(f"rank must be auto, energy or a whole number, got {self.rank!r:.40}")
        least = 0 if self.entropy_coded else 1
        if isinstance(self.rank, int) and self.rank < least:
            raise SettingsError(f"rank must be at least {least}, got {self.rank}")
        if self.entropy_coded and self.structure not in ("auto", "none"):
            raise SettingsError(
                f"structure {self.structure} keeps channels at 16 bit, of no use to entropy-coded weights; "
                "add --bits 16, or --coding fixed"
            )
        if self.widths and self.structure not in ("auto", "column", "none"):
            raise SettingsError(
                f"structure {self.structure} does not go with group-wise codes, which keep 16-bit columns or "
                "none; leave it out, or add --bits 16"
            )
        if self.widths and isinstance(self.rank, int):
            raise SettingsError("rank does not go with group-wise codes; leave it out, or add --bits 16")

    @property
    def entropy_coded(self) -> bool:
        return self.bits == "auto" and self.coding == "entropy"

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that group-wise codes may have; empty where there are none."""
        if self.bits == "auto":
            return coded.WIDTHS if self.coding == "fixed" else ()
        return () if self.bits == "16" else (int(self.bits),)

    @property
    def rounds(self) -> bool:  # type: ignore[override]  # a setting here, a fact of the method elsewhere
        return self.bits != "16"

    @property
    def states(self) -> int:
        """Of the trellis."""
        return 64 if self.grid == "trellis" else 1

    @property
    def weighs_rows(self) -> bool:  # type: ignore[override]  # a setting here
        # Group-wise codes have a scale per row anyway.
        return self.row_weights and not self.widths

    @property
    def weighs_tokens(self) -> bool:  # type: ignore[override]
        return self.token_weights

    def metric(self, moments: Moments) -> Metric:
        return Metric(moments.gram, damps_by_channel=True)

    def allocation(self, asked: Allocation) -> str:
        if isinstance(self.rank, int) and not self.rounds:
            return "smallest"
        return "energy" if self.rank == "energy" else asked

    def offer(self, problem: LayerProblem) -> Menu:
        added = self.mean_correction and problem.bias_O is None
        if self.entropy_coded:
            ranks = (self.rank,) if isinstance(self.rank, int) else _CODED_RANKS
            return coded.offer_entropy_coded(
                problem, [min(rank, *problem.W_OI.shape) for rank in ranks], self.states, bias=added
            )
        if self.widths:
            shares = coded.OUTLIER_SHARES if self.structure in ("auto", "column") else (0.0,)
            return coded.offer_groupwise(problem, self.widths, self.group, shares)
        rank = self.rank if isinstance(self.rank, int) else None
        kinds = structures_of(self.structure)
        return low_rank_sparse.offer(problem, kinds, block=self.block_size, rank=rank, bias=added)

    def solve(self, problem: LayerProblem, choice: Choice, *, quick: bool = False) -> Solution:
        iterations = 1 if quick else self.alternations
        solve = coded.solve if self.rounds else low_rank_sparse.solve
        return solve(problem, choice, iterations=iterations, corrects_mean=self.mean_correction)

    def probe(self, problem: LayerProblem, menu: Menu) -> Probe:
        return coded.probe(problem, menu) if self.rounds else low_rank_sparse.probe(problem)

    def adjusted(self, choice: Choice, bits: float) -> Choice | None:
        return coded.adjusted(choice, bits)
