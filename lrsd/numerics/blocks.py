"""Integers in blocks: codes on a small table of levels, a scale and sometimes an offset for each group of
columns, these again as integers times one number for each block of groups.

In the metric of the outputs: scales and offsets for the weight as it is, codes for these with error feedback
(GPTQ), and then coordinate descent over everything that is stored, each number set to the best of its values
given all others, so that every step lowers the error (but for the rounding of a block's own numbers to 16
bit).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrsd.numerics.lowrank import complement
from lrsd.numerics.rounding import HessianFactor, round_columns

# Scales tried, as fractions of that which brings a group's largest weight just to the end of the range.
_FRACTIONS = tuple(1.15 - 0.05 * i for i in range(14))
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """Values that a block can hold: W_ij ~ d sc_g levels[q_ij] - e m_g, g = j // group, d and e of 16 bit.

    levels: ascending; block: columns that share d and e; scales, offsets: least and greatest sc and m, where
    a block is one group the only one, 1 or -1; no offsets at all: None.
    """

    levels: tuple[int, ...]
    group: int
    block: int
    scales: tuple[int, int] = (1, 1)
    offsets: tuple[int, int] | None = None

    @property
    def is_flat(self) -> bool:
        return self.block == self.group

    @property
    def is_even(self) -> bool:
        """Whether the levels are neighboring integers."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1


@dataclass(frozen=True)
class BlockCodes:
    """codes (O, I) uint8: numbers of levels; scales, offsets (O, I / group) int16: sc and m; steps,
    offset_steps (O, I / block) float16 or bfloat16: d and e. Without offsets these are zero."""

    grid: Grid
    codes_OI: Tensor
    scales_OG: Tensor
    offsets_OG: Tensor
    steps_OB: Tensor
    offset_steps_OB: Tensor

    def dense(self) -> Tensor:
        """(O, I) float32."""
        levels = torch.tensor(self.grid.levels, dtype=torch.float32, device=self.codes_OI.device)
        scales_OG, offsets_OG = self.affine()
        values_OGJ = levels[self.codes_OI.int()].view(*scales_OG.shape, -1)
        return (values_OGJ * scales_OG[..., None] - offsets_OG[..., None]).flatten(1)

    def affine(self) -> tuple[Tensor, Tensor]:
        """d sc and e m (O, I / group) float32."""
        groups = self.grid.block // self.grid.group
        steps_OG, lows_OG = (
            found_OB.float().repeat_interleave(groups, 1)
            for found_OB in (self.steps_OB, self.offset_steps_OB)
        )
        return steps_OG * self.scales_OG, lows_OG * self.offsets_OG


def round_to_blocks(
    W_OI: Tensor,
    factor: HessianFactor,
    gram_II: Tensor,
    grid: Grid,
    *,
    dtype: torch.dtype = torch.float16,
    sweeps: int = 3,
) -> BlockCodes:
    """min tr((W - A) G (W - A)^T) over what the grid can hold.

    Args: gram (I, I): G; `grid.block` must divide I; dtype: of d and e; sweeps: of coordinate descent.
    Source: error feedback: GPTQ (ICLR 2023); coordinate descent over codes: QuantEase (arXiv 2309.01885).
    """
    W_OI, gram_II = W_OI.float(), gram_II.float()
    found = _affine_for(W_OI, remaining_variances(factor), grid, dtype)
    scales_GO, offsets_GO = (values_OG.T.contiguous() for values_OG in found.affine())
    nearest, divisors_GO = _Nearest(grid, W_OI.device), _safe(scales_GO)

    def quantize(j: int, w_O: Tensor) -> tuple[Tensor, Tensor]:
        g = j // grid.group
        level_O = nearest.level((w_O + offsets_GO[g]) / divisors_GO[g])
        return level_O, level_O * scales_GO[g] - offsets_GO[g]

    levels_OI = round_columns(W_OI, factor, quantize)[0]
    found = replace(found, codes_OI=nearest.codes(levels_OI))
    return _Descent(W_OI, gram_II, found).run(sweeps) if sweeps else found


def remaining_variances(factor: HessianFactor) -> Tensor:
    """Of every input channel, what the channels rounded after it cannot explain: 1 / U_jj^2."""
    variances_I = torch.empty(factor.width, device=factor.upper_II.device)
    variances_I[factor.order_I] = factor.upper_II.diagonal().float() ** -2
    return variances_I


def nearest_error(W_OI: Tensor, variances_I: Tensor, grid: Grid, dtype: torch.dtype = torch.float16) -> float:
    """sum_ij e_ij^2 variances_j of plain rounding: with variances 1 / U_jj^2 what error feedback is left
    with, as far as the weights that it moves are like those it began with."""
    return _weighted_error(W_OI, variances_I, rounded_to_nearest(W_OI, variances_I, grid, dtype))


def rounded_to_nearest(
    W_OI: Tensor, weights_I: Tensor, grid: Grid, dtype: torch.dtype = torch.float16
) -> BlockCodes:
    """Every weight to its nearest level; scales and offsets of least squared error, channels weighed."""
    return _affine_for(W_OI.float(), weights_I.float(), grid, dtype)


def _weighted_error(W_OI: Tensor, weights_I: Tensor, found: BlockCodes) -> float:
    return float(((found.dense() - W_OI) ** 2 * weights_I).sum(dtype=torch.float64))


class _Nearest:
    """The levels nearest to numbers, float32, and their codes, uint8."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self._lowest, self._highest = grid.levels[0], grid.levels[-1]
        self.levels = torch.tensor(grid.levels, dtype=torch.float32, device=device)
        self._middles = None if grid.is_even else (self.levels[1:] + self.levels[:-1]) / 2

    def level(self, wanted: Tensor) -> Tensor:
        """`wanted` is not needed any more."""
        if self._middles is not None:
            return self.levels[torch.bucketize(wanted, self._middles)]
        return wanted.round_().clamp_(self._lowest, self._highest)

    def codes(self, levels: Tensor) -> Tensor:
        if self._middles is not None:
            return torch.bucketize(levels.float(), self._middles).to(torch.uint8)
        return (levels - self._lowest).to(torch.uint8)


def _safe(scales: Tensor) -> Tensor:
    """To divide by: where a scale is zero, any level will do."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _affine_for(W_OI: Tensor, weights_I: Tensor, grid: Grid, dtype: torch.dtype) -> BlockCodes:
    """Scales and offsets among a few clippings, each set right in closed form, then put into the integers
    that are stored; and the nearest codes for them."""
    nearest, weights_GJ = _Nearest(grid, W_OI.device), weights_I.view(-1, grid.group)
    W_OGJ = W_OI.view(W_OI.shape[0], -1, grid.group)
    best_OG: Tensor | None = None
    for scales_OG, offsets_OG in _tried(W_OGJ, grid):
        levels_OGJ = nearest.level((W_OGJ + offsets_OG[..., None]) / _safe(scales_OG)[..., None])
        scales_OG, offsets_OG = _regressed(W_OGJ, levels_OGJ, weights_GJ, scales_OG, offsets_OG, grid)
        lost_OGJ = levels_OGJ * scales_OG[..., None] - offsets_OG[..., None] - W_OGJ
        error_OG = (lost_OGJ.square_() * weights_GJ).sum(-1)
        if best_OG is None:
            best_OG, chosen_OG, low_OG = error_OG, scales_OG, offsets_OG
        else:
            better_OG = error_OG < best_OG
            best_OG = torch.where(better_OG, error_OG, best_OG)
            chosen_OG = torch.where(better_OG, scales_OG, chosen_OG)
            low_OG = torch.where(better_OG, offsets_OG, low_OG)
    steps_OB, sc_OG = _as_integers(chosen_OG, grid.scales, grid, dtype)
    if grid.offsets is None:
        lows_OB, m_OG = torch.zeros_like(steps_OB), torch.zeros_like(sc_OG)
    else:
        lows_OB, m_OG = _as_integers(low_OG, grid.offsets, grid, dtype)
    found = BlockCodes(grid, torch.empty(0), sc_OG, m_OG, steps_OB, lows_OB)
    scales_OG, offsets_OG = found.affine()
    levels_OGJ = nearest.level((W_OGJ + offsets_OG[..., None]) / _safe(scales_OG)[..., None])
    return replace(found, codes_OI=nearest.codes(levels_OGJ).flatten(1))


def _tried(W_OGJ: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and offsets (O, G) that span a group's weights, and less of them."""
    if grid.offsets is None:
        # The sign that gives the largest weight the longer end of the range.
        largest_OG = W_OGJ.gather(-1, W_OGJ.abs().argmax(-1, keepdim=True)).squeeze(-1)
        whole_OG = largest_OG / max(grid.levels, key=abs)
        for fraction in _FRACTIONS:
            yield fraction * whole_OG, torch.zeros_like(whole_OG)
        return
    low_OG, high_OG = W_OGJ.amin(-1), W_OGJ.amax(-1)
    if grid.offsets[0] >= 0 and not grid.is_flat:  # an offset only lowers
        low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
    middle_OG, span_OG = (low_OG + high_OG) / 2, (high_OG - low_OG) / (len(grid.levels) - 1)
    for fraction in _FRACTIONS:
        shrunk_OG = low_OG if fraction > 1 else middle_OG + fraction * (low_OG - middle_OG)
        yield fraction * span_OG, -shrunk_OG


def _regressed(
    W_OGJ: Tensor,
    levels_OGJ: Tensor,
    weights_GJ: Tensor,
    scales_OG: Tensor,
    offsets_OG: Tensor,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Scales and offsets of least squared error for the codes; as they were where that is not one pair."""
    weighed_OGJ = levels_OGJ * weights_GJ
    squares_OG, products_OG = (weighed_OGJ * levels_OGJ).sum(-1), (weighed_OGJ * W_OGJ).sum(-1)
    if grid.offsets is None:
        found_OG = products_OG / squares_OG.clamp(min=_TINY)
        return torch.where(squares_OG > 0, found_OG, scales_OG), offsets_OG
    total_G, sums_OG = weights_GJ.sum(-1), weighed_OGJ.sum(-1)
    W_OG = (W_OGJ * weights_GJ).sum(-1)
    determinant_OG = squares_OG * total_G - sums_OG**2
    solvable_OG = determinant_OG > 1e-6 * squares_OG * total_G
    safe_OG = torch.where(solvable_OG, determinant_OG, torch.ones_like(determinant_OG))
    found_OG = (products_OG * total_G - sums_OG * W_OG) / safe_OG
    low_OG = (sums_OG * products_OG - squares_OG * W_OG) / safe_OG
    if not grid.is_flat:  # only what the integers can hold: the scale alone, without an offset
        alone_OG = products_OG / squares_OG.clamp(min=_TINY)
        found_OG = torch.where(low_OG < 0, alone_OG, found_OG)
        low_OG = low_OG.clamp(min=0)
        solvable_OG = solvable_OG & (found_OG > 0)
    return torch.where(solvable_OG, found_OG, scales_OG), torch.where(solvable_OG, low_OG, offsets_OG)


def _as_integers(
    values_OG: Tensor, bounds: tuple[int, int], grid: Grid, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """values ~ d n with integers n within the bounds: d (O, B) and n (O, G) int16."""
    if grid.is_flat:
        return _cast(values_OG / bounds[0], dtype), torch.full_like(values_OG, bounds[0], dtype=torch.int16)
    values_OBg = values_OG.view(len(values_OG), -1, grid.block // grid.group)
    largest_OB1 = values_OBg.gather(-1, values_OBg.abs().argmax(-1, keepdim=True))
    steps_OB1 = largest_OB1 / max(bounds, key=abs)
    for _ in range(2):
        steps_OB1 = torch.where(steps_OB1 == 0, torch.ones_like(steps_OB1), steps_OB1)
        n_OBg = (values_OBg / steps_OB1).round().clamp(*bounds)
        products_OB1 = (values_OBg * n_OBg).sum(-1, keepdim=True)
        squares_OB1 = (n_OBg**2).sum(-1, keepdim=True)
        steps_OB1 = torch.where(squares_OB1 > 0, products_OB1 / squares_OB1.clamp(min=1), steps_OB1)
    steps_OB = _cast(steps_OB1[..., 0], dtype)
    steps_OB1 = steps_OB.float()[..., None]
    n_OBg = (values_OBg / torch.where(steps_OB1 == 0, torch.ones_like(steps_OB1), steps_OB1)).round()
    n_OBg = torch.where(steps_OB1 == 0, torch.zeros_like(n_OBg), n_OBg.clamp(*bounds))
    return steps_OB, n_OBg.flatten(1).to(torch.int16)


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


class _Descent:
    """Coordinate descent over everything that is stored, block by block, columns first (I, O).

    pulls: G (W - A)^T, of which the entries of the block at work are kept right at once, all others after it.
    """

    def __init__(self, W_OI: Tensor, gram_II: Tensor, found: BlockCodes) -> None:
        self._grid, self._gram_II = found.grid, gram_II
        self._nearest = _Nearest(found.grid, W_OI.device)
        self._levels_IO = self._nearest.levels[found.codes_OI.T.int()]
        self._every_I = torch.arange(len(gram_II), device=gram_II.device)
        self._sc_GO, self._m_GO = (
            found.scales_OG.T.float().contiguous(),
            found.offsets_OG.T.float().contiguous(),
        )
        self._d_BO, self._e_BO = found.steps_OB.T.contiguous(), found.offset_steps_OB.T.contiguous()
        self._pulls_IO = gram_II @ (W_OI - found.dense()).T

    def run(self, sweeps: int) -> BlockCodes:
        for _ in range(sweeps):
            for number in range(len(self._d_BO)):
                self._block(number)
        return BlockCodes(
            self._grid,
            self._nearest.codes(self._levels_IO.T.contiguous()),
            self._sc_GO.T.to(torch.int16).contiguous(),
            self._m_GO.T.to(torch.int16).contiguous(),
            self._d_BO.T.contiguous(),
            self._e_BO.T.contiguous(),
        )

    def _block(self, number: int) -> None:
        """One block: its groups' scales, offsets and codes, then its own two numbers."""
        grid, start = self._grid, number * self._grid.block
        block = slice(start, start + grid.block)
        self._start, self._gram_JJ, self._pulls_JO = start, self._gram_II[block, block], self._pulls_IO[block]
        self._moved_JO = torch.zeros_like(self._pulls_JO)
        d_O, e_O = self._d_BO[number].float(), self._e_BO[number].float()
        for g in range(start // grid.group, block.stop // grid.group):
            columns = slice(g * grid.group - start, (g + 1) * grid.group - start)
            levels_JO = self._levels_IO[block][columns]
            if not grid.is_flat:
                self._sc_GO[g] = self._integer(columns, levels_JO, d_O, self._sc_GO[g], grid.scales)
                if grid.offsets is not None:
                    self._m_GO[g] = self._integer(
                        columns, -torch.ones_like(levels_JO), e_O, self._m_GO[g], grid.offsets
                    )
            self._codes(columns, d_O * self._sc_GO[g], e_O * self._m_GO[g])
        groups = slice(start // grid.group, block.stop // grid.group)
        sc_JO, m_JO = (n_GO[groups].repeat_interleave(grid.group, 0) for n_GO in (self._sc_GO, self._m_GO))
        self._d_BO[number] = self._step(self._levels_IO[block] * sc_JO, self._d_BO[number])
        if grid.offsets is not None:
            self._e_BO[number] = self._step(-m_JO, self._e_BO[number])
        rest = complement(self._every_I[block], len(self._every_I))
        self._pulls_IO[rest] -= self._gram_II[rest, block] @ self._moved_JO

    def _move(self, columns: slice, change_JO: Tensor) -> None:
        """So much is added to A in these columns of the block."""
        self._moved_JO[columns] += change_JO
        self._pulls_JO.addmm_(self._gram_JJ[:, columns], change_JO, alpha=-1)

    def _best_change(self, columns: slice, c_JO: Tensor) -> Tensor:
        """How much of c should be added for the least error."""
        products_O = (c_JO * self._pulls_JO[columns]).sum(0)
        squares_O = (c_JO * (self._gram_JJ[columns, columns] @ c_JO)).sum(0)
        return torch.where(
            squares_O > 0, products_O / squares_O.clamp(min=_TINY), torch.zeros_like(products_O)
        )

    def _integer(
        self, columns: slice, c_JO: Tensor, unit_O: Tensor, n_O: Tensor, bounds: tuple[int, int]
    ) -> Tensor:
        """The best n of n unit c within the bounds."""
        wanted_O = n_O + self._best_change(columns, unit_O * c_JO)
        best_O = wanted_O.round_().clamp_(*bounds)
        self._move(columns, (best_O - n_O) * unit_O * c_JO)
        return best_O

    def _step(self, c_JO: Tensor, d_O: Tensor) -> Tensor:
        """The best d of d c, as it is stored."""
        whole = slice(0, self._grid.block)
        best_O = _cast(d_O.float() + self._best_change(whole, c_JO), d_O.dtype)
        best_O = torch.where(best_O == 0, d_O, best_O)
        self._move(whole, (best_O.float() - d_O.float()) * c_JO)
        return best_O

    def _codes(self, columns: slice, scale_O: Tensor, offset_O: Tensor) -> None:
        """Levels of one group, one column at a time, each the best one given all others."""
        variances_J, divisor_O = self._gram_JJ.diagonal().clamp(min=_TINY), _safe(scale_O)
        for i in range(columns.start, columns.stop):
            old_O, moved_O = self._levels_IO[self._start + i], self._moved_JO[i]
            wanted_O = old_O * scale_O - offset_O + self._pulls_JO[i] / variances_J[i]
            level_O = self._nearest.level((wanted_O + offset_O) / divisor_O)
            change_O = (level_O - old_O) * scale_O
            old_O.copy_(level_O)
            moved_O += change_O
            self._pulls_JO.addr_(self._gram_JJ[:, i], change_O, alpha=-1)
