"""Integer codes with 16-bit columns or low rank on top: what lrsd and gptq share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lrsd.forms.entropy import Entropy
from lrsd.forms.groupwise import Groupwise
from lrsd.forms.layer import Layer
from lrsd.forms.lowrank import LowRank
from lrsd.methods.base import LayerProblem, Probe, Solution, State, Status, Summand, store
from lrsd.numerics.lowrank import spectrum
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.rates import ecsq_rates
from lrsd.numerics.rounding import EntropyCodes, GroupCodes, HessianFactor, round_ecsq, round_groupwise
from lrsd.numerics.solver import columns_plus_codes, decompose_coded

# Widths that group-wise codes may have where each layer has its own.
WIDTHS = (2, 3, 4, 5, 6, 8)
# Shares of the columns that may stay at 16 bit where codes are of a fixed width.
OUTLIER_SHARES = (0, 1 / 64, 1 / 32)
# Widest codes that are tried out for their error; a bit more quarters it.
_MEASURED_BITS = 4
# Widest codes of a sensitivity probe.
_PROBE_BITS = 4


def offer_entropy_coded(problem: LayerProblem, ranks: Sequence[int], *, bias: bool) -> Menu:
    """Entropy-coded columns on top of each of these ranks, over a ladder of steps. Raises: SolverError."""
    metric, W_OI = problem.metric, problem.W_OI
    # Of a layer that puts nothing out every form is exact.
    total = problem.energy or math.inf
    whole = spectrum(W_OI.float(), metric.single.gram) if any(ranks) else None
    rates = ecsq_rates(W_OI, metric.factor, whole, total, ranks)
    terms = (LowRank(rates.ranks_N), Entropy(rates.streams_N))  # type: ignore[arg-type]  # all offers at once
    layer = Layer(terms=terms, bias=bias, added_bias=bias)
    parameters = {"rank": rates.ranks_N, "step": rates.steps_N}
    nbytes = layer.nbytes(problem.shape)
    return Menu.of(problem.shape.dense_bytes, nbytes, rates.errors_N, parameters)


def offer_groupwise(
    problem: LayerProblem, widths: Sequence[int], group: int, shares: Sequence[float]
) -> Menu:
    """Group-wise codes at each width, with each share of the columns kept at 16 bit: rounded at up to 4 bit
    to see the error, wider ones quarter it per bit. Raises: SolverError."""
    shape = problem.shape
    nbytes, errors, kept, bits = [], [], [], []
    for share in shares:
        columns = round(share * shape.in_features)
        split, factor = columns_plus_codes(problem.W_OI, problem.metric, columns)
        measured: dict[int, float] = {}
        for width in sorted(widths):
            tried = min(width, _MEASURED_BITS)
            if tried not in measured:
                quantize = partial(round_groupwise, bits=tried, group=group)
                found = decompose_coded(problem.W_OI, problem.metric.gram, quantize, split, factor)
                measured[tried] = found.error
            nbytes.append(Layer(terms=(Groupwise(width, group),), columns=columns).nbytes(shape))
            errors.append(measured[tried] / 4 ** (width - tried))
            kept.append(columns)
            bits.append(width)
    parameters = {"columns": kept, "bits": bits, "group": [group] * len(bits)}
    return Menu.of(shape.dense_bytes, nbytes, errors, parameters)


def solve(problem: LayerProblem, choice: Choice, *, iterations: int, corrects_mean: bool = False) -> Solution:
    """Round the free columns with error feedback, alternating with the low rank where there is one."""
    split, factor = columns_plus_codes(problem.W_OI, problem.metric, choice.count("columns"))
    found = decompose_coded(
        problem.W_OI, problem.metric.gram, quantizer(choice), split, factor,
        rank=choice.count("rank"), iterations=iterations,
    )  # fmt: skip
    summands = []
    if found.rank:
        summands.append(Summand(*LowRank.of(found.U_FR, found.V_RC)))
    if isinstance(found.codes, EntropyCodes):
        summands.append(Summand(*Entropy.of(found.codes), Entropy.read(found.codes)))
    else:
        assert found.codes is not None
        summands.append(Summand(*Groupwise.of(found.codes)))
    kept = (
        {"columns": found.columns_K, "column_values": found.column_values_OK}
        if split.columns_K.numel()
        else {}
    )
    status = Status(State.ROUNDED, damping=found.damping)
    return store(
        problem, summands, kept, status=status, history=found.history,
        corrects_mean=corrects_mean, adds_bias=corrects_mean,
    )  # fmt: skip


def quantizer(choice: Choice) -> Callable[[Tensor, HessianFactor], EntropyCodes | GroupCodes]:
    """The rounding that an offer asks for."""
    if width := choice.count("bits"):
        return partial(round_groupwise, bits=width, group=choice.count("group"))
    return partial(round_ecsq, step=choice.number("step"))


def adjusted(choice: Choice, bits: float) -> Choice | None:
    """The same entropy-coded offer at a step that is finer by so many bits per weight."""
    if choice.parameters is None or "step" not in choice.parameters:
        return None
    step = choice.number("step") * 2**-bits
    return replace(choice, parameters=choice.parameters | {"step": step})


def probe(problem: LayerProblem, menu: Menu) -> Probe:
    """The layer rounded as an equal share would have it, or to 4 bit where that has more: below, the change
    of the output drowns in the arithmetic."""
    share = min(problem.share, _PROBE_BITS / 16 * problem.shape.dense_bytes)
    choice = menu.choice(menu.within(share) or 0)
    if choice.is_dense:
        return Probe(problem.W_OI.float(), 0.0)
    approximation_OI = quantizer(choice)(problem.W_OI, problem.metric.factor).dense()
    lost = problem.metric.energy(problem.W_OI.float() - approximation_OI)
    return Probe(approximation_OI, lost / max(problem.energy, torch.finfo(torch.float64).tiny))
