"""What every stored form promises: its tensors are as it states, and stand for the matrix that was packed."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from blocks import random_blocks
from deflate import entropy_form
from simulated import simulated_device
from torch import Tensor

from lrsd.checkpoint.reader import _packed
from lrsd.errors import CheckpointError
from lrsd.forms import FORMS
from lrsd.forms.base import Form, Shape, Spec
from lrsd.forms.blocks import Blocks
from lrsd.forms.coded_low_rank import CodedLowRank
from lrsd.forms.entropy import Entropy
from lrsd.forms.ggml import BLOCK_TYPES, Ggml
from lrsd.forms.groupwise import Groupwise
from lrsd.forms.kernels import split_integers
from lrsd.forms.layer import Layer, assemble, parse_layer
from lrsd.forms.lowrank import LowRank
from lrsd.forms.masked import Masked
from lrsd.forms.packed import PackedLinear
from lrsd.forms.semi_structured import SemiStructured
from lrsd.forms.symmetric import Symmetric
from lrsd.forms.trellis import Trellis
from lrsd.numerics.blocks import BlockCodes
from lrsd.numerics.rounding import EntropyCodes, GroupCodes, column_steps

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@dataclass(frozen=True)
class Case:
    """A form with its uncast tensors, the matrix that was packed, and the multiply-adds per token.

    exact: whether it is integers times steps, which no 16-bit type rounds.
    """

    form: Form
    tensors: Mapping[str, Tensor]
    W_OI: Tensor
    macs: int
    exact: bool = False

    @property
    def shape(self) -> Shape:
        return Shape(*self.W_OI.shape)

    def stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        specs = self.form.tensors(self.shape)
        return {name: self.tensors[name].to(spec.dtype or dtype) for name, spec in specs.items()}


def low_rank(generator: torch.Generator, shape: Shape, rank: int, pivoted: bool = True) -> Case:
    U_OR = torch.randn(shape.out_features, rank, generator=generator, dtype=torch.float64)
    V_RI = torch.randn(rank, shape.in_features, generator=generator, dtype=torch.float64)
    saved = rank * rank if pivoted else 0
    macs = rank * (shape.out_features + shape.in_features) - saved
    return Case(*LowRank.of(U_OR, V_RI, pivoted=pivoted), U_OR @ V_RI, macs)


def masked(
    generator: torch.Generator, shape: Shape, columns: int, entries: int, outputs: bool = False
) -> Case:
    if outputs:
        turned = masked(generator, Shape(shape.in_features, shape.out_features), columns, entries)
        form = Masked(columns, entries, outputs)
        return Case(form, turned.tensors, turned.W_OI.T.contiguous(), turned.macs)
    columns_K = torch.randperm(shape.in_features, generator=generator)[:columns].sort().values
    values_OK = torch.randn(shape.out_features, columns, generator=generator, dtype=torch.float64)
    mask_OK = torch.zeros(values_OK.numel(), dtype=torch.bool)
    mask_OK[torch.randperm(values_OK.numel(), generator=generator)[:entries]] = True
    mask_OK = mask_OK.view_as(values_OK)
    W_OI = torch.zeros(shape.out_features, shape.in_features, dtype=torch.float64)
    W_OI[:, columns_K] = values_OK * mask_OK
    return Case(*Masked.of(values_OK, mask_OK, columns_K, shape.in_features), W_OI, mask_OK.numel())


def entropy(generator: torch.Generator, shape: Shape, largest: int, exponent: int) -> Case:
    size = shape.out_features, shape.in_features
    codes_OI = torch.randint(-largest, largest + 1, size, generator=generator, dtype=torch.int32)
    offsets_I = torch.randint(0, 5, size[1:], generator=generator).to(torch.uint8)
    W_OI = codes_OI.double() * torch.exp2((offsets_I.double() + exponent) / 8)
    codes = EntropyCodes(codes_OI, offsets_I, exponent)
    return Case(*entropy_form(codes), W_OI, prod(size), exact=True)


def trellis(
    generator: torch.Generator,
    shape: Shape,
    largest: int,
    exponent: int,
    *,
    states: int = 64,
    rows: bool = True,
) -> Case:
    """Any parities make a path: the grid of a value follows from those of the codes before it."""
    size = shape.out_features, shape.in_features
    k_OI = torch.randint(-largest, largest + 1, size, generator=generator, dtype=torch.int32)
    codes_OI = k_OI if states == 1 else path_of(k_OI)
    offsets_I = torch.randint(0, 5, size[1:], generator=generator).to(torch.uint8)
    rows_O = torch.randint(0, 40, size[:1], generator=generator).to(torch.uint8) if rows else None
    W_OI = codes_OI.double() * torch.exp2((offsets_I.double() + exponent) / 8)
    if rows_O is not None:
        W_OI *= torch.exp2(rows_O.double() / 8)[:, None]
    codes = EntropyCodes(codes_OI, offsets_I, exponent, states)
    return Case(*Trellis.of(codes, rows_O), W_OI, prod(size), exact=not rows)


def path_of(k_OI: Tensor) -> Tensor:
    """2k, or on the other grid 2k - sgn k, as the parities of the codes above lead there."""
    values_OI = k_OI.clone()
    for j in range(k_OI.shape[1]):
        state = 0
        for i, k in enumerate(k_OI[:, j].tolist()):
            values_OI[i, j] = 2 * k - ((k > 0) - (k < 0)) * ((state // 2 + state // 8) % 2)
            state = 2 * state % 64 + (k % 2 ^ state % 2 ^ state // 32)
    return values_OI


def groupwise(generator: torch.Generator, shape: Shape, bits: int, group: int) -> Case:
    size, groups = (shape.out_features, shape.in_features), -(-shape.in_features // group)
    codes_OI = torch.randint(0, 2**bits, size, generator=generator).to(torch.uint8)
    zeros_OG = torch.randint(0, 2**bits, (size[0], groups), generator=generator).to(torch.uint8)
    scales_OG = torch.rand(size[0], groups, generator=generator).add(0.5).bfloat16().float()
    owner_I = torch.arange(shape.in_features) // group
    W_OI = (codes_OI.double() - zeros_OG.double()[:, owner_I]) * scales_OG.double()[:, owner_I]
    return Case(*Groupwise.of(GroupCodes(codes_OI, scales_OG, zeros_OG, bits, group)), W_OI, prod(size),
                exact=True)  # fmt: skip


def symmetric(generator: torch.Generator, shape: Shape, bits: int, group: int) -> Case:
    size, groups = (shape.out_features, shape.in_features), shape.in_features // group
    codes_OI = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), size, generator=generator).to(torch.int8)
    scales_OG = torch.randn(size[0], groups, generator=generator).bfloat16().float()
    W_OI = codes_OI.double() * scales_OG.double().repeat_interleave(group, 1)
    nothing, grid = torch.zeros(size[0], groups), Symmetric(bits, group).grid
    numbers_OI = (codes_OI.int() + 2 ** (bits - 1)).to(torch.uint8)
    codes = BlockCodes(grid, numbers_OI, torch.ones_like(nothing), nothing, scales_OG, nothing)
    return Case(*Symmetric.of(codes), W_OI, prod(size), exact=True)


def blocks(generator: torch.Generator, shape: Shape, kept: int, size: int) -> Case:
    kept_RC = torch.zeros(shape.out_features // size, shape.in_features // size, dtype=torch.bool)
    kept_RC.view(-1)[torch.randperm(kept_RC.numel(), generator=generator)[:kept]] = True
    mask_OI = kept_RC.repeat_interleave(size, 0).repeat_interleave(size, 1)
    W_OI = torch.randn(mask_OI.shape, generator=generator, dtype=torch.float64)
    return Case(*Blocks.of(W_OI, kept_RC), W_OI * mask_OI, kept * size**2)


def two_of_four(generator: torch.Generator, shape: Shape) -> Case:
    W_OI = torch.randn(shape.out_features, shape.in_features, generator=generator, dtype=torch.float64)
    chosen = torch.rand(shape.out_features, shape.in_features // 4, 4, generator=generator).topk(2).indices
    mask_OI = torch.zeros(chosen.shape[0], chosen.shape[1], 4, dtype=torch.bool).scatter(2, chosen, True)
    W_OI *= mask_OI.flatten(1)
    return Case(*SemiStructured.of(W_OI, mask_OI.flatten(1)), W_OI, W_OI.numel() // 2)


def coded_low_rank(generator: torch.Generator, shape: Shape, rank: int, bits: int) -> Case:
    """Factors that are integers, the largest one in each, times steps."""
    top = 2 ** (bits - 1) - 1
    factors = []
    for side in (shape.out_features, shape.in_features):
        factor_RN = torch.randint(-top, top + 1, (rank, side), generator=generator)
        factor_RN[:, 0] = top
        factors.append(factor_RN * torch.rand(rank, 1, generator=generator, dtype=torch.float64))
    W_OI = factors[0].T @ factors[1]
    macs = rank * (shape.out_features + shape.in_features)
    return Case(*CodedLowRank.of(factors[0].T, factors[1], bits), W_OI, macs)


def ggml(generator: torch.Generator, kind: str, rows: int = 5) -> Case:
    codes = random_blocks(kind, generator, rows)
    return Case(*Ggml.of(kind, codes), codes.dense().double(), rows * 512, exact=True)


ODD, ROW, COLUMN = Shape(19, 13), Shape(1, 7), Shape(9, 1)
Make = Callable[[torch.Generator], Case]
CASES: dict[str, tuple[str, Make]] = {
    "low rank": ("low_rank", lambda g: low_rank(g, ODD, 5)),
    "low rank, unpivoted": ("low_rank", lambda g: low_rank(g, ODD, 5, pivoted=False)),
    "rank 0": ("low_rank", lambda g: low_rank(g, ODD, 0)),
    "rank 0, unpivoted": ("low_rank", lambda g: low_rank(g, ODD, 0, pivoted=False)),
    "full rank": ("low_rank", lambda g: low_rank(g, ODD, 13)),
    "full rank of a square": ("low_rank", lambda g: low_rank(g, Shape(6, 6), 6)),
    "low rank of a row": ("low_rank", lambda g: low_rank(g, ROW, 1)),
    "low rank of a column": ("low_rank", lambda g: low_rank(g, COLUMN, 1)),
    "masked": ("masked", lambda g: masked(g, ODD, 5, 41)),
    "masked in all columns": ("masked", lambda g: masked(g, ODD, 13, 41)),
    "masked in rows": ("masked", lambda g: masked(g, ODD, 5, 31, True)),
    "masked in all rows": ("masked", lambda g: masked(g, ODD, 19, 41, True)),
    "no entries": ("masked", lambda g: masked(g, ODD, 5, 0)),
    "no columns": ("masked", lambda g: masked(g, ODD, 0, 0)),
    "every entry": ("masked", lambda g: masked(g, ODD, 13, 13 * 19)),
    "masked row": ("masked", lambda g: masked(g, ROW, 7, 3)),
    "masked column": ("masked", lambda g: masked(g, COLUMN, 1, 4)),
    "blocks": ("blocks", lambda g: blocks(g, Shape(12, 20), 7, 4)),
    "no blocks": ("blocks", lambda g: blocks(g, Shape(12, 20), 0, 4)),
    "every block": ("blocks", lambda g: blocks(g, Shape(12, 20), 15, 4)),
    "one block": ("blocks", lambda g: blocks(g, Shape(16, 16), 1, 16)),
    "2:4": ("semi_structured", lambda g: two_of_four(g, Shape(19, 24))),
    "2:4 of a row": ("semi_structured", lambda g: two_of_four(g, Shape(1, 8))),
    **{
        f"low rank in {bits} bit": (
            "coded_low_rank", lambda g, bits=bits: coded_low_rank(g, ODD, 5, bits)
        )
        for bits in (4, 8)
    },
    "low rank of a row in 8 bit": ("coded_low_rank", lambda g: coded_low_rank(g, ROW, 1, 8)),
    "entropy": ("entropy", lambda g: entropy(g, ODD, 2, -40)),
    "entropy, int16": ("entropy", lambda g: entropy(g, ODD, 3000, 7)),
    "entropy, int32": ("entropy", lambda g: entropy(g, ODD, 2**20, -131)),
    "entropy of zeros": ("entropy", lambda g: entropy(g, ODD, 0, 0)),
    "entropy of a row": ("entropy", lambda g: entropy(g, ROW, 9, 0)),
    "entropy of a column": ("entropy", lambda g: entropy(g, COLUMN, 9, -3)),
    "trellis": ("trellis", lambda g: trellis(g, ODD, 2, -40)),
    "trellis, int16": ("trellis", lambda g: trellis(g, ODD, 3000, 7)),
    "trellis, int32": ("trellis", lambda g: trellis(g, ODD, 2**20, -131)),
    "trellis of zeros": ("trellis", lambda g: trellis(g, ODD, 0, 0)),
    "trellis of a row": ("trellis", lambda g: trellis(g, ROW, 9, 0)),
    "trellis of a column": ("trellis", lambda g: trellis(g, COLUMN, 9, -3)),
    "trellis of alike rows": ("trellis", lambda g: trellis(g, ODD, 9, -3, rows=False)),
    "plain grid": ("trellis", lambda g: trellis(g, ODD, 9, -3, states=1, rows=False)),
    "plain grid, int32": ("trellis", lambda g: trellis(g, ODD, 2**20, -3, states=1)),
    **{f"{bits} bit": ("groupwise", lambda g, bits=bits: groupwise(g, ODD, bits, 5)) for bits in range(1, 9)},
    **{
        f"{bits} bit around zero": ("symmetric", lambda g, bits=bits: symmetric(g, Shape(5, 96), bits, 32))
        for bits in range(2, 9)
    },
    "a row around zero": ("symmetric", lambda g: symmetric(g, Shape(1, 128), 3, 128)),
    **{kind: ("ggml", lambda g, kind=kind: ggml(g, kind)) for kind in BLOCK_TYPES},
    "a row of blocks": ("ggml", lambda g: ggml(g, "Q4_K", 1)),
    "one group": ("groupwise", lambda g: groupwise(g, ODD, 3, 64)),
    "groups of one": ("groupwise", lambda g: groupwise(g, ODD, 3, 1)),
    "3 bit row": ("groupwise", lambda g: groupwise(g, ROW, 3, 4)),
    "3 bit column": ("groupwise", lambda g: groupwise(g, COLUMN, 3, 4)),
}  # fmt: skip
every_case = pytest.mark.parametrize("make", [make for _, make in CASES.values()], ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_every_form_is_in_this_suite_under_the_name_that_it_knows() -> None:
    assert {name for name, _ in CASES.values()} == set(FORMS)
    for name, make in CASES.values():
        assert type(make(torch.Generator()).form) is FORMS[name]
        assert FORMS[name].name == name


@every_case
@every_dtype
def test_the_stated_tensors_are_the_packed_ones_to_the_byte(
    generator: torch.Generator, make: Make, dtype: torch.dtype
) -> None:
    case = make(generator)
    specs = case.form.tensors(case.shape)
    assert specs.keys() == case.tensors.keys()
    for name, spec in specs.items():
        assert tuple(case.tensors[name].shape) == spec.size, name
        if spec.dtype is not None:  # the cast to it loses nothing
            assert torch.equal(case.tensors[name].to(spec.dtype).long(), case.tensors[name].long()), name
    stored = case.stored(dtype)
    if dtype.itemsize == 2:
        assert case.form.nbytes(case.shape) == sum(tensor.nbytes for tensor in stored.values())
    case.form.check(stored, case.shape)


@every_case
@every_dtype
def test_what_is_loaded_is_what_was_packed(
    generator: torch.Generator, make: Make, dtype: torch.dtype
) -> None:
    """A code to the bit; low rank and entries to a rounding of each value."""
    case = make(generator)
    dense_OI = case.form.dense(case.form.load(case.stored(dtype), case.shape), case.shape)
    assert dense_OI.dtype == torch.float32
    assert tuple(dense_OI.shape) == tuple(case.W_OI.shape)
    scale = float(case.W_OI.abs().max())
    atol = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}[dtype] * scale
    rtol = 1e-6 if case.exact or dtype == torch.float32 else 2**-7
    torch.testing.assert_close(dense_OI, case.W_OI.float(), rtol=rtol, atol=1e-30 if case.exact else atol)


@every_case
def test_a_product_is_that_with_the_dense_matrix(generator: torch.Generator, make: Make) -> None:
    case = make(generator)
    loaded = case.form.load(case.stored(torch.float32), case.shape)
    x = torch.randn(2, 3, case.shape.in_features, generator=generator)
    expected = x.double() @ case.form.dense(loaded, case.shape).double().T
    scale = float(expected.abs().max())
    found = case.form.forward(loaded, x, case.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * scale)


def test_few_and_many_rows_are_multiplied_by_the_same_blocks(generator: torch.Generator) -> None:
    """Few are by each block on its own."""
    case = blocks(generator, Shape(32, 48), 3, 16)
    loaded = case.form.load(case.stored(torch.float32), case.shape)
    x = torch.randn(40, 48, generator=generator)
    many, few = (
        torch.cat([case.form.forward(loaded, part, case.shape) for part in x.split(n)]) for n in (40, 1)
    )
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(many.double(), x.double() @ case.W_OI.T, rtol=1e-5, atol=1e-5)


@every_case
def test_on_an_accelerator_it_is_the_same_and_a_product_waits_for_nothing(
    generator: torch.Generator, make: Make
) -> None:
    case = make(generator)
    stored, shape = case.stored(torch.bfloat16), case.shape
    expected_OI = case.form.dense(case.form.load(stored, shape), shape)
    x = torch.randn(3, shape.in_features, generator=generator).bfloat16()
    with simulated_device() as device:
        moved = {name: tensor.to("cuda") for name, tensor in stored.items()}
        case.form.check(moved, shape)
        loaded = case.form.load(moved, shape)
        again = case.form.encode(loaded, moved) if case.form.encoded else {}
        dense_OI = case.form.dense(loaded, shape).cpu()
        assert all(torch.equal(again[name].cpu(), stored[name]) for name in case.form.encoded)
        x, waits = x.to("cuda"), device.syncs.total()
        y = case.form.forward(loaded, x, shape)
        assert y.device.type == "cuda"
        # llama.cpp's blocks are opened by its own package, which reads numpy's arrays.
        assert device.syncs.total() == waits or case.form.name == "ggml"
    assert torch.equal(dense_OI, expected_OI)


@every_case
def test_multiply_adds(generator: torch.Generator, make: Make) -> None:
    case = make(generator)
    assert case.form.macs(case.shape) == case.macs
    kept = Layer(terms=(case.form,), columns=3)
    wider = Shape(case.shape.out_features, case.shape.in_features + 3)
    assert kept.macs(wider) == case.macs + 3 * case.shape.out_features
    higher = Shape(case.shape.out_features + 2, case.shape.in_features)
    assert Layer(terms=(case.form,), rows=2).macs(higher) == case.macs + 2 * case.shape.in_features


@every_case
@pytest.mark.parametrize("kept", ["", "columns", "rows"])
@pytest.mark.parametrize("bias", ["", "own", "added"])
def test_a_layer_around_it_is_stored_and_read_back(
    generator: torch.Generator, make: Make, kept: str, bias: str
) -> None:
    """Bytes as stated, its entry in config.json, shape, sizes, dense matrix and product."""
    case = make(generator)
    out_features, in_features = case.shape.out_features, case.shape.in_features
    if kept == "columns" and "columns" in case.tensors:
        pytest.skip("no layer stores two lists of columns")
    shape = case.shape
    given: dict[str, Tensor] = {}
    W_OI = case.W_OI
    if kept == "columns":
        shape = Shape(out_features, in_features + 2)
        given = {"columns": torch.tensor([0, 2]), "column_values": torch.randn(out_features, 2).double()}
        W_OI = torch.zeros(out_features, in_features + 2, dtype=torch.float64)
        free = [j for j in range(in_features + 2) if j not in (0, 2)]
        W_OI[:, free], W_OI[:, [0, 2]] = case.W_OI, given["column_values"]
    elif kept == "rows":
        shape = Shape(out_features + 1, in_features)
        given = {"rows": torch.tensor([1]), "row_values": torch.randn(1, in_features).double()}
        W_OI = torch.cat([case.W_OI[:1], given["row_values"], case.W_OI[1:]])
    if bias:
        given["bias"] = torch.randn(shape.out_features, generator=generator).double()
    layer, tensors = assemble(shape, [(case.form, case.tensors)], given, torch.bfloat16)
    layer = replace(layer, added_bias=bias == "added")
    taken = sum(tensor.nbytes for tensor in tensors.values())
    assert layer.nbytes(shape) == taken - (2 * shape.out_features if bias == "own" else 0)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (torch.Size(spec.size), spec.dtype or torch.bfloat16)
        for name, spec in layer.tensors(shape).items()
    }
    assert parse_layer("x", json.loads(json.dumps(layer.to_dict()))) == layer
    assert layer.shape(tensors) == shape
    assert layer.fits(shape)
    packed = PackedLinear(shape, layer, torch.bfloat16)
    packed.load_state_dict(tensors)
    packed.check("x")
    assert sum(parameter.nbytes for parameter in packed.parameters()) == taken
    exact, tensors = assemble(shape, [(case.form, case.tensors)], given, torch.float32)
    packed = PackedLinear.holding(shape, exact, tensors)
    scale = float(W_OI.abs().max())
    torch.testing.assert_close(packed.dense_weight(), W_OI.float(), rtol=1e-5, atol=1e-5 * scale)
    x = torch.randn(3, shape.in_features, generator=generator)
    expected = x.double() @ W_OI.T + given.get("bias", 0)
    top = max(float(expected.abs().max()), scale)
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-4, atol=1e-5 * top)


@pytest.mark.parametrize("shape", [Shape(40, 30), Shape(30, 40), Shape(1, 9), Shape(9, 1)])
@pytest.mark.parametrize(
    "flags", [{}, {"columns": 1}, {"rows": 1}, {"bias": True, "added_bias": True}], ids=str
)
@pytest.mark.parametrize("pivoted", [True, False])
def test_the_bytes_of_many_ranks_at_once_are_those_of_each(
    shape: Shape, flags: dict[str, Any], pivoted: bool
) -> None:
    ranks = np.arange(min(shape.out_features, shape.in_features) + 1)
    for term in ((), (Masked(shape.in_features, 5),)):
        layer = Layer(terms=(LowRank(ranks, pivoted), *term), **flags)  # type: ignore[arg-type]
        single = [Layer(terms=(LowRank(int(rank), pivoted), *term), **flags).nbytes(shape) for rank in ranks]
        assert np.asarray(layer.nbytes(shape)).tolist() == single


def test_the_bytes_of_many_streams_at_once_are_those_of_each() -> None:
    ranks, streams = torch.tensor([0, 4, 4, 16]), torch.tensor([100, 7, 3000, 0])
    layer = Layer(terms=(LowRank(ranks), Entropy(streams)))  # type: ignore[arg-type]
    single = [
        Layer(terms=(LowRank(rank), Entropy(stream))).nbytes(Shape(40, 30))
        for rank, stream in zip(ranks.tolist(), streams.tolist(), strict=True)
    ]
    assert layer.nbytes(Shape(40, 30)).tolist() == single


@pytest.mark.parametrize("size", [2**15 - 1, 2**15, 2**15 + 1, 40_000])
def test_indices_are_stored_in_the_width_that_holds_them(size: int) -> None:
    """int16 counts to 2^15 - 1, so for up to 2^15 channels."""
    width = 2 if size <= 2**15 else 4
    for layer, shape, indices in (
        (Layer(terms=(LowRank(1, pivoted=False),), columns=3), Shape(2, size), 3),
        (Layer(terms=(LowRank(1, pivoted=False),), rows=3), Shape(size, 2), 3),
        (Layer(terms=(LowRank(2),)), Shape(size, 2), 2),
        (Layer(terms=(Masked(3, 1),)), Shape(2, size), 3),
    ):
        packed = PackedLinear(shape, layer, torch.bfloat16)
        assert sum(parameter.nbytes for parameter in packed.parameters()) == layer.nbytes(shape)
        found = [p for n, p in packed.named_parameters() if n in ("columns", "rows", "pivots")]
        assert [parameter.numel() for parameter in found] == [indices]
        assert found[0].dtype.itemsize == width
        assert torch.iinfo(found[0].dtype).max >= size - 1


def test_two_parts_that_store_the_same_tensor_are_refused() -> None:
    for terms in ((LowRank(1), LowRank(2)), (Entropy(9), Groupwise(3, 4)), (Masked(2, 1), Masked(3, 1))):
        with pytest.raises(ValueError, match="two of its parts store"):
            Layer(terms=terms).tensors(Shape(6, 5))
    with pytest.raises(ValueError, match="two of its parts store columns"):
        Layer(terms=(Masked(2, 1),), columns=2).tensors(Shape(6, 5))


# --- values that contradict each other ---


def damaged(tensors: dict[str, Tensor], name: str, change: Callable[[Tensor], None]) -> dict[str, Tensor]:
    copy = tensors[name].clone()
    change(copy)
    return tensors | {name: copy}


def swap(tensor: Tensor) -> None:
    tensor[:2] = tensor[:2].flip(0)


def exceed(tensor: Tensor) -> None:
    tensor[-1] = 1000


def negate(tensor: Tensor) -> None:
    tensor[0] = -1


def repeat(tensor: Tensor) -> None:
    tensor[1] = tensor[0]


def flip_bit(tensor: Tensor) -> None:
    tensor[0] ^= 1


DAMAGE = {
    **{
        f"{name} {change.__name__}": (case, name, change)
        for case, name in (
            ("low rank", "pivots"), ("masked", "columns"), ("kept columns", "columns"), ("kept rows", "rows")
        )
        for change in (swap, exceed, negate, repeat)
    },
    "mask": ("masked", "mask", flip_bit),
    "mask of all columns": ("masked in all columns", "mask", flip_bit),
}  # fmt: skip


@pytest.mark.parametrize(("where", "name", "change"), DAMAGE.values(), ids=DAMAGE)
def test_values_that_contradict_each_other_are_an_error_that_names_the_layer(
    generator: torch.Generator, where: str, name: str, change: Callable[[Tensor], None]
) -> None:
    if where.startswith("kept"):
        values = torch.randn(8, 9, generator=generator)
        indices, kept = torch.tensor([1, 4, 6]), where.removeprefix("kept ")
        part = {"columns": ("column_values", values[:, :3]), "rows": ("row_values", values[:3])}[kept]
        layer, tensors = assemble(Shape(8, 9), [], {kept: indices} | dict([part]), torch.bfloat16)
        shape = Shape(8, 9)
    else:
        case = CASES[where][1](generator)
        shape = case.shape
        layer, tensors = assemble(shape, [(case.form, case.tensors)], {}, torch.bfloat16)
        with pytest.raises(ValueError, match=name):
            case.form.check(damaged(case.stored(torch.bfloat16), name, change), shape)
    PackedLinear.holding(shape, layer, tensors).check("model.layers.3.up")
    broken = PackedLinear.holding(shape, layer, damaged(tensors, name, change))
    with pytest.raises(CheckpointError, match=rf"^model\.layers\.3\.up: {name}"):
        broken.check("model.layers.3.up")


@pytest.mark.parametrize(
    "where", [name for name, (form, _) in CASES.items() if form in ("entropy", "trellis")]
)
def test_a_damaged_stream_is_a_value_error(generator: torch.Generator, where: str) -> None:
    """Cut off, too long, or of another number of codes; never a wrong matrix of the wrong size."""
    case = CASES[where][1](generator)
    stored = case.stored(torch.bfloat16)
    for codes in (stored["codes"][:3], stored["codes"][:-1], stored["codes"][:0]):
        with pytest.raises(ValueError, match="entropy-coded stream"):
            case.form.load(stored | {"codes": codes}, case.shape)
    longer = Shape(case.shape.out_features + 8, case.shape.in_features)
    with pytest.raises(ValueError, match="entropy-coded stream"):
        case.form.load(stored, longer)


# --- entries of config.json ---

FORM_ENTRIES = [
    {"form": "low_rank"},
    {"form": "low_rank", "rank": 3, "pivoted": False},
    {"form": "masked", "columns": 3, "entries": 7},
    {"form": "entropy", "stream": 9, "exponent": -4},
    {"form": "trellis", "stream": 9, "exponent": -4, "states": 1, "scaled": True},
    {"form": "groupwise", "bits": 3, "group": 8},
]


@pytest.mark.parametrize("term", FORM_ENTRIES, ids=str)
def test_an_entry_is_what_it_parses_to(term: dict[str, Any]) -> None:
    entry = {"terms": [term], "columns": 2, "transposed": True}
    assert parse_layer("x", entry).to_dict() == entry
    assert type(parse_layer("x", entry).terms[0]) is FORMS[term["form"]]


def wrong_entries() -> list[Any]:
    wrong: list[Any] = [None, [], "x", 3, {}, {"terms": None}, {"terms": {}}, {"terms": [3]}, {"terms": [{}]}]
    wrong += [{"terms": [{"form": name}]} for name in ("", "unknown", None, 3, ["low_rank"])]
    for term in FORM_ENTRIES:
        wrong.append({"terms": [term | {"other": 1}]})
        for field in (name for name in term if name != "form"):
            known = term[field]
            for value in ("1", None, 1.5, [], 2**40, -(2**41), not isinstance(known, bool)):
                if type(value) is not type(known) or abs(value) >= 2**40:  # type: ignore[arg-type]
                    wrong.append({"terms": [term | {field: value}]})
        required = [f for f in term if f not in ("form", "rank", "pivoted", "exponent", "states", "scaled")]
        wrong += [{"terms": [{k: v for k, v in term.items() if k != gone}]} for gone in required]
    for term in (
        {"form": "low_rank", "rank": -1}, {"form": "masked", "columns": -1, "entries": 0},
        {"form": "masked", "columns": 1, "entries": -1}, {"form": "entropy", "stream": -1},
        {"form": "trellis", "stream": -1}, {"form": "trellis", "stream": 1, "states": 4},
        {"form": "entropy", "stream": 1, "exponent": 2000}, {"form": "groupwise", "bits": 0, "group": 8},
        {"form": "groupwise", "bits": 9, "group": 8}, {"form": "groupwise", "bits": 3, "group": 0},
    ):  # fmt: skip
        wrong.append({"terms": [term]})
    for field in ({"columns": -1}, {"rows": -1}, {"rows": True}, {"bias": 1}, {"bias": "yes"}, {"other": 1}):
        wrong += [{"terms": []} | field, {"rank": 2} | field]
    wrong += [{"rank": -1}, {"rank": "2"}, {"rank": 2, "bits": 3}, {"rank": 2, "bits": 3, "group": 0}]
    wrong += [
        {"rank": 2, "entries": -1},
        {"rank": 2, "stream": -1},
        {"rank": 2, "pivoted": 1},
        {"columns": 3},
    ]
    return wrong


@pytest.mark.parametrize("entry", wrong_entries(), ids=lambda entry: repr(entry)[:60])
def test_a_wrong_entry_is_an_error_that_names_the_layer(entry: Any) -> None:
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.3\.up cannot be read"):
        parse_layer("model.layers.3.up", entry)


# --- format version 1 ---

VERSION_1 = [
    base | flags
    for base, flags in product(
        [
            {"rank": 0}, {"rank": 4}, {"rank": 4, "pivoted": False}, {"rank": 4, "columns": 3},
            {"rank": 0, "columns": 3}, {"rank": 0, "columns": 13}, {"rank": 4, "rows": 3},
            {"rank": 0, "rows": 3},
            {"rank": 4, "columns": 3, "pivoted": False}, {"rank": 4, "rows": 3, "pivoted": False},
            {"rank": 4, "columns": 5, "entries": 41}, {"rank": 4, "columns": 13, "entries": 41},
            {"rank": 4, "columns": 5, "entries": 0}, {"rank": 3, "entries": 0},
            {"rank": 4, "columns": 5, "entries": 41, "pivoted": False},
            {"rank": 0, "stream": 70, "exponent": -30}, {"rank": 3, "stream": 70, "exponent": 5},
            {"rank": 0, "stream": 70}, {"rank": 0, "bits": 3, "group": 5}, {"rank": 2, "bits": 2, "group": 4},
            {"rank": 0, "columns": 3, "bits": 8, "group": 64},
            {"rank": 2, "columns": 2, "bits": 4, "group": 4, "pivoted": False},
        ],
        [{}, {"bias": True}, {"bias": True, "added_bias": True}, {"transposed": True}],
    )
]  # fmt: skip


def version_1_tensors(entry: dict[str, Any], shape: Shape) -> dict[str, Spec]:
    """As the table of format version 1 had them."""
    rank, columns, rows = (entry.get(name, 0) for name in ("rank", "columns", "rows"))
    is_masked, pivots = "entries" in entry, rank if entry.get("pivoted", True) else 0
    free_rows = shape.out_features - rows
    free_columns = shape.in_features - (0 if is_masked else columns)
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "weight": ((rank, free_columns), None),
        "coefficients": ((free_rows - pivots, rank), None),
        "pivots": ((pivots,), torch.int16),
        "columns": ((0 if columns == shape.in_features else columns,), torch.int16),
        "column_values": ((shape.out_features, 0 if is_masked else columns), None),
        "rows": ((rows,), torch.int16),
        "row_values": ((rows, shape.in_features), None),
    }
    if is_masked:
        sizes["mask"] = ((-(-shape.out_features * columns // 8),), torch.uint8)
        sizes["entries"] = ((entry["entries"],), None)
    if "stream" in entry:
        sizes["codes"] = ((entry["stream"],), torch.uint8)
        sizes["steps"] = ((free_columns,), torch.uint8)
    if "bits" in entry:
        groups = shape.out_features * -(-free_columns // entry["group"])
        sizes["codes"] = ((-(-shape.out_features * free_columns * entry["bits"] // 8),), torch.uint8)
        sizes["scales"] = ((shape.out_features, -(-free_columns // entry["group"])), None)
        sizes["zeros"] = ((-(-groups * entry["bits"] // 8),), torch.uint8)
    if entry.get("bias"):
        sizes["bias"] = ((shape.out_features,), None)
    always = ("weight", "coefficients", "mask", "entries")
    return {name: Spec(*about) for name, about in sizes.items() if name in always or prod(about[0])}


@pytest.mark.parametrize("entry", VERSION_1, ids=str)
def test_entries_of_version_1_parse_to_the_same_tensors(entry: dict[str, Any]) -> None:
    shape = Shape(19, 13)
    layer = parse_layer("x", entry)
    assert layer.tensors(shape) == version_1_tensors(entry, shape)
    assert (layer.bias, layer.added_bias, layer.transposed) == tuple(
        entry.get(flag, False) for flag in ("bias", "added_bias", "transposed")
    )
    for term in layer.terms:
        if isinstance(term, Entropy):
            assert term.exponent == entry.get("exponent", 0)
        elif isinstance(term, LowRank):
            assert (term.rank, term.pivoted) == (entry["rank"], entry.get("pivoted", True))
    assert parse_layer("x", json.loads(json.dumps(layer.to_dict()))) == layer
    assert layer.fits(shape)
    packed = PackedLinear(shape, layer, torch.bfloat16)
    assert {n: tuple(p.shape) for n, p in packed.named_parameters()} == {
        name: spec.size for name, spec in version_1_tensors(entry, shape).items()
    }


@pytest.mark.parametrize(
    "layer",
    [
        Layer(terms=(Masked(14, 3),)), Layer(columns=14), Layer(rows=20), Layer(terms=(LowRank(14),)),
        Layer(terms=(LowRank(11),), columns=3), Layer(terms=(LowRank(13),), rows=7),
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_that_no_weight_of_the_shape_can_have_does_not_fit(layer: Layer) -> None:
    assert not layer.fits(Shape(19, 13))


@pytest.mark.parametrize("largest", [5, 10**5])
@pytest.mark.parametrize("form", [Trellis(0, -8 * 17), Entropy(0, -8 * 17)])
def test_float16_reaches_neither_the_steps_nor_the_integers_of_low_ratios(form: Any, largest: int) -> None:
    """Weights and inputs are of ordinary size; their integers and steps are not."""
    generator = torch.Generator().manual_seed(0)
    codes_OI = torch.randint(-largest, largest + 1, (24, 64), generator=generator, dtype=torch.int32)
    steps = torch.zeros(64, dtype=torch.uint8)
    if isinstance(form, Trellis):
        loaded = split_integers(codes_OI) | {"steps": steps}
        form = Trellis(form.stream, form.exponent, states=1)
    else:
        loaded = {"codes": codes_OI, "steps": column_steps(steps, form.exponent)}
    x = torch.randn(12, 64, generator=generator).half()
    y = form.forward(loaded, x, Shape(24, 64))
    expected = x.float() @ form.dense(loaded, Shape(24, 64)).T
    assert y.dtype == torch.float16
    assert (y.float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize(
    ("form", "fitting", "others"),
    [
        (Blocks(2, 4), (8, 12), [(8, 10), (10, 12), (4, 4)]),
        (SemiStructured(), (3, 16), [(3, 12), (3, 7)]),
        (CodedLowRank(4, 8), (4, 9), [(3, 9), (9, 3)]),
        (LowRank(4), (4, 9), [(9, 3)]),
        (Masked(6, 5), (3, 6), [(6, 5)]),
        (Masked(6, 5, outputs=True), (6, 5), [(3, 6)]),
    ],
    ids=["blocks", "fours", "coded low rank", "low rank", "masked", "masked rows"],
)
def test_a_form_knows_the_weights_that_it_can_be_of(
    form: Form, fitting: tuple[int, int], others: list[tuple[int, int]]
) -> None:
    assert form.fits(Shape(*fitting))
    for sides in others:
        assert not form.fits(Shape(*sides))
        with pytest.raises(CheckpointError, match="does not match its entry"):
            packed_of("x", form, Shape(*sides))


def packed_of(name: str, form: Form, shape: Shape) -> None:
    """As a checkpoint is read in which the tensors are those of the entry."""
    layer = Layer(terms=(form,))
    specs = layer.tensors(shape)
    _packed(name, layer, {n: torch.zeros(s.size, dtype=s.dtype or torch.bfloat16) for n, s in specs.items()})
