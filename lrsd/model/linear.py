"""The packed layer: y = L x + S x + b without ever forming L + S."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from lrsd.numerics.allocate import LayerPlan, Shape, index_bytes
from lrsd.numerics.lowrank import complement, pivot_factors
from lrsd.numerics.solver import Decomposition


@dataclass(frozen=True, kw_only=True)
class LayerFormat:
    """What config.json says of one packed layer; with the layer's shape it fixes every tensor.

    rank; columns, rows: kept channels; entries: stored values of a thresholded S (None: whole
    columns); pivoted: factors on pivot rows; bias: a bias is stored; added_bias: one that the model's
    own layer lacks; transposed: the model's own layer is a Conv1D, whose dense weight is (I, O).
    """

    rank: int
    columns: int = 0
    rows: int = 0
    entries: int | None = None
    pivoted: bool = True
    bias: bool = False
    added_bias: bool = False
    transposed: bool = False

    def to_dict(self) -> dict[str, int | bool]:
        """Only what differs from the defaults, and the rank."""
        defaults = asdict(LayerFormat(rank=0))
        return {k: v for k, v in asdict(self).items() if k == "rank" or v != defaults[k]}


class LowRankSparseLinear(nn.Module):
    """Linear layer stored as low rank + kept columns or rows.

    | parameter           | shape          | what                                              |
    |---------------------|----------------|---------------------------------------------------|
    | weight              | (r, C)         | pivot rows of L on the free columns; V if unpivoted |
    | coefficients        | (F - r, r)     | other free rows in terms of the pivots; (F, r) U   |
    | pivots              | (r,) int       | which free rows the pivots are                    |
    | columns, column_values | (K,), (O, K) | kept input columns and S on them                  |
    | rows, row_values    | (P,), (P, I)   | kept output rows                                  |
    | mask, entries       | (ceil(OK/8),), (nnz,) | thresholded S: bitmask, its set values by row |
    | bias                | (O,)           |                                                   |

    F = O - P free rows, C = I - K free columns (C = I under a mask, where L spans all columns).
    One factor is named `weight` on purpose: a loader that does not know this layer then fails on
    its shape instead of running with random weights.
    """

    def __init__(self, shape: Shape, layout: LayerFormat, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.layout = shape.in_features, shape.out_features, layout
        out_index = _index_dtype(shape.out_features)
        free_rows = shape.out_features - layout.rows
        masked = layout.entries is not None
        free_columns = shape.in_features - (0 if masked else layout.columns)
        pivots = layout.rank if layout.pivoted else 0

        def values(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*size, dtype=dtype), requires_grad=False)

        def integers(size: int, kind: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=kind), requires_grad=False)

        self.weight = values(layout.rank, free_columns)
        self.coefficients = values(free_rows - pivots, layout.rank)
        self.pivots = integers(pivots, out_index) if pivots else None
        stored_columns = 0 if layout.columns == shape.in_features else layout.columns
        self.columns = integers(stored_columns, _index_dtype(shape.in_features)) if stored_columns else None
        whole = layout.columns and not masked
        self.column_values = values(shape.out_features, layout.columns) if whole else None
        self.rows = integers(layout.rows, out_index) if layout.rows else None
        self.row_values = values(layout.rows, shape.in_features) if layout.rows else None
        self.mask = (
            integers(-(-shape.out_features * layout.columns // 8), torch.uint8)
            if layout.entries is not None
            else None
        )
        self.entries = values(layout.entries) if layout.entries is not None else None
        self.bias = values(shape.out_features) if layout.bias else None

    @classmethod
    def pack(
        cls,
        found: Decomposition,
        plan: LayerPlan,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
    ) -> "LowRankSparseLinear":
        """Cast a decomposition to its stored form, once."""
        layout = LayerFormat(
            rank=found.rank, columns=plan.columns, rows=plan.rows, entries=plan.entries,
            pivoted=plan.pivoted, bias=bias_O is not None, added_bias=plan.bias,
            transposed=transposed,
        )  # fmt: skip
        packed = cls(Shape(*found.shape), layout, dtype)
        if plan.pivoted:
            factors = pivot_factors(found.U_FR, found.V_RC)
            first, second, pivots = factors.rows_RI, factors.coefficients_QR, factors.pivots_R
        else:
            first, second, pivots = found.V_RC, found.U_FR, None
        stored: dict[str, Tensor | None] = {
            "weight": first, "coefficients": second, "pivots": pivots, "columns": found.columns_K,
            "column_values": found.column_values_OK, "rows": found.rows_P, "row_values": found.row_values_PI,
            "bias": bias_O,
        }  # fmt: skip
        if found.mask_OK is not None:
            stored["mask"] = _pack_bits(found.mask_OK)
            stored["entries"] = found.column_values_OK[found.mask_OK]
        with torch.no_grad():
            for name, parameter in packed.named_parameters():
                value = stored[name]
                assert value is not None, name
                assert value.shape == parameter.shape, name
                parameter.copy_(value)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        low = self._free_rows(linear(self._free_columns(x), self.weight))
        y = self._with_kept_rows(low, x)
        if self.column_values is not None:
            assert self.columns is not None
            y = y + linear(x[..., self.columns.long()], self.column_values)
        elif self.mask is not None:
            kept = x if self.columns is None else x[..., self.columns.long()]
            y = y + linear(kept, self._masked_values())
        return y if self.bias is None else y + self.bias

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """L + S as one (O, I) matrix, summed in float32."""
        if self.weight.is_meta:
            raise RuntimeError("weights are offloaded; export with `lrsd export --dense` instead")
        identity = torch.eye(self.in_features, dtype=torch.float32, device=self.weight.device)
        in_float = LowRankSparseLinear(Shape(self.out_features, self.in_features), self.layout, torch.float32)
        in_float.load_state_dict(self.state_dict())
        in_float.bias = None
        return in_float.to(self.weight.device)(identity).T.contiguous().to(dtype)

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The equivalent nn.Linear, or Conv1D where the model has those."""
        dense: nn.Module = (
            Conv1D(self.out_features, self.in_features) if self.layout.transposed
            else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        )  # fmt: skip
        weight = self.dense_weight(dtype)
        dense.weight = nn.Parameter(
            weight.T.contiguous() if self.layout.transposed else weight, requires_grad=False
        )
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return dense

    def _free_columns(self, x: Tensor) -> Tensor:
        if self.columns is None or self.mask is not None:
            return x
        return x[..., complement(self.columns, self.in_features)]

    def _free_rows(self, z: Tensor) -> Tensor:
        """L x on the free rows from the pivot rows' outputs z."""
        others = linear(z, self.coefficients)
        if self.pivots is None:
            return others
        return _interleave(z, others, self.pivots)

    def _with_kept_rows(self, low: Tensor, x: Tensor) -> Tensor:
        if self.rows is None:
            return low
        assert self.row_values is not None
        return _interleave(linear(x, self.row_values), low, self.rows)

    def _masked_values(self) -> Tensor:
        assert self.mask is not None
        assert self.entries is not None
        mask_OK = _unpack_bits(self.mask, self.out_features * self.layout.columns)
        values_OK = self.entries.new_zeros(mask_OK.shape)
        values_OK[mask_OK] = self.entries
        return values_OK.view(self.out_features, self.layout.columns)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layout}"


def _index_dtype(size: int) -> torch.dtype:
    return torch.int16 if index_bytes(size) == 2 else torch.int32


def _interleave(chosen: Tensor, others: Tensor, indices: Tensor) -> Tensor:
    """Merge along the last dimension: `chosen` at `indices`, `others` in between, in order.

    Written into place: a gather of the concatenation takes longer than the products themselves.
    """
    size = chosen.shape[-1] + others.shape[-1]
    merged = chosen.new_empty(*chosen.shape[:-1], size)
    merged[..., indices.long()] = chosen
    merged[..., complement(indices, size)] = others
    return merged


def _pack_bits(mask: Tensor) -> Tensor:
    """Booleans to bytes, first one in the lowest bit; uint8 (ceil(n / 8),)."""
    flat = mask.flatten()
    bits = pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.int32)
    return (bits << torch.arange(8, device=mask.device)).sum(1).to(torch.uint8)


def _unpack_bits(packed: Tensor, size: int) -> Tensor:
    bits = (packed.int()[:, None] >> torch.arange(8, device=packed.device)) & 1
    return bits.flatten()[:size].bool()
