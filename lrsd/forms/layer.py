"""A stored layer: kept channels at 16 bit, and forms summed on the other rows and columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lrsd.errors import CheckpointError
from lrsd.forms import FORMS
from lrsd.forms.base import (
    Form,
    Shape,
    Spec,
    Specs,
    Tensors,
    check_indices,
    check_numbers,
    index_type,
    interleave,
)
from lrsd.forms.entropy import Entropy
from lrsd.forms.groupwise import Groupwise
from lrsd.forms.lowrank import LowRank
from lrsd.forms.masked import Masked
from lrsd.numerics.lowrank import complement

Part = tuple[Form, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What config.json says of one packed layer; with the layer's shape it fixes every tensor.

    terms: the summands, each on the free rows and columns. columns, rows: kept input and output channels.
    bias: one is stored; added_bias: the model's own layer has none. transposed: the model's own layer is a
    Conv1D, whose dense weight is (I, O).

    | tensor                 | size         | what                               |
    |------------------------|--------------|------------------------------------|
    | columns, column_values | (K,), (O, K) | kept input columns and S on them; no indices if they are all |
    | rows, row_values       | (P,), (P, I) | kept output rows                   |
    | bias                   | (O,)         |                                    |

    Besides, those of the terms; without low rank an empty `weight` (0, I) and `coefficients` (O, 0).
    """

    terms: tuple[Form, ...] = ()
    columns: int = 0
    rows: int = 0
    bias: bool = False
    added_bias: bool = False
    transposed: bool = False

    def free(self, shape: Shape) -> Shape:
        return Shape(shape.out_features - self.rows, shape.in_features - self.columns)

    def tensors(self, shape: Shape) -> Specs:
        """Raises: ValueError if two terms store a tensor of the same name."""
        free = self.free(shape)
        specs: Specs = {}
        if self.columns:
            specs["column_values"] = Spec((shape.out_features, self.columns))
            if self.columns < shape.in_features:
                specs["columns"] = Spec((self.columns,), index_type(shape.in_features))
        if self.rows:
            specs["rows"] = Spec((self.rows,), index_type(shape.out_features))
            specs["row_values"] = Spec((self.rows, shape.in_features))
        if self.bias:
            specs["bias"] = Spec((shape.out_features,))
        for term in self.terms:
            for name, spec in term.tensors(free).items():
                if name in specs:
                    raise ValueError(f"two of its parts store {name}")
                specs[name] = spec
        # The tensors of no rank at all, from whose sizes a reader knows the layer's; and under this name so
        # that a loader that does not know packed layers fails on its shape.
        if "weight" not in specs:
            specs |= LowRank(0).tensors(free)
        return specs

    def shape(self, tensors: Tensors) -> Shape:
        """The layer's shape, from its tensors'. Raises: KeyError or ValueError if they cannot be a
        layer's."""
        (_, in_features), (others, _) = tensors["weight"].shape, tensors["coefficients"].shape
        pivots = tensors["pivots"].numel() if "pivots" in tensors else 0
        return Shape(others + pivots + self.rows, in_features + self.columns)

    def nbytes(self, shape: Shape) -> Any:
        """Bytes stored; a bias that the model already had stands on neither side of the ratio."""
        own_bias = self.bias and not self.added_bias
        return sum(
            spec.nbytes for name, spec in self.tensors(shape).items() if not (own_bias and name == "bias")
        )

    def macs(self, shape: Shape) -> int:
        """Multiply-adds per token."""
        kept = self.columns * shape.out_features + self.rows * shape.in_features
        return kept + sum(term.macs(self.free(shape)) for term in self.terms)

    def check(self, tensors: Tensors, shape: Shape) -> None:
        """Raises: ValueError if values contradict each other."""
        if "columns" in tensors and self.columns:
            check_indices("columns", tensors["columns"], shape.in_features)
        if self.rows:
            check_indices("rows", tensors["rows"], shape.out_features)
        for term in self.terms:
            term.check(self.part(term, tensors, shape), self.free(shape))

    def load(self, tensors: Tensors, shape: Shape) -> list[Tensors]:
        """What each term reads at a product. Raises: ValueError for damaged tensors."""
        free = self.free(shape)
        return [term.load(self.part(term, tensors, shape), free) for term in self.terms]

    def part(self, term: Form, tensors: Tensors, shape: Shape) -> dict[str, Tensor]:
        return {name: tensors[name] for name in term.tensors(self.free(shape))}

    def forward(self, tensors: Tensors, loaded: Sequence[Tensors], x: Tensor, shape: Shape) -> Tensor:
        """Outputs (..., O) for x (..., I), without ever forming the matrix."""
        free, free_x = self.free(shape), self._free_columns(tensors, x)
        y: Tensor | None = None
        for term, read in zip(self.terms, loaded, strict=True):
            if isinstance(term, LowRank) and not term.rank:
                continue
            part = term.forward(read, free_x, free)
            y = part if y is None else y + part
        if y is None:
            y = x.new_zeros(*x.shape[:-1], free.out_features)
        if self.rows:
            y = interleave(linear(x, tensors["row_values"]), y, tensors["rows"])
        if self.columns:
            kept = x[..., tensors["columns"].long()] if "columns" in tensors else x
            y = y + linear(kept, tensors["column_values"])
        return y + tensors["bias"] if self.bias else y

    def dense(self, tensors: Tensors, loaded: Sequence[Tensors], shape: Shape) -> Tensor:
        """The matrix (O, I) in float32."""
        free = self.free(shape)
        parts = [t.dense(read, free) for t, read in zip(self.terms, loaded, strict=True)]
        device = tensors["weight"].device
        if len(parts) == 1 and free == shape:
            return parts[0]
        W_OI = torch.zeros(shape.out_features, shape.in_features, device=device)
        free_rows = _rest(tensors.get("rows") if self.rows else None, shape.out_features, device)
        free_columns = self._free_indices(tensors, shape, device)
        if parts:
            W_OI[free_rows[:, None], free_columns] = sum(parts[1:], parts[0])
        if self.rows:
            W_OI[tensors["rows"].long()] = tensors["row_values"].float()
        if self.columns:
            columns = tensors["columns"].long() if "columns" in tensors else slice(None)
            W_OI[:, columns] += tensors["column_values"].float()
        return W_OI

    def fits(self, shape: Shape) -> bool:
        """Whether every size is one that a weight of this shape can have."""
        free = self.free(shape)
        sizes = [size for spec in self.tensors(shape).values() for size in spec.size]
        return min(free.out_features, free.in_features, *sizes) >= 0 and all(
            term.fits(free) for term in self.terms
        )

    def describe(self) -> str:
        """The parts that it is stored as, in words."""
        kept = [f"{n} {what}" for n, what in ((self.columns, "columns"), (self.rows, "rows")) if n]
        terms = [t.describe() for t in self.terms if not (isinstance(t, LowRank) and not t.rank)]
        return " + ".join([*terms, *kept]) or "nothing"

    def to_dict(self) -> dict[str, Any]:
        """The entry in config.json: the terms, and what differs from the defaults."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "terms"}
        return {"terms": [term.to_dict() for term in self.terms]} | {k: v for k, v in mine.items() if v}

    def _free_columns(self, tensors: Tensors, x: Tensor) -> Tensor:
        if not self.columns:
            return x
        return x[..., complement(tensors["columns"], x.shape[-1])] if "columns" in tensors else x[..., :0]

    def _free_indices(self, tensors: Tensors, shape: Shape, device: torch.device) -> Tensor:
        if self.columns == shape.in_features:
            return torch.zeros(0, dtype=torch.int64, device=device)
        return _rest(tensors["columns"] if self.columns else None, shape.in_features, device)


def _rest(taken: Tensor | None, size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) if taken is None else complement(taken, size)


def parse_layer(name: str, entry: Any) -> Layer:
    """One layer's entry in config.json, of this format version or the one before.

    Raises: CheckpointError naming the layer, for an entry that is not of the documented form.
    """
    try:
        if not isinstance(entry, dict):
            raise ValueError("it is no object")
        layer = _parse_version_2(entry) if "terms" in entry else _parse_version_1(entry)
        if layer.columns < 0 or layer.rows < 0:
            raise ValueError("numbers of channels are negative")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"config.json: layer {name} cannot be read: {error}; it is {entry!r:.200}"
        ) from error
    return layer


def _parse_version_2(entry: dict[str, Any]) -> Layer:
    terms = entry["terms"]
    if not isinstance(terms, list) or not all(isinstance(term, dict) for term in terms):
        raise ValueError("its terms are no list of objects")
    flat = {key: value for key, value in entry.items() if key != "terms"}
    check_numbers(Layer, flat)
    return Layer(terms=tuple(_parse_term(dict(term)) for term in terms), **flat)


def _parse_term(entry: dict[str, Any]) -> Form:
    name = entry.pop("form", None)
    if not isinstance(name, str) or name not in FORMS:
        raise ValueError(f"it has a form {name!r:.40}, this lrsd knows {', '.join(FORMS)}")
    check_numbers(FORMS[name], entry)
    return FORMS[name](**entry)


def _parse_version_1(entry: dict[str, Any]) -> Layer:
    """Format version 1 had one flat object: rank and pivoted; columns, rows, bias, added_bias, transposed;
    stream and exponent, or bits and group; entries of a mask."""
    flat = dict(entry)
    if "rank" not in flat:
        raise ValueError("it has neither terms nor, as in format version 1, a rank")
    low_rank: dict[str, Any] = {key: flat.pop(key) for key in ("rank", "pivoted") if key in flat}
    check_numbers(LowRank, low_rank)
    terms: list[Form] = [LowRank(**low_rank)]
    for kind, keys in ((Entropy, ("stream", "exponent")), (Groupwise, ("bits", "group"))):
        if keys[0] in flat:
            own = {key: flat.pop(key) for key in keys if key in flat}
            check_numbers(kind, own)
            terms.append(kind(**own))
    if "entries" in flat:
        own = {"columns": flat.pop("columns", 0), "entries": flat.pop("entries")}
        check_numbers(Masked, own)
        terms.append(Masked(**own))
    check_numbers(Layer, flat)
    return Layer(terms=tuple(terms), **flat)


def assemble(
    shape: Shape, parts: Sequence[Part], kept: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Layer, dict[str, Tensor]]:
    """A layer and its tensors, cast once to what is stored, from forms with theirs.

    kept: any of columns with column_values, rows with row_values, and bias.
    """
    layer = Layer(
        terms=tuple(form for form, _ in parts),
        columns=kept["columns"].numel() if "columns" in kept else 0,
        rows=kept["rows"].numel() if "rows" in kept else 0,
        bias="bias" in kept,
    )
    given = dict(kept) | {name: tensor for _, tensors in parts for name, tensor in tensors.items()}
    stored = {}
    for name, spec in layer.tensors(shape).items():
        value = given.get(name, torch.zeros(spec.size, device=next(iter(given.values())).device))
        assert tuple(value.shape) == spec.size, (name, tuple(value.shape), spec.size)
        stored[name] = value.to(spec.dtype or dtype).contiguous()
    return layer, stored
