"""SSD, the source paper's decomposition: plain singular vectors, and the large entries of a few channels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.errors import SolverError
from lrsd.numerics.metric import Metric

# Relative change of the error below which an alternation stands still.
_STILL = 1e-3

# What is stored of a factor pair or a matrix, from what it should be.
Round = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Singular:
    """The singular value decomposition of W, from the eigenvectors of its smaller square: SVD_r(W) is
    left_OQ[:, :r] @ right_QI[:r], float32; energies_Q: squares of the singular values, falling, float64."""

    left_OQ: Tensor
    right_QI: Tensor
    energies_Q: Tensor

    @staticmethod
    def of(W_OI: Tensor) -> "Singular":
        """Raises: SolverError."""
        W_OI = W_OI.double()
        wide = W_OI.shape[0] <= W_OI.shape[1]
        square = W_OI @ W_OI.T if wide else W_OI.T @ W_OI
        try:
            values, vectors = torch.linalg.eigh(square)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise SolverError(
                f"its singular values cannot be found ({str(error).splitlines()[0]})"
            ) from error
        basis = vectors.flip(1)
        left, right = (basis, basis.T @ W_OI) if wide else (W_OI @ basis, basis.T)
        return Singular(left.float(), right.float(), values.flip(0).clamp(min=0))

    def rank_at(self, energy: float) -> int:
        """The least rank that holds this share of the energy; at least 1 where it is any."""
        tiny = torch.finfo(torch.float64).tiny
        held_Q = self.energies_Q.cumsum(0) / self.energies_Q.sum().clamp(min=tiny)
        reached = int((held_Q < energy * float(held_Q[-1])).sum()) + 1
        return min(reached, len(held_Q)) if energy > 0 else 0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(O, r), orthonormal, and (r, I), whose product is the best rank-r approximation."""
        U_OR, R_RR = torch.linalg.qr(self.left_OQ[:, :rank])
        return U_OR, R_RR @ self.right_QI[:rank]


@dataclass(frozen=True)
class Entries:
    """S: the groups that it is in, ascending, and which of their entries it keeps, (O, I).

    groups: input channels (columns), or output channels (rows).
    """

    groups: Tensor
    mask_OI: Tensor


def large_entries(
    residual_OI: Tensor,
    nbytes: Callable[[Tensor, Tensor], Tensor],
    limit: float,
    *,
    rows: bool,
    thresholds: bool,
) -> Entries:
    """As many groups of largest l2 norm as `limit` bytes hold, of each the entries above its mean magnitude.

    Args: nbytes(groups, entries) of so many groups and entries, arrays; rows: groups are rows, else columns;
        thresholds: else every entry of a group stays.
    Source: SSD (ACL 2025), section 3.
    """
    across = 1 if rows else 0
    magnitudes_OI = residual_OI.abs()
    mask_OI = magnitudes_OI > magnitudes_OI.mean(across, keepdim=True)
    if not thresholds:
        mask_OI = torch.ones_like(mask_OI)
    order_G = residual_OI.square().sum(across).argsort(descending=True, stable=True)
    entries_G = mask_OI.sum(across)[order_G].cumsum(0)
    counts_G = torch.arange(1, len(order_G) + 1, device=order_G.device)
    # All groups may take less than all but one: they need no list.
    fitting = int((counts_G * (nbytes(counts_G, entries_G) <= limit)).max())
    groups = order_G[:fitting].sort().values
    kept_G = torch.zeros_like(order_G, dtype=torch.bool)
    kept_G[groups] = True
    return Entries(groups, mask_OI & (kept_G[:, None] if rows else kept_G))


@dataclass(frozen=True)
class Thresholded:
    """W ~ L + S + Q. U_OR, V_RI: of L, before what is stored of it is rounded; L, Q (O, I): as stored, Q zero
    without codes; codes: what `quantize` gave.

    error: tr((W - L - S - Q) G (...)^T) / tr(W G W^T); history: of every round.
    """

    U_OR: Tensor
    V_RI: Tensor
    entries: Entries
    values_OI: Tensor
    codes: object
    error: float
    history: tuple[float, ...]


def decompose_ssd(
    W_OI: Tensor,
    metric: Metric,
    *,
    rank: Callable[[Entries | None], int],
    select: Callable[[Tensor, int], Entries],
    low_rank: Round,
    quantize: Callable[[Tensor], tuple[object, Tensor]] | None = None,
    iterations: int = 5,
) -> Thresholded:
    """L = SVD_r(W - S - Q), S the large entries of W - L, Q codes of W - L - S, by turns until they stand
    still; the best round is returned.

    Args: rank(S of the round before) -> r; select(residual, r) -> S; low_rank(U, V) -> L as stored;
        quantize(residual) -> codes and their matrix.
    Raises: SolverError. Source: SSD (ACL 2025), section 3; with codes its "triple compression".
    """
    W_OI = W_OI.float()
    total = metric.energy(W_OI)
    S_OI = Q_OI = torch.zeros_like(W_OI)
    entries: Entries | None = None
    best: Thresholded | None = None
    history: list[float] = []
    for _ in range(iterations):
        U_OR, V_RI = Singular.of(W_OI - S_OI - Q_OI).factors(rank(entries))
        residual_OI = W_OI - (low_rank(U_OR, V_RI) if len(V_RI) else 0)
        entries = select(residual_OI, len(V_RI))
        S_OI = residual_OI * entries.mask_OI
        codes: object = None
        if quantize is not None:
            codes, Q_OI = quantize(residual_OI - S_OI)
        error = metric.energy(residual_OI - S_OI - Q_OI) / total if total > 0 else 0.0
        before = history[-1] if history else None
        history.append(error)
        if best is None or error < best.error:
            best = Thresholded(U_OR, V_RI, entries, S_OI, codes, error, ())
        if before is not None and abs(before - error) <= _STILL * error:
            break
    assert best is not None, "iterations is validated to be at least 1"
    return Thresholded(
        best.U_OR, best.V_RI, best.entries, best.values_OI, best.codes, best.error, tuple(history)
    )
