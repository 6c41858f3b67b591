"""The packed layer: y = L x + S x + b without ever forming L + S."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lrsd.errors import CheckpointError
from lrsd.numerics.allocate import LayerPlan, Shape, index_bytes
from lrsd.numerics.coding import (
    entropy_decode,
    entropy_encode,
    pack_bits,
    pack_codes,
    unpack_bits,
    unpack_codes,
)
from lrsd.numerics.lowrank import complement, pivot_factors
from lrsd.numerics.quantize import GridCodes, LatticeCodes, lattice_steps
from lrsd.numerics.solver import Decomposition

# Tokens up to which torch's int8 kernel beats widening the codes for a dense product, on a CPU: at one
# token it takes a seventh of the time, at sixteen as much, at 512 four times as much.
_KERNEL_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class LayerFormat:
    """What config.json says of one packed layer; with the layer's shape it fixes every tensor.

    rank; columns, rows: kept channels; entries: stored values of a thresholded S (None: whole
    columns); pivoted: factors on pivot rows; bias: a bias is stored; added_bias: one that the model's
    own layer lacks; transposed: the model's own layer is a Conv1D, whose dense weight is (I, O).
    Integer codes for all columns that are not kept: stream: bytes of the entropy-coded ones, and
    exponent: of their steps; or bits, group: width of a code, and columns per scale and zero.
    """

    rank: int
    columns: int = 0
    rows: int = 0
    entries: int | None = None
    pivoted: bool = True
    bias: bool = False
    added_bias: bool = False
    transposed: bool = False
    stream: int | None = None
    exponent: int = 0
    bits: int | None = None
    group: int = 0

    def to_dict(self) -> dict[str, int | bool]:
        """Only what differs from the defaults, and the rank."""
        defaults = asdict(LayerFormat(rank=0))
        return {k: v for k, v in asdict(self).items() if k == "rank" or v != defaults[k]}


class LowRankSparseLinear(nn.Module):
    """Linear layer stored as low rank + kept columns or rows + integer codes.

    | parameter           | shape          | what                                              |
    |---------------------|----------------|---------------------------------------------------|
    | weight              | (r, C)         | pivot rows of L on the free columns; V if unpivoted |
    | coefficients        | (F - r, r)     | other free rows in terms of the pivots; (F, r) U   |
    | pivots              | (r,) int       | which free rows the pivots are                    |
    | columns, column_values | (K,), (O, K) | kept input columns and S on them                  |
    | rows, row_values    | (P,), (P, I)   | kept output rows                                  |
    | mask, entries       | (ceil(OK/8),), (nnz,) | thresholded S: bitmask, its set values by row |
    | codes               | (bytes,) uint8 | integers Q for the free columns, on top of L       |
    | steps               | (C,) uint8     | entropy-coded Q: steps 2^((exponent + steps) / 8)  |
    | scales, zeros       | (O, groups), (bytes,) | fixed width: (Q - zero) scale per group     |
    | bias                | (O,)           |                                                   |

    Entropy-coded integers lie column by column, columns of finer steps first (ties in order); those of a
    fixed width row by row.
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
        code_bytes, zero_bytes = self._code_bytes(free_columns)
        self.codes = integers(code_bytes, torch.uint8) if code_bytes else None
        self.steps = integers(free_columns, torch.uint8) if layout.stream else None
        groups = -(-free_columns // layout.group) if layout.bits else 0
        self.scales = values(shape.out_features, groups) if layout.bits else None
        self.zeros = integers(zero_bytes, torch.uint8) if layout.bits else None
        self.bias = values(shape.out_features) if layout.bias else None
        self._integers: Tensor | None = None
        self._step_values: Tensor | None = None

    def _code_bytes(self, free_columns: int) -> tuple[int, int]:
        layout = self.layout
        if layout.bits is None:
            return layout.stream or 0, 0
        groups = self.out_features * -(-free_columns // layout.group)
        return -(-self.out_features * free_columns * layout.bits // 8), -(-groups * layout.bits // 8)

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
        stored_codes, coded = _store_codes(found.codes)
        layout = LayerFormat(
            rank=found.rank, columns=plan.columns, rows=plan.rows, entries=plan.entries,
            pivoted=plan.pivoted, bias=bias_O is not None, added_bias=plan.bias,
            transposed=transposed, **coded,
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
            "bias": bias_O, **stored_codes,
        }  # fmt: skip
        if found.mask_OK is not None:
            stored["mask"] = pack_bits(found.mask_OK)
            stored["entries"] = found.column_values_OK[found.mask_OK]
        with torch.no_grad():
            for name, parameter in packed.named_parameters():
                value = stored[name]
                assert value is not None, name
                assert value.shape == parameter.shape, name
                parameter.copy_(value)
        return packed

    def check(self, name: str) -> None:
        """Raises: CheckpointError if an index lies outside or comes twice, or if a mask does not match."""
        for what, size in (("pivots", self.out_features - self.layout.rows), ("columns", self.in_features),
                           ("rows", self.out_features)):  # fmt: skip
            indices = getattr(self, what)
            if indices is None or indices.is_meta:
                continue
            steps = indices.long().diff()
            if indices.numel() and (
                int(indices.min()) < 0 or int(indices.max()) >= size or bool((steps < 1).any())
            ):
                raise CheckpointError(f"{name}.{what} must be ascending numbers below {size}; it is damaged")
        if self.mask is not None and self.entries is not None and not self.mask.is_meta:
            count = int(unpack_bits(self.mask, self.out_features * self.layout.columns).sum())
            if count != self.entries.numel():
                raise CheckpointError(f"{name}.mask has {count} bits set, for {self.entries.numel()} entries")

    @property
    def code_bytes(self) -> int:
        """Bytes of codes with their steps, or scales and zeros."""
        parts = (self.codes, self.steps, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)

    def forward(self, x: Tensor) -> Tensor:
        free = self._free_columns(x)
        if self.codes is None:
            y = self._with_kept_rows(self._free_rows(linear(free, self.weight)), x)
        else:
            y = self._coded(free)
            if self.layout.rank:
                y = y + self._free_rows(linear(free, self.weight))
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
        if self.codes is not None and not self.layout.rank and not self.layout.columns:
            return self._decoded().dense().to(dtype)
        identity = torch.eye(self.in_features, dtype=torch.float32, device=self.weight.device)
        in_float = LowRankSparseLinear(Shape(self.out_features, self.in_features), self.layout, torch.float32)
        in_float.load_state_dict(self.state_dict())
        in_float.bias = None
        return in_float.to(self.weight.device)(identity).T.contiguous().to(dtype)

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

    def _coded(self, x: Tensor) -> Tensor:
        """Q x on the free columns. Steps go onto x: codes are small integers, exact in 16 bit."""
        if self.steps is None:
            return linear(x, self._grid().dense().to(x.dtype))
        codes = self.integer_codes()
        if self._step_values is None or self._step_values.dtype != x.dtype:
            self._step_values = lattice_steps(self.steps, self.layout.exponent).to(x.dtype)
        scaled = x * self._step_values
        if _reads_codes_in_place(scaled, codes):
            flat = scaled.reshape(-1, scaled.shape[-1])
            product = torch._weight_int8pack_mm(flat, codes, flat.new_ones(self.out_features))
            return product.view(*scaled.shape[:-1], -1)
        return linear(scaled, codes.to(x.dtype))

    def integer_codes(self) -> Tensor:
        """Q (O, C) as int8 where it fits, else int16 or int32; decoded once and kept.

        Raises: CheckpointError for a damaged stream.
        """
        assert self.codes is not None
        if self._integers is None or self._integers.device != self.codes.device:
            columns = self.weight.shape[1]
            if self.steps is None:
                assert self.layout.bits is not None
                flat = unpack_codes(self.codes, self.layout.bits, self.out_features * columns)
                codes_OC = flat.view(self.out_features, columns)
            else:
                try:
                    sorted_CO = entropy_decode(self.codes, self.out_features * columns).view(columns, -1)
                except ValueError as error:
                    raise CheckpointError(
                        f"the codes of a {self.out_features} x {self.in_features} layer cannot be read: "
                        f"{error}; the checkpoint is damaged: copy or compress it again"
                    ) from error
                codes_OC = sorted_CO[self.steps.argsort(stable=True).argsort()].T
            self._integers = codes_OC.to(_narrowest(codes_OC)).contiguous()
        return self._integers

    def forget_codes(self) -> None:
        """Free the decoded integers, a byte or more per weight; they are decoded again when needed."""
        self._integers = None

    def _grid(self) -> GridCodes:
        assert self.scales is not None
        assert self.zeros is not None
        assert self.layout.bits is not None
        zeros = unpack_codes(self.zeros, self.layout.bits, self.scales.numel()).view_as(self.scales)
        return GridCodes(self.integer_codes(), self.scales, zeros, self.layout.bits, self.layout.group)

    def _decoded(self) -> LatticeCodes | GridCodes:
        if self.steps is None:
            return self._grid()
        return LatticeCodes(self.integer_codes().int(), self.steps, self.layout.exponent)

    def _masked_values(self) -> Tensor:
        assert self.mask is not None
        assert self.entries is not None
        mask_OK = unpack_bits(self.mask, self.out_features * self.layout.columns)
        values_OK = self.entries.new_zeros(mask_OK.shape)
        values_OK[mask_OK] = self.entries
        return values_OK.view(self.out_features, self.layout.columns)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.layout}"


def _reads_codes_in_place(x: Tensor, codes: Tensor) -> bool:
    """Whether torch's kernel for int8 weights applies and is the faster way: a few tokens, on a CPU."""
    few = x.numel() <= _KERNEL_TOKENS * x.shape[-1]
    # The kernel reads past the end of shapes that do not fill its registers.
    whole = all(size % 64 == 0 for size in codes.shape)
    return (
        few and whole and x.device.type == "cpu" and x.dtype == torch.bfloat16 and codes.dtype == torch.int8
    )


def _store_codes(codes: LatticeCodes | GridCodes | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Integer codes as the layer's parameters, and what its format says of them."""
    if isinstance(codes, LatticeCodes):
        columns_first = codes.codes_OI.T[codes.offsets_I.argsort(stable=True)]
        stream = entropy_encode(columns_first)
        tensors = {"codes": stream, "steps": codes.offsets_I}
        return tensors, {"stream": stream.numel(), "exponent": codes.exponent}
    if isinstance(codes, GridCodes):
        tensors = {
            "codes": pack_codes(codes.codes_OI, codes.bits),
            "scales": codes.scales_OG,
            "zeros": pack_codes(codes.zeros_OG, codes.bits),
        }
        return tensors, {"bits": codes.bits, "group": codes.group}
    return {}, {}


def _narrowest(codes: Tensor) -> torch.dtype:
    low, high = int(codes.min()), int(codes.max())
    kinds = (torch.int8, torch.int16, torch.int32)
    return next(kind for kind in kinds if torch.iinfo(kind).min <= low and high <= torch.iinfo(kind).max)


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
