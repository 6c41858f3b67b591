"""Integer codes with 16-bit columns or low rank on top: what lrsd and gptq share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lrsd.forms.groupwise import Groupwise
from lrsd.forms.layer import Layer
from lrsd.forms.lowrank import LowRank
from lrsd.forms.trellis import Trellis
from lrsd.methods.base import LayerProblem, Probe, Solution, State, Status, Summand, store
from lrsd.numerics.lowrank import Spectrum, spectrum
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.rates import EntropyCodedRates, entropy_coded_rates
from lrsd.numerics.rounding import (
    EntropyCodes,
    GroupCodes,
    HessianFactor,
    round_entropy_coded,
    round_groupwise,
)
from lrsd.numerics.solver import columns_plus_codes, decompose_coded

# Widths that group-wise codes may have where each layer has its own.
WIDTHS = (2, 3, 4, 5, 6, 8)
# Shares of the columns that may stay at 16 bit where codes are of a fixed width.
OUTLIER_SHARES = (0, 1 / 64, 1 / 32)
# Widest codes that are tried out for their error; a bit more quarters it.
_MEASURED_BITS = 4
# Widest codes of a sensitivity probe.
_PROBE_BITS = 4


def offer_entropy_coded(problem: LayerProblem, ranks: Sequence[int], states: int, *, bias: bool) -> Menu:
    """Entropy-coded columns on top of each of these ranks, over a ladder of steps. Raises: SolverError."""
    metric, W_OI = problem.metric, problem.W_OI
    # Of a layer that puts nothing out every form is exact.
    total = problem.energy or math.inf
    whole = spectrum(W_OI.float(), metric.single.gram) if any(ranks) else None
    rates = entropy_coded_rates(W_OI, metric, whole, total, ranks, states)
    rates = _calibrated(problem, rates, whole, states)
    codes = Trellis(rates.streams_N, states=states, scaled=problem.rows_O is not None)  # type: ignore[arg-type]
    terms = (LowRank(rates.ranks_N), codes)  # type: ignore[arg-type]  # all offers at once
    layer = Layer(terms=terms, bias=bias, added_bias=bias)
    parameters = {
        "rank": rates.ranks_N, "step": rates.steps_N, "states": torch.full_like(rates.ranks_N, states)
    }  # fmt: skip
    nbytes = layer.nbytes(problem.shape)
    return Menu.of(problem.shape.dense_bytes, nbytes, rates.errors_N, parameters)


# Shares of a layer's equal share of the bytes at which it is rounded to see what that takes and loses.
_CALIBRATED = (1 / 10, 1 / 2, 1)


def _calibrated(
    problem: LayerProblem, rates: EntropyCodedRates, whole: Spectrum | None, states: int
) -> EntropyCodedRates:
    """Rates corrected by what some of them take and err in truth, of the lowest rank, at an equal share of
    the bytes and below; in between by interpolation. Below all of them bytes are in proportion, and errors as
    those of a normal source, of which every bit takes the same share, up to those of no codes at all.
    """
    streams_N, ranks_N = rates.streams_N.numpy(), rates.ranks_N.numpy()
    anchors: dict[int, tuple[float, float]] = {}
    for part in _CALIBRATED:
        distances_N = np.abs(streams_N - part * problem.share)
        index = int(np.where(ranks_N == ranks_N.min(), distances_N, np.inf).argmin())
        left_OI = problem.W_OI.float()
        if whole is not None:
            U_OR = whole.basis_OR[:, : ranks_N[index]].to(left_OI)
            left_OI = left_OI - U_OR @ (U_OR.T @ left_OI)
        codes = round_entropy_coded(left_OI, problem.metric.factor, float(rates.steps_N[index]), states)
        predicted, error = int(streams_N[index]), float(rates.errors_N[index])
        found = problem.metric.energy(left_OI - codes.dense()) / (problem.energy or math.inf)
        factor = found / error if found > 0 and error > 0 else 1.0
        anchors[predicted] = Trellis.of(codes, problem.rows_O)[0].stream - predicted, math.log(factor)
    known = sorted(anchors)
    more_N, logs_N = (np.interp(streams_N, known, [anchors[k][i] for k in known]) for i in (0, 1))
    parts_N = (streams_N / max(known[0], 1)).clip(max=1)
    errors_N = rates.errors_N.numpy() * np.exp(logs_N)
    for rank in np.unique(ranks_N):
        here = ranks_N == rank
        nothing, lowest = rates.errors_N.numpy()[here].max(), errors_N[here & (parts_N == 1)].max(initial=0.0)
        if 0 < lowest < nothing:
            most_N = lowest**parts_N * nothing ** (1 - parts_N)
            errors_N = np.where(here & (parts_N < 1), np.maximum(errors_N, most_N), errors_N)
    corrected_N = (streams_N + more_N * parts_N).round().astype(np.int64).clip(1)
    return replace(rates, streams_N=torch.from_numpy(corrected_N), errors_N=torch.from_numpy(errors_N))


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
        summands.append(Summand(*LowRank.of(problem.unscaled(found.U_FR), found.V_RC)))
    if isinstance(found.codes, EntropyCodes):
        form, tensors = Trellis.of(found.codes, problem.rows_O)
        summands.append(Summand(form, tensors, form.read(found.codes, problem.rows_O)))
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
    return partial(round_entropy_coded, step=choice.number("step"), states=choice.count("states"))


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
    error = lost / max(problem.energy, torch.finfo(torch.float64).tiny)
    return Probe(problem.unscaled(approximation_OI), error)
