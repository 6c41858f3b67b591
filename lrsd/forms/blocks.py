"""Square blocks of a matrix at 16 bit: block-sparse rows (BSR)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors, index_type

# Rows of x up to which each block is multiplied by its own inputs on a CPU: with more of them one product
# with the whole matrix, zeros included, is faster. In units of a dense product's time, of 4096 x 4096 in
# bfloat16 of which 30 % are kept: 1.4 against 7.8 with one row, 13 against 2.8 with 64.
_FEW = 8


@dataclass(frozen=True, slots=True)
class Blocks(Form):
    """`blocks` blocks of `size` x `size` values, block row by block row; sides are multiples of `size`.

    | tensor        | size               | what                                                     |
    |---------------|--------------------|----------------------------------------------------------|
    | block_values  | (N, size, size)    | the blocks, in the order of their rows, then columns     |
    | block_columns | (N,) int           | which block column each is in, ascending within a row    |
    | block_ends    | (O / size,) int32  | blocks up to the end of each block row                   |
    """

    blocks: int
    size: int
    name: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        if self.size < 2 or (isinstance(self.blocks, int) and self.blocks < 0):
            raise ValueError(f"{self.blocks} blocks of {self.size} x {self.size}; 2 x 2 or more")

    @staticmethod
    def of(values_OI: Tensor, kept_RC: Tensor) -> tuple["Blocks", dict[str, Tensor]]:
        """The blocks of a matrix for which `kept_RC`, one flag for each, is set."""
        size = values_OI.shape[0] // kept_RC.shape[0]
        rows_N, columns_N = kept_RC.nonzero(as_tuple=True)
        values_RSCS = values_OI.view(kept_RC.shape[0], size, kept_RC.shape[1], size)
        tensors = {
            "block_values": values_RSCS[rows_N, :, columns_N],
            "block_columns": columns_N,
            "block_ends": kept_RC.sum(1).cumsum(0),
        }
        return Blocks(rows_N.numel(), size), tensors

    def tensors(self, shape: Shape) -> Specs:
        return {
            "block_values": Spec((self.blocks, self.size, self.size)),
            "block_columns": Spec((self.blocks,), index_type(shape.in_features // self.size)),
            "block_ends": Spec((shape.out_features // self.size,), torch.int32),
        }

    def fits(self, shape: Shape) -> bool:
        whole = shape.out_features % self.size == shape.in_features % self.size == 0
        return whole and self.blocks * self.size**2 <= shape.out_features * shape.in_features

    def check(self, tensors: Tensors, shape: Shape) -> None:
        counts_R = tensors["block_ends"].long().diff(prepend=tensors["block_ends"].new_zeros(1).long())
        columns_N = tensors["block_columns"].long()
        sound = bool((counts_R >= 0).all()) and int(counts_R.sum()) == self.blocks
        if not sound or not bool(((columns_N >= 0) & (columns_N < shape.in_features // self.size)).all()):
            raise ValueError(f"block_ends and block_columns are not those of {self.blocks} blocks")
        places_N = _rows(tensors) * (shape.in_features // self.size) + columns_N
        if bool((places_N.diff() < 1).any()):
            raise ValueError("block_columns must ascend within each row of blocks")

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        half = x.dtype == loaded["block_values"].dtype and x.dtype.itemsize == 2
        on_cuda = x.device.type == "cuda" and torch.cuda.is_available()
        # The kernels have no derivative.
        if half and on_cuda and not x.requires_grad:
            return linear(x, self._sparse(loaded, shape))  # torch's block-sparse kernels
        x_TI = x.reshape(-1, shape.in_features)
        if len(x_TI) > _FEW:
            return linear(x, self._whole(loaded, shape).to(x.dtype))
        x_TNS = x_TI.view(len(x_TI), -1, self.size)[:, loaded["block_columns"].long()]
        y_TNS = torch.einsum("nos,tns->tno", loaded["block_values"].to(x.dtype), x_TNS)
        y_TRS = torch.zeros(len(x_TI), shape.out_features // self.size, self.size, device=x.device)
        y_TRS = y_TRS.index_add(1, _rows(loaded), y_TNS.float())
        return y_TRS.to(x.dtype).view(*x.shape[:-1], shape.out_features)

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        return self._whole(loaded, shape).float()

    def describe(self) -> str:
        return f"{self.blocks:,} blocks of {self.size} x {self.size}"

    def _whole(self, loaded: Tensors, shape: Shape) -> Tensor:
        values = loaded["block_values"]
        rows, columns = shape.out_features // self.size, shape.in_features // self.size
        W_RCSS = values.new_zeros(rows * columns, self.size, self.size)
        places_N = _rows(loaded) * columns + loaded["block_columns"].long()
        W_RCSS = W_RCSS.index_copy(0, places_N, values).view(rows, columns, self.size, self.size)
        return W_RCSS.transpose(1, 2).reshape(shape.out_features, shape.in_features)

    def _sparse(self, loaded: Tensors, shape: Shape) -> Any:
        ends = loaded["block_ends"]
        starts = torch.cat([ends.new_zeros(1), ends])
        size = (shape.out_features, shape.in_features)
        columns = loaded["block_columns"].to(starts.dtype)
        return torch.sparse_bsr_tensor(starts, columns, loaded["block_values"], size)


def _rows(tensors: Tensors) -> Tensor:
    """(N,) which block row each block is in."""
    places_N = torch.arange(tensors["block_columns"].numel(), device=tensors["block_ends"].device)
    return torch.searchsorted(tensors["block_ends"].long(), places_N, right=True)
