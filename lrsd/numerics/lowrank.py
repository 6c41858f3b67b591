"""Best low-rank fit to a layer's outputs, and its storage without redundancy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrsd.errors import SolverError

# A pivot is exchanged while some coefficient exceeds this: coefficients near 1 keep the rounding
# to 16 bit harmless; at 1.0 exact ties could be exchanged for ever.
_MAX_COEFFICIENT = 1.5
# Bound on the exchanges, so that a pathological factor costs time linear in its rank.
_EXCHANGES_PER_RANK = 2


@dataclass(frozen=True)
class Spectrum:
    """All best low-rank fits to one weight at once.

    basis_OR: orthonormal output directions, leading first; (O, q) with q = min(O, I).
    energies_R: output energy along each, descending, per token; sums to tr(W G W^T).
    """

    basis_OR: Tensor
    energies_R: Tensor

    def errors(self) -> Tensor:
        """Energy lost at rank 0, 1, ..., q; (q + 1,), non-increasing, last entry 0, on a CPU."""
        # On a CPU: an accelerator adds up in an order that differs from run to run.
        tail = self.energies_R.cpu().flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])


def spectrum(W_OI: Tensor, gram_II: Tensor, root_II: Tensor | None = None) -> Spectrum:
    """Eigenvectors of W G W^T: the rank-r optimum of min tr((W - L) G (W - L)^T) is U_r U_r^T W.

    No inverse of G is taken, so G may be singular. The smaller side is decomposed: for O > I the
    eigenvectors come from C^T W^T W C with G = C C^T.

    Args: W_OI (O, I); gram_II (I, I) mean of x x^T over tokens; same floating dtype; root_II: C, where known.
    Raises: SolverError.
    Source: Eckart & Young 1936 in the metric G; cf. SVD-LLM (ICLR 2025), section 3.
    """
    out_features, in_features = W_OI.shape
    if out_features <= in_features:
        values, vectors = _eigh(W_OI @ gram_II @ W_OI.T)
        return Spectrum(vectors.flip(1), values.flip(0).clamp(min=0))
    outputs_OI = W_OI @ (square_root(gram_II) if root_II is None else root_II)
    values, vectors = _eigh(outputs_OI.T @ outputs_OI)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # QR restores the orthonormality that dividing by sqrt(values) loses among tiny values.
    basis_OR, _ = torch.linalg.qr(outputs_OI @ vectors)
    return Spectrum(basis_OR, values)


def _eigh(matrix_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors. Raises: SolverError where there are none."""
    try:
        values, vectors = torch.linalg.eigh(matrix_NN)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise _no_eigenvalues(str(error)) from error
    if not bool(torch.isfinite(values).all()):  # eigh does not always notice
        raise _no_eigenvalues("they are not finite")
    return values, vectors


def _eigvalsh(matrix_NN: Tensor) -> Tensor:
    """Eigenvalues, ascending. Raises: SolverError where there are none."""
    try:
        values = torch.linalg.eigvalsh(matrix_NN)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise _no_eigenvalues(str(error)) from error
    if not bool(torch.isfinite(values).all()):
        raise _no_eigenvalues("they are not finite")
    return values


def _no_eigenvalues(reason: str) -> SolverError:
    return SolverError(f"its eigenvalues cannot be found ({reason.splitlines()[0]})")


def square_root(gram_II: Tensor) -> Tensor:
    """C with C C^T = G: the Cholesky factor, or for a singular G, which rounding makes slightly
    indefinite, its eigenvectors times the roots of the eigenvalues, negative ones taken as 0. Raises:
    SolverError.
    """
    if (factor_II := cholesky(gram_II)) is not None:
        return factor_II
    values, vectors = _eigh(gram_II)
    return vectors * values.clamp(min=0).sqrt()


def cholesky(matrix_NN: Tensor) -> Tensor | None:
    """Its lower factor; None of a matrix that is not positive definite, or not finite: of an infinite one the
    libraries say nothing, and those of accelerators not of NaN either."""
    lower_NN, failed = torch.linalg.cholesky_ex(matrix_NN)
    # What is wrong anywhere in a row is wrong on the diagonal, too.
    sound = (failed == 0) & lower_NN.diagonal().isfinite().all()
    return lower_NN if bool(sound) else None


def ridged_cholesky(gram_II: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Cholesky factor of G + ridge mean(diag G) I, the ridge raised a hundredfold while it is too small.

    G out of float32 partial sums is indefinite at about 1e-7 of its diagonal, so the third step ends it.

    Returns: the factor, and the ridge if it had to be raised, else 0. Raises: SolverError.
    """
    first = ridge
    scale = gram_II.diagonal().mean()
    while True:
        ridged_II = gram_II.clone()
        ridged_II.diagonal().add_(ridge * scale if scale > 0 else 1.0)
        factor_II = cholesky(ridged_II)
        del ridged_II
        if factor_II is not None:
            return factor_II, ridge if ridge > first else 0.0
        if not ridge < 1:  # a finite positive semidefinite matrix factors long before
            raise SolverError("the moments of its inputs are not finite or not positive semidefinite")
        ridge *= 100


def spectrum_errors(W_OI: Tensor, gram_II: Tensor, root_II: Tensor | None = None) -> Tensor:
    """`spectrum(W, G).errors()` from eigenvalues alone, at a fraction of the time; (q + 1,). Raises:
    SolverError."""
    out_features, in_features = W_OI.shape
    if out_features <= in_features:
        values = _eigvalsh(W_OI @ gram_II @ W_OI.T)
    else:
        outputs_OI = W_OI @ (square_root(gram_II) if root_II is None else root_II)
        values = _eigvalsh(outputs_OI.T @ outputs_OI)
    return Spectrum(W_OI[:, :0], values.flip(0).clamp(min=0)).errors()


def best_low_rank(W_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` fit to the outputs of W: min ||(W - L) G^(1/2)||_F.

    L = U U^T W with U the leading eigenvectors of W G W^T.

    Returns: U (O, rank) and U^T W (rank, I).
    Raises: ValueError if rank is not in 0..min(O, I).
    """
    if not 0 <= rank <= min(W_OI.shape):
        raise ValueError(f"rank must be in 0..{min(W_OI.shape)} for a {tuple(W_OI.shape)} weight, got {rank}")
    U_OR = spectrum(W_OI, gram_II).basis_OR[:, :rank]
    return U_OR, U_OR.T @ W_OI


@dataclass(frozen=True)
class PivotedFactors:
    """L of rank r as r of its own rows and the coefficients of the others: r(O + I - r) numbers.

    pivots_R: indices of the pivot rows, int64, ascending; rows_RI: those rows of L;
    coefficients_QR: the other rows, in ascending order, in terms of the pivot rows; (O - r, r).
    """

    pivots_R: Tensor
    rows_RI: Tensor
    coefficients_QR: Tensor

    def dense(self) -> Tensor:
        """L (O, I)."""
        out_features = self.pivots_R.numel() + self.coefficients_QR.shape[0]
        L_OI = self.rows_RI.new_zeros(out_features, self.rows_RI.shape[1])
        L_OI[self.pivots_R] = self.rows_RI
        L_OI[complement(self.pivots_R, out_features)] = self.coefficients_QR @ self.rows_RI
        return L_OI


def complement(indices: Tensor, size: int) -> Tensor:
    """The members of 0..size-1 that are not in `indices`, ascending, int64.

    A stable sort, because its result has a size known beforehand: no synchronisation on a GPU.
    """
    taken = torch.zeros(size, dtype=torch.int8, device=indices.device)
    taken[indices.long()] = 1
    return taken.argsort(stable=True)[: size - indices.numel()]


def pivot_factors(U_OR: Tensor, V_RI: Tensor) -> PivotedFactors:
    """Rewrite L = U V, U of full column rank, on pivot rows of L with coefficients near 1.

    Starts from the pivots of a partially pivoted LU of U and exchanges rows while a coefficient
    exceeds 1.5 in magnitude, each exchange raising the pivot block's volume (maxvol).

    Raises: ValueError if U lacks full column rank.
    Source: degrees of freedom as in Zhao et al., "Pivoting Factorization", ICML 2025;
        exchange: Goreinov et al., "How to find a good submatrix", 2010.
    """
    out_features, rank = U_OR.shape
    if rank == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=U_OR.device)
        return PivotedFactors(empty, V_RI, U_OR)
    permutation, _, upper_RR = torch.linalg.lu(U_OR)
    diagonal_R = upper_RR.diagonal().abs()
    if diagonal_R.min() <= rank * torch.finfo(U_OR.dtype).eps * diagonal_R.max():
        raise ValueError(f"U must have full column rank {rank}")
    order = permutation.argmax(0)
    pivots_R, others_Q = order[:rank].clone(), order[rank:].clone()
    coefficients_QR = torch.linalg.solve(U_OR[pivots_R], U_OR[others_Q], left=False)
    for _ in range(_EXCHANGES_PER_RANK * rank if others_Q.numel() else 0):
        place = coefficients_QR.abs().argmax()
        pivot_value = coefficients_QR.flatten()[place]
        # Place and value at once: an accelerator is waited for once per exchange.
        found, size = torch.stack([place.double(), pivot_value.abs().double()]).tolist()
        if size <= _MAX_COEFFICIENT:
            break
        q, r = divmod(int(found), rank)
        # Rank-one update of U_others U_pivots^-1 when row q and pivot r change places.
        row, column = coefficients_QR[q].clone(), coefficients_QR[:, r].clone()
        row[r] -= 1
        column[q] += 1
        coefficients_QR -= torch.outer(column, row) / pivot_value
        pivots_R[r], others_Q[q] = others_Q[q].clone(), pivots_R[r].clone()
    pivots_R = pivots_R.sort().values
    # Solved afresh: the running update has gathered rounding errors.
    coefficients_QR = torch.linalg.solve(U_OR[pivots_R], U_OR[complement(pivots_R, out_features)], left=False)
    return PivotedFactors(pivots_R, U_OR[pivots_R] @ V_RI, coefficients_QR)
