"""Dependent quantization (trellis-coded), entropy coded: integers of any size, a step for every column and,
where rows are weighed, for every row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lrsd.forms.base import Form, Shape, Spec, Specs, Tensors, check_coded
from lrsd.forms.kernels import (
    held_integers,
    nibbles_product,
    split_integers,
    split_product,
    whole_integers,
    wide_enough,
)
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
        return split_integers(codes.codes_OI) | tensors

    def tensors(self, shape: Shape) -> Specs:
        specs = {
            "codes": Spec((self.stream,), torch.uint8),
            "steps": Spec((shape.in_features,), torch.uint8),
        }
        return specs | ({"row_steps": Spec((shape.out_features,), torch.uint8)} if self.scaled else {})

    def load(self, tensors: Tensors, shape: Shape) -> Tensors:
        """Q as `held_integers` has it, and the steps."""
        values_OI = torch.empty(shape.out_features, shape.in_features, device="meta")
        values_IO = ans_decode(tensors["codes"], self.states, *_hints(tensors, values_OI))
        if values_IO.T.shape != values_OI.shape:
            raise ValueError(
                f"entropy-coded stream and steps are those of {tuple(values_IO.T.shape)}, "
                f"expected {tuple(values_OI.shape)}"
            )
        steps = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        return held_integers(values_IO, self.states) | steps

    def encode(self, loaded: Tensors, tensors: Tensors) -> dict[str, Tensor]:
        codes_OI = whole_integers(loaded, self.states)
        return {"codes": ans_encode(codes_OI.T.contiguous(), self.states, *_hints(tensors, codes_OI))}

    def moved(self, loaded: Tensors, device: torch.device) -> Tensors:
        if device.type != "cpu" and "nibbles" in loaded:
            steps = {name: loaded[name] for name in ("steps", "row_steps") if name in loaded}
            loaded = split_integers(whole_integers(loaded, self.states)) | steps
        return super(Trellis, self).moved(loaded, device)

    def forward(self, loaded: Tensors, x: Tensor, shape: Shape) -> Tensor:
        steps_I, row_steps_O = loaded["steps"], loaded.get("row_steps", loaded["steps"][:0])
        if "nibbles" in loaded:
            return nibbles_product(x, loaded, self.states, steps_I, row_steps_O, self.exponent)
        # Steps go onto x and y: codes are small integers, exact in 16 bit.
        wide = wide_enough(x.dtype)
        y = split_product(x.to(wide) * column_steps(steps_I, self.exponent).to(wide), loaded)
        return (y * column_steps(row_steps_O, 0).to(wide) if self.scaled else y).to(x.dtype)

    def dense(self, loaded: Tensors, shape: Shape) -> Tensor:
        codes_OI = whole_integers(loaded, self.states).float()
        dense_OI = codes_OI * column_steps(loaded["steps"], self.exponent)
        return dense_OI * column_steps(loaded["row_steps"], 0)[:, None] if self.scaled else dense_OI

    def macs(self, shape: Shape) -> int:
        return shape.out_features * shape.in_features

    def describe(self) -> str:
        return "trellis codes" if self.states > 1 else "entropy codes"


def _hints(tensors: Tensors, values_OI: Tensor) -> tuple[Tensor, Tensor]:
    """What the steps say of the size of codes, in quarter octaves, by row and by column: those of a fine step
    are large."""
    rows_O = tensors.get("row_steps", torch.zeros(values_OI.shape[0], dtype=torch.uint8))
    return (255 - rows_O.long().cpu()) // 2, (255 - tensors["steps"].long().cpu()) // 2
