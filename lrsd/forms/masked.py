"""Single entries of a matrix at 16 bit, and a bitmask of where they are."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors, check_indices, index_type
from lrsd.numerics.coding import pack_bits, unpack_bits
from lrsd.numerics.masks import expand


@dataclass(frozen=True, slots=True)
class Masked(Form):
    """`entries` values within `columns` columns; with all columns: unstructured sparse. outputs: the same of
    the transposed matrix, so that "columns" are output channels and O and I change places.

    | tensor  | size             | what                                        |
    |---------|------------------|---------------------------------------------|
    | mask    | (ceil(O K / 8),) | bits, row by row, the first one lowest      |
    | entries | (entries,)       | the values whose bit is set, row by row     |
    | columns | (K,) int         | which columns, ascending; none if all       |
    """

    columns: int
    entries: int
    outputs: bool = False
    name: ClassVar[str] = "masked"

    def __post_init__(self) -> None:
        if isinstance(self.columns, int) and (self.columns < 0 or self.entries < 0):
            raise ValueError(f"{self.entries} entries of {self.columns} columns")

    @staticmethod
    def of(
        values_OK: Tensor, mask_OK: Tensor, columns_K: Tensor, width: int, *, outputs: bool = False
    ) -> tuple["Masked", dict[str, Tensor]]:
        """The values where the mask is set, of the columns `columns_K` of `width`."""
        tensors = {"mask": pack_bits(mask_OK), "entries": values_OK[mask_OK]}
        form = Masked(columns_K.numel(), tensors["entries"].numel(), outputs)
        return form, tensors | ({"columns": columns_K} if 0 < form.columns < width else {})

    def tensors(self, shape: Shape) -> Specs:
        height, width = self._sides(shape)
        specs = {
            "mask": Spec((-(-height * self.columns // 8),), torch.uint8),
            "entries": Spec((self.entries,)),
        }
        if not isinstance(self.columns, int):  # of many offers some may have all columns, and no list of them
            specs["columns"] = Spec((self.columns * (self.columns < width),), index_type(width))
        elif 0 < self.columns < width:
            specs["columns"] = Spec((self.columns,), index_type(width))
        return specs

    def fits(self, shape: Shape) -> bool:
        return self.columns <= self._sides(shape)[1]

    def check(self, tensors: Tensors, shape: Shape) -> None:
        if "columns" in tensors:
            check_indices("columns", tensors["columns"], self._sides(shape)[1])
        count = int(unpack_bits(tensors["mask"], self._sides(shape)[0] * self.columns).sum())
        if count != self.entries:
            raise ValueError(f"mask has {count} bits set, for {self.entries} entries")

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        values_OK = self._values(loaded, shape)
        if not self.outputs:
            return linear(x[..., self._indices(loaded)], values_OK)
        y = x.new_zeros(*x.shape[:-1], shape.out_features)
        y[..., self._indices(loaded)] = x @ values_OK
        return y

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        values_OK = self._values(loaded, shape).float()
        S_OI = values_OK.new_zeros(self._sides(shape))
        S_OI[:, self._indices(loaded)] = values_OK
        return S_OI.T.contiguous() if self.outputs else S_OI

    def macs(self, shape: Shape) -> int:
        """The product is one with all of its columns, zeros included."""
        return self._sides(shape)[0] * self.columns

    def describe(self) -> str:
        return f"{self.entries:,} entries"

    def _sides(self, shape: Shape) -> tuple[int, int]:
        """(O, I), or the other way round."""
        sides = shape.out_features, shape.in_features
        return sides[::-1] if self.outputs else sides

    def _indices(self, loaded: Tensors) -> Tensor | slice:
        """Those stored; where none are, it is all columns or none."""
        return loaded["columns"].long() if "columns" in loaded else slice(self.columns)

    def _values(self, loaded: Tensors, shape: Shape) -> Tensor:
        mask, entries, count = loaded["mask"], loaded["entries"], self._sides(shape)[0] * self.columns
        if mask.device.type == "cpu" and not entries.requires_grad:
            return expand(mask, entries.detach(), count).view(self._sides(shape)[0], self.columns)
        # Unlike an index by the mask, this need not know how many places there are: nothing waits. It has a
        # derivative, unlike the compiled loops.
        values_OK = entries.new_zeros(count).masked_scatter_(unpack_bits(mask, count), entries)
        return values_OK.view(self._sides(shape)[0], self.columns)
