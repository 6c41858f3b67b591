"""Dependent quantization (trellis-coded), entropy coded: integers of any size, a step for every column and,
where rows are weighed, for every row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors, check_coded
from lrsd.forms.kernels import joined_integers, split_integers, split_product
from lrsd.numerics.ans import ans_decode, ans_encode
from lrsd.numerics.rounding import EntropyCodes, column_steps
from lrsd.numerics.trellis import STATES


@dataclass(frozen=True, slots=True)
class Trellis(Form):
    """Q_ij 2^((exponent + steps_j + row_steps_i) / 8), Q entropy coded into `stream` bytes.

    | tensor    | size            | what                                                             |
    |-----------|-----------------|------------------------------------------------------------------|
    | codes     | (stream,) uint8 | Q column by column, see `numerics.ans`                           |
    | steps     | (I,) uint8      | the columns' steps in eighths of an octave over the exponent     |
    | row_steps | (O,) uint8      | the rows', if `scaled`                                           |

    states: of the trellis that every column is a path through, see `numerics.trellis`; 1: a plain grid.
    """

    stream: int
    exponent: int = 0
    states: int = 64
    scaled: bool = False
    name: ClassVar[str] = "trellis"
    decodes: ClassVar[bool] = True
    encoded: ClassVar[tuple[str, ...]] = ("codes",)

    def __post_init__(self) -> None:
        check_coded(self.stream, self.exponent)
        if self.states not in STATES:
            raise ValueError(f"no trellis of {self.states} states, only {' or '.join(map(str, STATES))}")

    @staticmethod
    def of(codes: EntropyCodes, rows_O: Tensor | None = None) -> tuple["Trellis", dict[str, Tensor]]:
        """rows: exponents of the rows' steps, see `numerics.weights`."""
        tensors = {"steps": codes.offsets_I}
        if rows_O is not None:
            tensors["row_steps"] = rows_O
        stream = ans_encode(codes.codes_OI.T.contiguous(), codes.states, *_hints(tensors, codes.codes_OI))
        form = Trellis(stream.numel(), codes.exponent, codes.states, rows_O is not None)
        return form, {"codes": stream, **tensors}

    def read(self, codes: EntropyCodes, rows_O: Tensor | None = None) -> Tensors:
        """What `load` gives for these codes, which need not be decoded then."""
        tensors = {"steps": codes.offsets_I} | ({} if rows_O is None else {"row_steps": rows_O})
        return self._loaded(codes.codes_OI, tensors)

    def tensors(self, shape: Shape) -> Specs:
        specs = {
            "codes": Spec((self.stream,), torch.uint8),
            "steps": Spec((shape.in_features,), torch.uint8),
        }
        return specs | ({"row_steps": Spec((shape.out_features,), torch.uint8)} if self.scaled else {})

    def load(self, tensors: Tensors, shape: Shape) -> Tensors:
        """Q (O, I) as `split_integers` has it, and the steps (I,) and (O,) in float32."""
        values_OI = torch.empty(shape.out_features, shape.in_features, device="meta")
        values_IO = ans_decode(tensors["codes"], self.states, *_hints(tensors, values_OI))
        if values_IO.T.shape != values_OI.shape:
            raise ValueError(
                f"entropy-coded stream and steps are those of {tuple(values_IO.T.shape)}, "
                f"expected {tuple(values_OI.shape)}"
            )
        return self._loaded(values_IO.T, tensors)

    def encode(self, loaded: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        codes_OI = joined_integers(loaded)
        return {"codes": ans_encode(codes_OI.T.contiguous(), self.states, *_hints(tensors, codes_OI))}

    def _loaded(self, codes_OI: Tensor, tensors: Tensors) -> Tensors:
        loaded = split_integers(codes_OI) | {"steps": column_steps(tensors["steps"], self.exponent)}
        return loaded | ({"row_steps": column_steps(tensors["row_steps"], 0)} if self.scaled else {})

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        # Steps go onto x and y: codes are small integers, exact in 16 bit.
        y = split_product(x * loaded["steps"].to(x.dtype), loaded)
        return y * loaded["row_steps"].to(x.dtype) if self.scaled else y

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        dense_OI = joined_integers(loaded).float() * loaded["steps"]
        return dense_OI * loaded["row_steps"][:, None] if self.scaled else dense_OI

    def macs(self, shape: Shape) -> int:
        return shape.out_features * shape.in_features

    def describe(self) -> str:
        return "trellis codes" if self.states > 1 else "entropy codes"


def _hints(tensors: Tensors, values_OI: Tensor) -> tuple[Tensor, Tensor]:
    """What the steps say of the size of codes, in quarter octaves, by row and by column: those of a fine step
    are large."""
    rows_O = tensors.get("row_steps", torch.zeros(values_OI.shape[0], dtype=torch.uint8))
    return (255 - rows_O.long().cpu()) // 2, (255 - tensors["steps"].long().cpu()) // 2
